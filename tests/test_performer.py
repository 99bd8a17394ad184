from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvpoll_fsm.commands import CancelPart
from kvpoll_fsm.effects import Changed, Do, Hangup, Transmit
from kvpoll_fsm.performer import Performer
from kvpoll_fsm.session import RoomKey

KEY = RoomKey("sender", 1, 0, 1)


class Tape:
    """Stands for all collaborators; notes what they are asked."""

    def __init__(self, *effects: list[Any]) -> None:
        self.notes: list[str] = []
        self._effects = list(effects)
        session = SimpleNamespace(quiescent=False)
        self.sessions = {KEY: session}

    def drain(self) -> list[Any]:
        return self._effects.pop(0) if self._effects else []

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.notes.append(name)


def perform(*effects: list[Any]) -> list[str]:
    tape: Any = Tape(*effects)
    carriers: Any = SimpleNamespace(flush=lambda: tape.notes.append("write"))
    Performer(tape, tape, carriers, *[tape] * 6).carry_out()
    return [note for note in tape.notes if note in ("do", "write", "show", "tell", "send", "hang_up")]


def test_our_host_is_told_what_peers_are_told_before_they_are_told() -> None:
    """Whatever put it on its way before the room was through: a timer in the same turn, for one."""
    packet: Any = None
    told = [Transmit(7, packet), Do(KEY, CancelPart(0)), Transmit(8, packet)]
    assert perform(told, [Changed(KEY)]) == ["write", "do", "write", "show", "write", "tell", "send", "send"]


def test_nobody_is_told_where_there_is_nothing_to_tell() -> None:
    assert perform([Do(KEY, CancelPart(0))], [Changed(KEY)]) == ["write", "do", "write", "show", "write"]


def test_what_was_submitted_is_sent_where_there_is_nothing_to_decide() -> None:
    """A worker has prepared a part, say: its writes are submitted before effects are asked for, and there are none."""
    assert perform() == ["write"]


def test_the_last_words_are_sent_before_the_connection_ends() -> None:
    packet: Any = None
    done = perform([Transmit(7, packet), Hangup(7), Changed(KEY)])
    assert done == ["write", "tell", "send", "hang_up", "hang_up", "show", "write"]
