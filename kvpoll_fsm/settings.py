"""Every setting of an endpoint but its pool: what it is called, what it may be, what holds if nobody gives it.

Declared here once: the file and the environment are read by it, `kvpoll config` and the docs show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.limits import Limits

__all__ = ["GROUPS", "OPTIONS", "PREFIX", "SETTINGS", "Kind", "Setting", "variable"]

PREFIX = "KVPOLL_"
OPTIONS = "transport_options"
"""The setting whose keys are (transport, option): what they may be, the transports know."""

Key = tuple[str, ...]
"""A setting's name; with those that have parts, the parts' names after it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be.

    Attributes:
        wanted: In words.
        read: Makes a value of a variable's text; raises ValueError.
        fits: Whether a value of a file is one.
    """

    wanted: str
    read: Callable[[str], Any]
    fits: Callable[[object], bool]


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]


def _checksum(text: str) -> bool | str:
    return text if text.strip().lower() == "auto" else _flag(text)


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")] if text.strip() else []


def _all(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


TEXT = Kind("text", str, lambda value: type(value) is str)
INTEGER = Kind("an integer", int, lambda value: type(value) is int)
NUMBER = Kind("a number", float, lambda value: type(value) in (int, float))
FLAG = Kind("true or false", _flag, lambda value: type(value) is bool)
CHECKSUM = Kind('"auto", true or false', _checksum, lambda value: type(value) in (str, bool))
INTEGERS = Kind("a list of integers", lambda text: [int(item) for item in _listed(text)], _all(int))
NAMES = Kind("a list of names", _listed, _all(str))


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, or one part of one.

    Attributes:
        kind: What it may be.
        default: What holds if nobody gives it.
    """

    kind: Kind
    default: Any


GROUPS: dict[str, type[Deadlines] | type[Limits]] = {"deadlines": Deadlines, "limits": Limits}
"""Settings that are made of parts."""


def _parts() -> dict[Key, Setting]:
    found: dict[Key, Setting] = {}
    for name, group in GROUPS.items():
        for part, value in asdict(group()).items():
            found[name, part] = Setting(NUMBER if part.endswith("_s") else INTEGER, value)
    return found


SETTINGS: dict[Key, Setting] = {
    ("transports",): Setting(TEXT, "prefer:shm,tcp"),
    ("standby",): Setting(NAMES, ()),
    ("listen",): Setting(TEXT, "tcp://127.0.0.1:0"),
    ("advertise",): Setting(TEXT, None),
    ("checksum",): Setting(CHECKSUM, "auto"),
    ("arrays",): Setting(TEXT, "auto"),
    ("isolation",): Setting(TEXT, "auto"),
    ("mover_nice",): Setting(INTEGER, 0),
    ("mover_cpus",): Setting(INTEGERS, None),
    ("workers",): Setting(INTEGER, 2),
    ("keys",): Setting(TEXT, None),
    ("authorized",): Setting(TEXT, None),
    ("insecure",): Setting(FLAG, False),
    ("trace",): Setting(TEXT, None),
    ("control_socket",): Setting(TEXT, None),
    **_parts(),
}


def variable(key: Key) -> str:
    """The environment variable of a setting."""
    return PREFIX + "_".join(key).upper().replace("-", "_")
