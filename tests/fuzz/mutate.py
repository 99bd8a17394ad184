"""One thing is changed in a value that was right: a number, a flag, a text, the order or the length of a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from tests.fuzz.choices import Choices

NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 4095, 4096, (1 << 16) - 1, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32)
EDGES = (*NUMBERS, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -(1 << 63))
UNFIT = (msgspec.MsgspecError, RecursionError, OverflowError, UnicodeError, TypeError, ValueError)
"""What encoding raises for a value that the format cannot hold, and decoding for what is no value."""
Place = tuple[Any, Any]
"""A map or list, and a key or index of it."""


def places(value: Any) -> list[Place]:
    """Every place in a plain value that holds something."""
    found: list[Place] = []
    if isinstance(value, dict):
        found = [(value, key) for key in value]
    elif isinstance(value, list):
        found = [(value, at) for at in range(len(value))]
    for container, key in list(found):
        found += places(container[key])
    return found


def change_one(value: Any, choices: Choices) -> Any:
    """Change one place of a plain value (maps, lists, scalars); the value itself is not touched."""
    value = msgspec.msgpack.decode(msgspec.msgpack.encode(value))
    found = places(value)
    if not found:
        return other(value, choices)
    container, key = choices.pick(found)
    if choices.flag(8):
        if choices.flag():
            del container[key]
        else:
            there, where = choices.pick(found)  # what stands elsewhere in the same value
            container[key] = msgspec.msgpack.decode(msgspec.msgpack.encode(there[where]))
    else:
        container[key] = other(container[key], choices)
    return value


def other(value: Any, choices: Choices) -> Any:
    """Another value, of the same type as a rule."""
    if choices.flag(16):
        return choices.pick((None, True, 0, -1, 0.5, "", "x", b"", b"\xff" * 16, [], {}, [[]], {"kind": "Bye"}))
    for kind, change in CHANGES:
        if isinstance(value, kind):
            return change(value, choices)
    return choices.pick((0, "", b"", [], {}))


def other_number(value: int, choices: Choices) -> int:
    return choices.pick((value + 1, value - 1, value * 2, -value, value ^ 1 << choices.below(63), choices.pick(EDGES)))


def other_bytes(value: bytes, choices: Choices) -> bytes:
    at = choices.below(len(value) + 1)
    flipped = value[:at] + bytes([value[at] ^ 1 << choices.below(8)]) + value[at + 1 :] if at < len(value) else value
    longer = value[:at] + choices.blob(8) + value[at:]
    return choices.pick((flipped, value[:at], longer, value[:at] + value[at + 1 :], value * 2, choices.blob(40)))


def other_text(value: str, choices: Choices) -> str:
    return other_bytes(value.encode("utf-8", "replace"), choices).decode("utf-8", "replace")


def other_list(value: list[Any], choices: Choices) -> list[Any]:
    if not value:
        return [choices.pick((0, "x", b"", [], {}))]
    at, to = choices.below(len(value)), choices.below(len(value))
    doubled, dropped, swapped, put_off = [*value], [*value], [*value], [*value]
    doubled.insert(to, value[at])
    del dropped[at]
    swapped[at], swapped[to] = swapped[to], swapped[at]
    put_off[at] = value[to]  # what is there twice now stands for what is missing
    return choices.pick((doubled, dropped, swapped, put_off, value * (1 + choices.below(400)), value[::-1]))


def other_map(value: dict[Any, Any], choices: Choices) -> dict[Any, Any]:
    return {**value, choices.pick(("kind", "part", "grant", "x", "failure")): choices.pick((0, None, "Abort", [], {}))}


CHANGES: tuple[tuple[type, Callable[[Any, Choices], Any]], ...] = (
    (bool, lambda value, choices: not value),
    (int, other_number),
    (float, lambda value, choices: choices.pick((-value, 0.0, 1e308, float("nan"), float("inf")))),
    (bytes, other_bytes),
    (str, other_text),
    (list, other_list),
    (dict, other_map),
)


def mutate_packet(data: bytes, choices: Choices) -> bytes:
    """A MessagePack value with one to three places changed; what is none has one byte changed."""
    try:
        value = msgspec.msgpack.decode(data)
        for _ in range(1 + choices.below(3)):
            value = change_one(value, choices)
        return msgspec.msgpack.encode(value)
    except UNFIT:
        return other_bytes(data, choices)


def mutate_file(data: bytes, choices: Choices) -> bytes:
    """Lines of JSON: one is changed in one place, doubled, dropped or moved."""
    lines = data.split(b"\n")
    at, to = choices.below(len(lines)), choices.below(len(lines))
    edit = choices.below(8)
    if edit == 0:
        lines.insert(to, lines[at])
    elif edit == 1:
        del lines[at]
    elif edit == 2:
        lines.insert(to, lines.pop(at))
    else:
        lines[at] = mutate_line(lines[at], choices)
    return b"\n".join(lines)


def mutate_line(line: bytes, choices: Choices) -> bytes:
    """A line of JSON with one place changed; what is none has one byte changed."""
    try:
        return msgspec.json.encode(change_one(msgspec.json.decode(line), choices))
    except UNFIT:
        return other_bytes(line, choices)
