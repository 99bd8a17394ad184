"""The settings of an endpoint, checked in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpoll_fsm import registry
from kvpoll_fsm.address import Address
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import AddressError, InvalidInput
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.security import Keys
from kvpoll_fsm.selection import Policy

__all__ = ["Config"]


@dataclass(frozen=True)
class Config:
    """How an endpoint is set up.

    Attributes:
        listen: Where the control plane listens; port 0 takes any free one.
        advertise: The control address that peers are told, if it differs (containers, NAT).
        policy: Which transports carry parts, best first.
        canary: Another policy, and the share of rooms that have it, as `Endpoint.switch_transport` may have left it.
        standby: Transports that are loaded and offered to peers, though the policy does not name them.
        deadlines: How long each gate may stay shut.
        checksum: "auto" (on unless the transport detects flipped bits itself), True or False.
        arrays: "auto" (torch if it is imported, else numpy), "numpy" or "torch".
        isolation: Where the driver runs: "process" (a mover), "thread", or "auto": a mover, unless the engine owns
            the memory or a setting or transport cannot be given to another process.
        mover_nice: How far the mover stands back behind others, 0 to 19; below 0 takes privileges.
        mover_cpus: Processors the mover may use, or None for all.
        transport_options: Keyword settings per transport name.
        workers: Threads that copy and hash.
        keys: CURVE keys for the control plane.
        insecure: Listen beyond this machine without keys all the same.
        limits: How much peers may take of the endpoint.
        trace: File that the whole trace is appended to; the newest records are kept in memory anyway.
        control_socket: Where `kvpoll switch` and `kvpoll report` reach the endpoint: a path, "auto", or None.
    """

    listen: Address
    advertise: Address | None
    policy: Policy
    deadlines: Deadlines
    checksum: bool | str = "auto"
    arrays: str = "auto"
    isolation: str = "auto"
    mover_nice: int = 0
    mover_cpus: tuple[int, ...] | None = None
    transport_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)  # may have secrets
    workers: int = 2
    keys: Keys | None = None
    insecure: bool = False
    trace: str | Path | None = None
    limits: Limits = field(default_factory=Limits)
    standby: tuple[str, ...] = ()
    canary: tuple[Policy, float] | None = None
    control_socket: str | Path | None = None

    @classmethod
    def of(
        cls,
        *,
        listen: str,
        advertise: str | None,
        transports: str,
        standby: str | Iterable[str],
        mover_cpus: Iterable[int] | None,
        keys: str | Path | None,
        authorized: str | Path | None,
        **others: Any,
    ) -> Config:
        """The settings as `Endpoint` is given them, or as a file has them. Raises what `Endpoint` does."""
        return cls(
            listen=Address.parse(listen),
            advertise=None if advertise is None else Address.parse(advertise),
            policy=Policy.parse(transports),
            standby=_names(standby),
            mover_cpus=None if mover_cpus is None else tuple(mover_cpus),
            keys=_load_keys(keys, authorized),
            **others,
        )

    def __post_init__(self) -> None:
        _one_of("checksum", self.checksum, ("auto", True, False))
        _one_of("arrays", self.arrays, ("auto", "numpy", "torch"))
        _one_of("isolation", self.isolation, ("auto", "process", "thread"))
        _check_mover(self.mover_nice, self.mover_cpus)
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or not 1 <= self.workers <= 64:
            raise InvalidInput(f"workers={self.workers!r}: give 1 to 64 threads")
        if not isinstance(self.deadlines, Deadlines):
            raise InvalidInput(f"deadlines={self.deadlines!r}: give Deadlines(stall_s=..., ...)")
        if not isinstance(self.limits, Limits):
            raise InvalidInput(f"limits={self.limits!r}: give Limits(orphans=..., ...)")
        _check_options(self.transport_options, self.names)
        if not (self.control_socket is None or (isinstance(self.control_socket, (str, Path)) and self.control_socket)):
            raise InvalidInput(f'control_socket={self.control_socket!r}: give "auto", or a path')
        if self.listen.is_wildcard and self.advertise is None:
            raise AddressError(str(self.listen), "a wildcard needs advertise='tcp://host:port' that peers can reach")
        reachable = [a for a in (self.listen, self.advertise) if a is not None and not a.is_loopback]
        if reachable and self.keys is None and not self.insecure:
            raise AddressError(
                str(reachable[0]), "other machines could reach this without keys: pass keys=, or insecure=True"
            )
        if self.advertise is not None:
            self.advertise.with_port(self.advertise.port or 1).require_reachable()

    def advertised(self, bound: Address) -> Address:
        """The control address that peers are told, of an endpoint that listens there."""
        if self.advertise is None:
            return bound
        return self.advertise.with_port(self.advertise.port or bound.port).with_key(bound.key)

    @property
    def names(self) -> tuple[str, ...]:
        """The transports to load: those of the policy, then those on standby."""
        canary = () if self.canary is None else self.canary[0].names
        return tuple(dict.fromkeys((*self.policy.names, *canary, *self.standby)))

    def options_of(self, transport: str) -> dict[str, Any]:
        """Keyword settings for a transport; one that listens does so where the control plane does, unless told not to.

        Raises:
            TransportUnavailable: It cannot be loaded.
        """
        options = dict(self.transport_options.get(transport, {}))
        if registry.load(transport).capabilities.listens:
            options.setdefault("host", self.listen.host)
            if self.advertise is not None:
                options.setdefault("advertise", self.advertise.host)
        return options


def _names(standby: str | Iterable[str]) -> tuple[str, ...]:
    listed = standby.split(",") if isinstance(standby, str) else standby
    try:
        names = tuple(listed)
        return Policy.parse(f"prefer:{','.join(names)}").names if names else ()
    except (TypeError, InvalidInput):
        raise InvalidInput(f"standby={standby!r}: give names of transports, each once") from None


def _check_options(given: Mapping[str, Mapping[str, Any]], names: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise InvalidInput(f"transport_options={given!r}: give a dict of dicts")
    for name, options in given.items():
        if name in {*names, *registry.HINTS} and isinstance(options, Mapping):
            continue
        known = {*names, *registry.HINTS, *registry.available()}
        if name not in known or not isinstance(options, Mapping):
            raise InvalidInput(
                f"transport_options: {name!r}: {options!r}: give a dict of settings for: {', '.join(sorted(known))}"
            )


def _check_mover(nice: int, cpus: tuple[int, ...] | None) -> None:
    if isinstance(nice, bool) or not isinstance(nice, int) or not -20 <= nice <= 19:
        raise InvalidInput(f"mover_nice={nice!r}: give an integer from -20 to 19")
    ours = os.sched_getaffinity(0)
    if cpus is not None and not (cpus and set(cpus) <= ours):
        raise InvalidInput(f"mover_cpus={cpus!r}: give some of the processors this process may use: {sorted(ours)}")


def _load_keys(keys: str | Path | None, authorized: str | Path | None) -> Keys | None:
    if (keys is None) is not (authorized is None):
        raise InvalidInput("keys= (our NAME.key_secret) and authorized= (folder of trusted .key files) go together")
    if "" in (keys, authorized):
        raise InvalidInput("keys= or authorized= is empty: name a file and a folder, or leave both out")
    return None if keys is None or authorized is None else Keys.load(keys, authorized)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
        raise InvalidInput(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
