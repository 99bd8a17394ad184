"""The figures that say how we stand, and the aims they are held to. All are ratios within one run, or counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.plane import Key
from benchmarks.results import Results, Series
from kvpoll_fsm.registry import available

__all__ = ["AIMS", "RATIOS", "Aim", "Missing", "needed", "summary"]

LARGE = ("1MiB", "8MiB", "64MiB", "256MiB", "64x128KiB", "2048x4KiB")
HUNDRED_THOUSAND = 100_000


class Missing(Exception):
    """Why a figure is not there."""


Value = Callable[[Results], float]


@dataclass(frozen=True)
class Figure:
    """A figure and the transfers it is made of."""

    value: Value
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Aim:
    """What is wanted of a figure.

    Attributes:
        text: For people.
        value: Finds it out.
        limit: What it comes down to; shown where it is not reached.
        least: It must be at least that, if not None.
        most: It must be at most that, if not None.
    """

    text: str
    value: Value
    limit: str
    least: float | None = None
    most: float | None = None

    def reached(self, value: float) -> bool:
        """Whether a value is good enough."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def _series(results: Results, key: Key) -> Series:
    if key in results.plane:
        return results.plane[key]
    for name in (key[0], " ".join(key)):
        if name in results.missing:
            raise Missing(f"{key[0]}: {results.missing[name]}")
    if key[0].split()[0] in ("shm", "room", "small") and "shm" in key[0] and "shm" not in available():
        raise Missing("the transport shm is not installed")
    failed = [f"{name}: {why}" for name, why in results.missing.items() if name.startswith(f"{key[0]} ")]
    raise Missing("; ".join(failed) or f"{' '.join(key)} was not measured")


def _call(results: Results, name: str) -> Series:
    if name in results.calls:
        return results.calls[name]
    raise Missing(results.missing.get(name) or results.missing.get("calls") or f"{name} was not measured")


def _number(results: Results, name: str) -> float:
    if name in results.numbers:
        return results.numbers[name]
    raise Missing(results.missing.get("growth") or f"{name} was not measured")


def _times(one: Series, other: Series) -> float:
    ratio = one.faster_than(other)
    if ratio is None:
        raise Missing("no round has both")
    return ratio


def faster(one: Key, other: Key) -> Figure:
    """How many times as fast the first is."""
    return Figure(lambda results: _times(_series(results, one), _series(results, other)), (one, other))


def slower_call(one: str, other: str) -> Figure:
    """How many times as long the first call takes."""
    return Figure(lambda results: _times(_call(results, other), _call(results, one)))


def busy(transport: str, bare: str) -> Figure:
    """What a transport in a process of its own moves beside the loops, in terms of what a bare pair does."""
    return faster((f"{transport} apart", "64MiB", "busy"), (bare, "64MiB", "busy"))


def keeps(room: str, bare: str) -> Figure:
    """The share of its speed that a room keeps beside the loops, in terms of the share that a bare pair keeps."""
    busy_room, alone_room = (room, "64MiB", "busy"), (room, "64MiB", "alone")
    busy_bare, alone_bare = (bare, "64MiB", "busy"), (bare, "64MiB", "alone")
    ours, theirs = faster(busy_room, alone_room), faster(busy_bare, alone_bare)
    return Figure(lambda results: ours.value(results) / theirs.value(results), (*ours.keys, *theirs.keys))


RATIOS: dict[str, Figure] = {
    "shm_vs_memmove_64MiB": faster(("shm", "64MiB", "alone"), ("memmove", "64MiB", "alone")),
    "tcp_vs_iperf3_64MiB": faster(("tcp", "64MiB", "alone"), ("iperf3", "64MiB", "alone")),
    "tcp_vs_gloo_8MiB": faster(("tcp", "8MiB", "alone"), ("torch gloo", "8MiB", "alone")),
    "tcp_vs_mooncake_64MiB": faster(("tcp", "64MiB", "alone"), ("mooncake tcp", "64MiB", "alone")),
    "busy_shm_vs_bare_64MiB": busy("shm", "memmove"),
    "busy_tcp_vs_bare_64MiB": busy("tcp", "bare tcp"),
    "poll_vs_dict_method": slower_call("poll", "dict method"),
    "transition_vs_transitions": slower_call("transitions", "transition"),
}


def rooms_per_s(results: Results) -> float:
    """Small rooms of one pair of endpoints over shm."""
    return 1 / _series(results, ("small rooms shm process", "1KiB", "alone")).median_s


def bytes_per_room(results: Results) -> float:
    """Of an open room, at the largest number that was opened."""
    steps = [(int(name.split()[3]), value) for name, value in results.numbers.items() if name.startswith("bytes per")]
    if not steps:
        raise Missing(results.missing.get("growth", "not measured"))
    return max(steps)[1]


def needed() -> tuple[Key, ...]:
    """The transfers that the summary is made of."""
    return (*(key for figure in RATIOS.values() for key in figure.keys), ("small rooms shm process", "1KiB", "alone"))


def summary(results: Results) -> dict[str, Any]:
    """What `kvpoll bench --json` prints."""
    missing: dict[str, str] = {}

    def look(name: str, value: Value) -> float | None:
        try:
            return round(value(results), 3)
        except Missing as why:
            missing[name] = str(why)
            return None

    return {
        "ratios": {name: look(name, figure.value) for name, figure in RATIOS.items()},
        "rooms_per_s": look("rooms_per_s", rooms_per_s),
        "bytes_per_room": look("bytes_per_room", bytes_per_room),
        "missing": missing,
    }


def _least(ratios: Iterable[Figure]) -> Value:
    """The worst of several."""
    every = list(ratios)
    return lambda results: min(figure.value(results) for figure in every)


def _against(peer: str) -> Value:
    return _least(faster(("tcp", case, "alone"), (peer, case, "alone")) for case in LARGE)


def _cpu(peer: str) -> Value:
    def value(results: Results) -> float:
        ours, theirs = (_series(results, (name, "64MiB", "alone")).cpu_s_per_gb for name in ("tcp", peer))
        if not ours or not theirs:
            raise Missing("no processor time was taken")
        return ours / theirs

    return value


def _turn(results: Results) -> float:
    times = [_number(results, f"turn of the driver, {rooms} rooms") for rooms in (HUNDRED_THOUSAND, 100)]
    return times[0] / times[1]


def _round_trip(results: Results) -> float:
    room = _series(results, ("room shm process", "1KiB", "alone"))
    return _times(_series(results, ("pyzmq tcp", "1KiB", "alone")), room)


_SHM = [faster(("shm", case, "alone"), ("memmove", case, "alone")) for case in ("8MiB", "64MiB", "256MiB")]

_HAND_OVERS = "messages and thread hand-overs of every room, all in Python"
_FIXED = "each ticket is submitted, answered and reported by threads in Python"
_SHARED = "the loops and the transfer share the processors"

AIMS: tuple[Aim, ...] = (
    Aim(
        "shm, 8 MiB and up, over memmove: at least 0.9",
        _least(_SHM),
        "the receiver copies: it is told so and tells the end, and memmove is not",
        least=0.9,
    ),
    Aim(
        "tcp over iperf3's one stream: at least 1.5",
        RATIOS["tcp_vs_iperf3_64MiB"].value,
        "both pass the kernel's two copies; iperf3 reads the same small buffer again and again, we into place",
        least=1.5,
    ),
    Aim(
        "tcp over iperf3's one stream with the congestion control that we ask for: at least 1.5",
        faster(("tcp", "64MiB", "alone"), ("iperf3 reno", "64MiB", "alone")).value,
        "as above",
        least=1.5,
    ),
    Aim("tcp over gloo, the worst from 1 MiB on, scattered too: above 1", _against("torch gloo"), _FIXED, least=1.0),
    Aim(
        "tcp over NIXL's tcp, likewise: above 1",
        _against("nixl tcp"),
        f"{_FIXED}; NIXL's sender spins until it is done",
        least=1.0,
    ),
    Aim("tcp over Mooncake's tcp, likewise: above 1", _against("mooncake tcp"), _FIXED, least=1.0),
    Aim(
        "shm beside busy loops over a bare copy: at least 0.9",
        RATIOS["busy_shm_vs_bare_64MiB"].value,
        _SHARED,
        least=0.9,
    ),
    Aim(
        "tcp beside busy loops over bare sockets: at least 0.9",
        RATIOS["busy_tcp_vs_bare_64MiB"].value,
        _SHARED,
        least=0.9,
    ),
    *(
        Aim(
            f"what a room over {transport} keeps of its speed beside busy loops, over what {bare} keeps: at least 0.9",
            keeps(f"room {transport} process", bare).value,
            _SHARED,
            least=0.9,
        )
        for transport, bare in (("shm", "memmove"), ("tcp", "bare tcp"))
    ),
    Aim(
        "poll() over a method that reads a dictionary: at most 1.5",
        RATIOS["poll_vs_dict_method"].value,
        "it reads a byte of shared memory, looks up what it stands for, and leaves a sign of life",
        most=1.5,
    ),
    Aim(
        "poll() with a peer that stands still over one that works: at most 1.1",
        slower_call("poll, peer stopped", "poll").value,
        "it reads the same byte either way: what differs is what else ran",
        most=1.1,
    ),
    Aim(
        "a transition, times as fast as transitions: at least 10",
        RATIOS["transition_vs_transitions"].value,
        "a lookup by state and event, whose hashes are computed each time",
        least=10,
    ),
    Aim("small rooms per second over shm: at least 5,000", rooms_per_s, _HAND_OVERS, least=5000),
    Aim("a room of 1 KiB over shm, over a round trip of pyzmq: at most 3", _round_trip, _HAND_OVERS, most=3.0),
    Aim(
        "bytes per room, 100,000 open: at most 2,048",
        lambda results: _number(results, f"bytes per room, {HUNDRED_THOUSAND} rooms"),
        "handle, view, session and timers are Python objects",
        most=2048,
    ),
    Aim(
        "a turn of the driver with 100,000 rooms over one with 100: at most 1.1",
        _turn,
        "what a turn does does not depend on the rooms; its memory is in no cache any more",
        most=1.1,
    ),
    Aim("processor seconds per GB, tcp over Mooncake's tcp: at most 0.5", _cpu("mooncake tcp"), _FIXED, most=0.5),
    Aim("processor seconds per GB, tcp over NIXL's tcp: at most 0.5", _cpu("nixl tcp"), _FIXED, most=0.5),
)
