"""A transport's settings, made of the keywords it is given."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from kvpoll_fsm.errors import InvalidInput

__all__ = ["settings_of"]

S = TypeVar("S")


def settings_of(form: type[S], given: Mapping[str, Any]) -> S:
    """The settings, checked by `form`, which is a dataclass.

    Raises:
        InvalidInput: There is no such setting, or one is out of its range.
    """
    names = [field.name for field in fields(form)]  # type: ignore[arg-type]  # Protocols of dataclasses need Python 3.13
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            problem = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
            raise InvalidInput(f"{name}: there is no such setting; {problem}")
    return form(**given)
