"""Errors of the mover's, told to its host, who raises them as what they are."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from kvpoll_fsm import errors
from kvpoll_fsm.errors import KvpollError, MoverUnavailable
from kvpoll_fsm.mover.frames import Refused

__all__ = ["error_of", "refusal"]


def refusal(error: Exception) -> Refused:
    """An error as a frame."""
    if not isinstance(error, KvpollError):
        return Refused("MoverUnavailable", [], {"problem": f"{type(error).__name__}: {error}"})
    plain: dict[str, Any] = {}
    for name, value in vars(error).items():
        with contextlib.suppress(NotImplementedError, TypeError):
            plain[name] = msgspec.to_builtins(value)
    return Refused(type(error).__name__, [str(arg) for arg in error.args], plain)


def error_of(refused: Refused) -> KvpollError:
    """The error that the mover met, as what it is."""
    cls = getattr(errors, refused.kind, KvpollError)
    if cls is MoverUnavailable:
        return MoverUnavailable(refused.fields["problem"])
    error: KvpollError = cls.__new__(cls)
    error.args = tuple(refused.args)
    error.__dict__.update(refused.fields)
    return error
