"""An endpoint's settings as plain data, for the mover, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvpoll_fsm.address import Address
from kvpoll_fsm.config import Config
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.security import Keys
from kvpoll_fsm.selection import Policy

__all__ = ["config_of", "layout_of", "plain_config", "plain_layout", "plain_options"]


def plain_options(config: Config) -> dict[str, Any]:
    """The transports' settings as plain data.

    Raises:
        InvalidInput: One is an object that another process cannot be given.
    """
    try:
        plain: dict[str, Any] = msgspec.to_builtins(config.transport_options, str_keys=True, enc_hook=_plain)
    except (NotImplementedError, TypeError) as error:
        raise InvalidInput(f"transport_options: {error}, and only that can be given to another process") from None
    return plain


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{value!r} is no plain data")


def plain_config(config: Config, listen: Address) -> dict[str, Any]:
    """The settings; the control plane listens at `listen`. All transports are on standby: the policy may change.

    Raises:
        InvalidInput: As `plain_options`.
    """
    keys = config.keys
    return {
        "listen": str(listen),
        "advertise": None if config.advertise is None else str(config.advertise),
        "policy": str(config.policy),
        "standby": list(config.names),
        "canary": None,
        "deadlines": msgspec.to_builtins(config.deadlines),
        "checksum": config.checksum,
        "transport_options": plain_options(config),
        "workers": config.workers,
        "keys": None if keys is None else [keys.public, keys.secret, sorted(keys.authorized)],
        "insecure": config.insecure,
        "trace": None if config.trace is None else str(config.trace),
        "limits": msgspec.to_builtins(config.limits),
        "control_socket": None if config.control_socket is None else str(config.control_socket),
    }


def config_of(plain: dict[str, Any]) -> Config:
    """The settings that `plain_config` was made of; arrays are the host's business."""
    keys, canary = plain["keys"], plain["canary"]
    return Config(
        listen=Address.parse(plain["listen"]),
        advertise=None if plain["advertise"] is None else Address.parse(plain["advertise"]),
        policy=Policy.parse(plain["policy"]),
        deadlines=Deadlines(**plain["deadlines"]),
        checksum=plain["checksum"],
        arrays="numpy",
        isolation="thread",
        transport_options=plain["transport_options"],
        workers=plain["workers"],
        keys=None if keys is None else Keys(keys[0], keys[1], frozenset(keys[2])),
        insecure=plain["insecure"],
        trace=plain["trace"],
        limits=Limits(**plain["limits"]),
        standby=tuple(plain["standby"]),
        canary=None if canary is None else (Policy.parse(canary[0]), canary[1]),
        control_socket=plain["control_socket"],
    )


def plain_layout(layout: Layout) -> tuple[int, list[tuple[str, str, tuple[int, ...], bool]]]:
    """What `layout_of` makes a layout of."""
    return layout.block_tokens, [(f.name, f.dtype, f.shape_per_token, f.per_room) for f in layout.fields]


def layout_of(plain: tuple[int, list[tuple[str, str, tuple[int, ...], bool]]]) -> Layout:
    """The layout that `plain_layout` was made of."""
    return Layout(plain[0], [Field(*field) for field in plain[1]])
