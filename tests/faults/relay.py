"""A network of our own between namespaces: what hosts send each other passes through our hands.

Packets are read from one host's TUN device and written to the other's. In between they are lost, delayed, repeated
or swallowed by size or port, as `Weather` says. This is what netem does, for kernels without it; and its dice have
a seed.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import os
import random
import select
import socket
import struct
import threading
import time
from itertools import count, permutations
from types import TracebackType
from typing import Any

from tests.faults.namespaces import NETWORK, Host

__all__ = ["Relay", "Weather", "missing"]

MAX_UNDER_WAY = 1000
"""Packets on their way in one direction; what comes then is lost, as with netem."""


@dataclasses.dataclass(frozen=True)
class Weather:
    """What happens to packets in one direction.

    Attributes:
        loss: Share of packets that are lost.
        duplicate: Share of packets that arrive twice.
        delay_s: How long each takes.
        jitter_s: Up to so much longer, each by itself, so that they overtake one another.
        rate_nbytes_s: Bytes that pass in a second; 0 is any number.
        largest_nbytes: Larger packets vanish without a word (an MTU black hole); 0 is any size.
        blocked_ports: TCP from and to these ports vanishes.
        cut: All of it vanishes, also what is under way.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate_nbytes_s: float = 0.0
    largest_nbytes: int = 0
    blocked_ports: frozenset[int] = frozenset()
    cut: bool = False


class _Way:
    """One direction between two hosts. Its dice are its own, so what befalls its nth packet depends on the seed."""

    def __init__(self, seed: object, tun: int) -> None:
        self.tun = tun
        self.weather = Weather()
        self.taken = self.lost = 0
        self.under_way = 0
        self._free_s = 0.0
        self._dice = random.Random(repr(seed))

    def dues(self, packet: bytes, now_s: float) -> list[float]:
        """When a packet arrives: once, twice or never."""
        dues = self._drawn(packet, now_s)
        self.under_way += len(dues)
        self.lost += not dues
        self.taken += 1  # last: who sees it sees the rest
        return dues

    def _drawn(self, packet: bytes, now_s: float) -> list[float]:
        lost, twice, late, later = (self._dice.random() for _ in range(4))
        weather = self.weather
        if weather.cut or lost < weather.loss or self._is_swallowed(packet) or self.under_way >= MAX_UNDER_WAY:
            return []
        if weather.rate_nbytes_s:
            self._free_s = now_s = max(now_s, self._free_s) + len(packet) / weather.rate_nbytes_s
        lates = (late, later) if twice < weather.duplicate else (late,)
        return [now_s + weather.delay_s + share * weather.jitter_s for share in lates]

    def arrive(self, packet: bytes) -> None:
        """Hand a packet over, unless the way was cut meanwhile."""
        self.under_way -= 1
        try:
            if self.weather.cut:
                self.lost += 1
            else:
                os.write(self.tun, packet)
        except OSError:  # the device is down
            self.lost += 1

    def _is_swallowed(self, packet: bytes) -> bool:
        weather = self.weather
        if weather.largest_nbytes and len(packet) > weather.largest_nbytes:
            return True
        if not weather.blocked_ports or packet[9] != socket.IPPROTO_TCP:
            return False
        return not weather.blocked_ports.isdisjoint(struct.unpack_from("!HH", packet, (packet[0] & 15) * 4))


class Relay:
    """Hosts, and the thread that carries packets between them.

    Attributes:
        hosts: They reach each other by their addresses.
    """

    def __init__(self, hosts: int = 2, seed: object = 0) -> None:
        self.hosts = tuple(Host(number) for number in range(hosts))
        self._ways = {
            (a, b): _Way((seed, a, b), self.hosts[b].tun) for a, b in permutations(range(hosts), 2)
        }  # by sending and receiving host
        self._waiting: list[tuple[float, int, _Way, bytes]] = []
        self._numbers = count()
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def set(self, a: int, b: int, **weather: Any) -> None:
        """Change the weather from host `a` to host `b`; what is not named stays."""
        way = self._ways[a, b]
        way.weather = dataclasses.replace(way.weather, **weather)

    def between(self, a: int, b: int, **weather: Any) -> None:
        """Change the weather between two hosts, both ways."""
        self.set(a, b, **weather)
        self.set(b, a, **weather)

    def heal(self) -> None:
        """Fine weather everywhere."""
        for way in self._ways.values():
            way.weather = Weather()

    def counts(self, a: int, b: int) -> tuple[int, int]:
        """Packets from host `a` to host `b`: all, and those of them that were lost."""
        return self._ways[a, b].taken, self._ways[a, b].lost

    def under_way(self, a: int, b: int) -> int:
        """Packets from host `a` to host `b` that have not arrived yet."""
        return self._ways[a, b].under_way

    def close(self) -> None:
        """End the thread and the hosts."""
        os.eventfd_write(self._over, 1)
        self._thread.join()
        os.close(self._over)
        for host in self.hosts:
            host.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        poller = select.epoll()
        number_of = {host.tun: number for number, host in enumerate(self.hosts)}
        with poller:
            for fd in (*number_of, self._over):
                poller.register(fd, select.EPOLLIN)
            while True:
                left_s = self._waiting[0][0] - time.monotonic() if self._waiting else -1.0
                ready = [fd for fd, _ in poller.poll(max(0.0, left_s) if self._waiting else None)]
                if self._over in ready:
                    return
                for fd in ready:
                    self._take(number_of[fd])
                self._deliver()

    def _take(self, sender: int) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                packet = os.read(self.hosts[sender].tun, 1 << 16)
            except OSError:  # nothing left
                return
            to = socket.inet_ntoa(packet[16:20]) if packet[0] >> 4 == 4 else ""
            way = self._ways.get((sender, int(to.removeprefix(NETWORK)) - 1)) if to.startswith(NETWORK) else None
            if way is not None:
                for due_s in way.dues(packet, time.monotonic()):
                    heapq.heappush(self._waiting, (due_s, next(self._numbers), way, packet))

    def _deliver(self) -> None:
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, way, packet = heapq.heappop(self._waiting)
            way.arrive(packet)


@functools.cache
def missing() -> str:
    """Why there can be no such network here, or nothing."""
    try:
        Relay(hosts=1).close()
    except OSError as error:
        return f"no network namespace with a TUN device here (root and /dev/net/tun are needed): {error}"
    return ""
