"""The data plane: in each round every peer has its turn, with a pair of processes of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from benchmarks.cases import CASES
from benchmarks.pair import Pair, PeerFailed
from benchmarks.peers import peers
from benchmarks.peers.base import Peer
from benchmarks.results import Results, Series

__all__ = ["LOOPS", "Key", "Plan", "Plane"]

LOOPS = ("alone", "busy")
LEAST_S = 2.0
"""With less time left a peer is not started any more."""
Key = tuple[str, str, str]
"""Peer, case, and one of `LOOPS`."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        keys: (peer, case, "alone" or "busy"), or none for everything there is.
        rounds: How often everybody has a turn, if time allows.
        sample_s: Time for the samples of one peer and case in a round; at least one transfer is made.
        turn_s: Time after which a peer's turn is ended by force.
        task_s: Likewise for each of the other measurements.
        call_s: Time for the samples of one call in a round.
        rooms: How many rooms are opened at once, at each step of their growth.
        job_tokens: Sizes of the whole main job.
        within_s: Time for everything.
    """

    keys: tuple[Key, ...] = ()
    rounds: int = 5
    sample_s: float = 0.2
    turn_s: float = 60.0
    task_s: float = 120.0
    call_s: float = 0.05
    rooms: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    job_tokens: tuple[int, ...] = (2_000, 100_000)
    within_s: float = 840.0


class Plane:
    """Runs the rounds."""

    def __init__(
        self,
        plan: Plan,
        results: Results,
        ends_s: float,
        say: Callable[[str], None],
        known: Mapping[str, Peer] | None = None,
    ) -> None:
        """Store these.

        Args:
            plan: What to measure.
            results: Where it goes.
            ends_s: Monotonic time at which everything has ended.
            say: Is told how things go.
            known: Peers by name, if not those of the folder.
        """
        self._plan, self._results, self._ends_s, self._say = plan, results, ends_s, say
        self._peers = peers() if known is None else known
        self._given_up: set[tuple[str, str, str]] = set()

    def run(self) -> None:
        """All rounds, or as many as time allows."""
        here = list(self._installed())
        longest_s = 0.0
        for round_ in range(self._plan.rounds):
            started_s = time.monotonic()
            if started_s + longest_s > self._ends_s:
                break
            turn = round_ % max(1, len(here))
            for peer in here[turn:] + here[:turn]:
                self._turn(round_, peer)
            longest_s = max(longest_s, time.monotonic() - started_s)
            self._say(f"round {round_ + 1} of at most {self._plan.rounds}: {time.monotonic() - started_s:.0f} s")
            self._results.numbers["rounds"] = round_ + 1

    def _installed(self) -> Iterable[Peer]:
        wanted = {name for name, _, _ in self._plan.keys}
        for peer in self._peers.values():
            if wanted and peer.name not in wanted:
                continue
            why = peer.missing()
            if why is not None:
                self._results.missing[peer.name] = why
                self._say(f"{peer.name}: {why}")
                continue
            self._results.settings[peer.name] = {
                "kind": peer.kind,
                "settings": peer.settings,
                "checksum": peer.checksum,
                "busy loop": peer.loop,
            }
            yield peer

    def _turn(self, round_: int, peer: Peer) -> None:
        """One peer in one round. What it did before it failed counts; what it failed at is not tried again."""
        todo = [key for key in self._keys(peer) if key not in self._given_up]
        left_s = self._ends_s - time.monotonic()
        if todo and left_s < LEAST_S:
            self._results.missing.setdefault(peer.name, "no time was left")
        if not todo or left_s < LEAST_S:
            return
        at: Key | None = None
        try:
            nbytes = max(CASES[case].span_nbytes for _, case, _ in todo)
            with Pair(peer, nbytes, min(self._plan.turn_s, left_s)) as pair:
                busy = False
                for at in todo:
                    busy = self._one(round_, pair, at, busy)
                self._results.memory[peer.name] = sum(pair.ask_both("memory"))
        except PeerFailed as error:
            self._given_up.update(todo if at is None else [at])
            name = " ".join(at or [peer.name])
            self._results.missing[name] = str(error)
            self._say(f"{name}: {error}")

    def _keys(self, peer: Peer) -> list[Key]:
        every = [(peer.name, case, loop) for loop in LOOPS for case in CASES if peer.does(CASES[case])]
        return [key for key in every if not self._plan.keys or key in self._plan.keys]

    def _one(self, round_: int, pair: Pair, key: Key, busy: bool) -> bool:
        """One case; returns whether the loops run now."""
        _, name, loop = key
        case = CASES[name]
        if loop == "busy" and not busy:
            pair.ask_both("busy", on=True)
        pair.prepare(case)
        samples, cpu_s = pair.measure(self._plan.sample_s)
        series = self._results.plane.setdefault(key, Series(nbytes=case.nbytes))
        series.add(round_, [seconds * case.nbytes / nbytes for seconds, nbytes in samples])
        series.cpu_s += cpu_s
        series.moved_nbytes += sum(nbytes for _, nbytes in samples)
        return loop == "busy"
