"""What is wrong at this moment: with the links between hosts, and with the hosts."""

from __future__ import annotations

import random
from collections import Counter

from kvpoll_fsm.testing.sim_plan import Break, Disturb, Freeze, Part, Plan, Quiet, Slow

__all__ = ["Weather"]

SLOWEST_S = 40.0
"""What one piece of work takes at most."""
Lasting = Disturb | Part | Break | Freeze | Slow | Quiet


class Weather:
    """The faults that last, and the noise of every link and host.

    Each link and each host draws from a source of its own, so that one that is left out of a plan changes little
    for the others.

    Attributes:
        active: Faults at this moment.
        counts: How often something was hit, by kind.
        trouble_s: When something was wrong last.
    """

    def __init__(self, plan: Plan) -> None:
        self.active: list[Lasting] = []
        self.counts: Counter[str] = Counter()
        self.trouble_s = 0.0
        self._noise = plan.noise
        self._machines = {machine.name: machine for machine in plan.machines}
        self._dice: dict[tuple[str, ...], random.Random] = {}

    def begins(self, fault: Lasting) -> None:
        """A fault strikes."""
        self.active.append(fault)

    def ends(self, fault: Lasting, now: float) -> None:
        """A fault is over."""
        self.active.remove(fault)
        self.trouble_s = now

    def clear_for(self, seconds: float, now: float) -> bool:
        """Whether nothing has been wrong for a while."""
        return not self.active and now - self.trouble_s >= seconds

    def dice(self, *name: str) -> random.Random:
        """The source of noise of a link or host."""
        if name not in self._dice:
            self._dice[name] = random.Random(f"{self._noise}/{'/'.join(name)}")
        return self._dice[name]

    # Packets

    def fates(self, source: str, dest: str) -> list[float]:
        """How long each copy of a packet is on its way; none if it is lost."""
        dice = self.dice("packets", source, dest)
        delay = (self._machines[source].latency_s + self._machines[dest].latency_s) * (0.5 + dice.random())
        if self.parted(source, dest, "control"):
            self.counts["parted"] += 1
            return []
        copies = [delay]
        for fault in self.active:
            if isinstance(fault, Disturb) and (fault.source, fault.dest) == (source, dest):
                copies = [copy for copy in copies if not self._hits("lost", dice, fault.lose)]
                copies += [copy for copy in copies if self._hits("repeated", dice, fault.repeat)]
                copies = [copy + fault.late_s * dice.random() for copy in copies]
        return copies

    def parted(self, source: str, dest: str, plane: str) -> bool:
        """Whether nothing gets from one host to the other."""
        parts = [fault for fault in self.active if isinstance(fault, Part) and fault.plane in (plane, "both")]
        return any(
            (fault.source, fault.dest) == (source, dest)
            or (fault.both_ways and (fault.dest, fault.source) == (source, dest))
            for fault in parts
        )

    def _hits(self, kind: str, dice: random.Random, share: float) -> bool:
        hit = share > 0 and dice.random() < share
        self.counts[kind] += hit
        return hit

    # Work

    def work_s(self, name: str) -> float:
        """How long a host needs for the next piece of work."""
        factors = [fault.factor for fault in self.active if isinstance(fault, Slow) and fault.host == name]
        seconds = self._machines[name].work_s * min(3.0, self.dice("work", name).expovariate(1.0))
        return min(SLOWEST_S, seconds * max(factors, default=1.0))

    def broken(self, source: str, dest: str, transport: str) -> Break | None:
        """The fault that makes writes through a transport fail, if there is one."""
        place = (source, dest, transport)
        breaks = [fault for fault in self.active if isinstance(fault, Break)]
        return next((f for f in breaks if (f.source, f.dest, f.transport) == place), None)

    # Hosts

    def thaw_s(self, name: str) -> float:
        """When a host goes on that stands still, or 0 if it does not stand still."""
        frozen = [fault for fault in self.active if isinstance(fault, Freeze) and fault.host == name]
        return max((fault.at_s + fault.for_s for fault in frozen), default=0.0)

    def host_alive(self, name: str, now: float, host_alive_s: float) -> bool:
        """Whether a host has called its endpoint lately."""
        quiet = [fault for fault in self.active if isinstance(fault, Quiet) and fault.host == name]
        return all(now - fault.at_s < host_alive_s for fault in quiet)
