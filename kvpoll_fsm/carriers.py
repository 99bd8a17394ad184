"""The transports of one endpoint: started, asked for news, and given up when one breaks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from kvpoll_fsm import registry
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.config import Config
from kvpoll_fsm.control import Control
from kvpoll_fsm.errors import AddressError, InvalidInput, TransportUnavailable
from kvpoll_fsm.messages import TransportOffer
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.spi import Completion, Gathers, Transport

__all__ = ["Carriers", "Loaded", "load_transports"]

log = logging.getLogger("kvpoll_fsm")


@dataclass(frozen=True)
class Loaded:
    """The transports of an endpoint, not started.

    Attributes:
        transports: By name.
        left_out: Why others could not be loaded, by name.
    """

    transports: Mapping[str, Transport]
    left_out: Mapping[str, str] = field(default_factory=dict)


class Carriers:
    """Used by the driver's thread alone.

    Attributes:
        live: The transports that work, by name. All who use transports share it.
        fatal: Why the endpoint has to end: no transport is left, or one cannot be closed.
        unsafe: One could not be closed: nobody can say whether it still writes.
        left_out: Why others do not, by name: those that could not be loaded or started, and those that broke.
    """

    def __init__(self, loaded: Loaded, control: Control) -> None:
        self.live = dict(loaded.transports)
        self.left_out = dict(loaded.left_out)
        self.fatal: TransportUnavailable | None = None
        self.unsafe = False
        self._control = control
        self._watched: dict[str, int] = {}
        self._gathering: dict[str, Gathers] = {}
        self._lost: Callable[[str, str], None] = lambda name, why: None

    @property
    def blind(self) -> bool:
        """Some transport has no file descriptor and must be asked."""
        return len(self._watched) < len(self.live)

    def start(self, pool: BlockPool, needed: Collection[str]) -> tuple[TransportOffer, ...]:
        """Start those that can work here; the others are left out, if any can of those that are needed.

        Raises:
            TransportUnavailable: None can of those; the reason of the first.
        """
        offers: list[TransportOffer] = []
        refusals: list[TransportUnavailable] = []
        for name, transport in list(self.live.items()):
            try:
                offers.append(_start(name, transport, pool))
            except TransportUnavailable as error:
                log.warning("transport left out: %s", error)
                self.left_out[name] = _reason(error)
                if name in needed:
                    refusals.append(error)
                del self.live[name]
                transport.close()
        if self.live.keys().isdisjoint(needed):
            raise refusals[0]
        return tuple(offers)

    def require(self, policy: Policy) -> None:
        """Check that all the transports a policy names are here and work.

        Raises:
            TransportUnavailable: One is not; says how to have it.
        """
        for name in policy.names:
            if name in self.live:
                continue
            if name in self.left_out:
                raise TransportUnavailable(name, "was left out: " + self.left_out[name])
            registry.find(name)  # not loaded: nobody may make this thread import something
            here = f"standby=({name!r},) has it loaded from the start; loaded are: {', '.join(self.live)}"
            raise TransportUnavailable(name, "is not loaded by this endpoint", here)

    def watch(self, lost: Callable[[str, str], None]) -> None:
        """Wake the driver when there is news, and call `lost` with (name, why) when a transport was given up."""
        self._lost = lost
        self._gathering = {name: each for name, each in self.live.items() if isinstance(each, Gathers)}
        for name, transport in self.live.items():
            fd = transport.fileno()
            if fd is not None:
                self._control.watch(fd)
                self._watched[name] = fd

    def news(self, readable: Collection[int] | None = None) -> Iterator[tuple[str, Completion]]:
        """What has happened since the last call.

        Args:
            readable: Of the transports with a file descriptor only those are asked whose is among these; None asks all.
        """
        for name, transport in list(self.live.items()):
            fd = self._watched.get(name)
            if readable is not None and fd is not None and fd not in readable:
                continue
            try:
                completions = transport.completions()
            except Exception as error:  # a transport's own code may raise anything
                self.give_up(name, error)
                continue
            for completion in completions:
                yield name, completion

    def flush(self) -> None:
        """Let those that gather writes send them."""
        for name, transport in self._gathering.items():
            if name in self.live:
                try:
                    transport.flush()
                except Exception as error:  # a transport's own code may raise anything
                    self.give_up(name, error)

    def give_up(self, name: str, error: Exception) -> None:
        """Close a transport that broke. What is closed writes no byte and reads none: that ends all it was to do."""
        transport = self.live.pop(name, None)
        if transport is None:
            return
        why = f"given up after {type(error).__name__}: {error}"
        log.error("transport %s: %s", name, why)
        self.left_out[name] = why
        fd = self._watched.pop(name, None)
        if fd is not None:
            self._control.unwatch(fd)
        if not self.live:
            self.fatal = TransportUnavailable(name, why, "no other is left")
        try:
            transport.close()
        except Exception as worse:
            # Blocks it may still write to must not be given to anybody: nothing it was to do is reported as ended.
            self.unsafe = True
            self.fatal = TransportUnavailable(name, f"{why}; nor can it be closed: {worse!r}")
            return
        self._lost(name, why)

    def close(self) -> None:
        """Close all that are left."""
        for name, transport in self.live.items():
            try:
                transport.close()
            except Exception:  # the others must be closed too
                log.exception("transport %s did not close", name)
                self.unsafe = True


def load_transports(config: Config) -> Loaded:
    """The transports of the policy and those on standby, not started; those that cannot be loaded are left out.

    Raises:
        TransportUnavailable: None of the policy can be loaded; the reason of the first.
        InvalidInput: A transport does not take its settings.
    """
    loaded: dict[str, Transport] = {}
    refusals: dict[str, TransportUnavailable] = {}
    for name in config.names:
        try:
            loaded[name] = _make(name, config)
        except TransportUnavailable as error:
            refusals[name] = error
    if not loaded.keys() & set(config.policy.names):
        raise refusals[config.policy.names[0]]
    for refusal in refusals.values():
        log.warning("transport left out: %s", refusal)
    return Loaded(loaded, {name: _reason(refusal) for name, refusal in refusals.items()})


def _reason(error: TransportUnavailable) -> str:
    return f"{error.problem}; {error.hint}" if error.hint else error.problem


def _make(name: str, config: Config) -> Transport:
    options = config.options_of(name)
    try:
        return registry.load(name)(**options)
    except AddressError:
        raise
    except (TypeError, InvalidInput) as error:  # a setting it does not have, or not so
        raise InvalidInput(f"transport_options: {name!r}: {error}") from error


def _start(name: str, transport: Transport, pool: BlockPool) -> TransportOffer:
    transport.start()
    regions = tuple(transport.register(region) for region in pool.regions())
    return TransportOffer(name, transport.descriptor(), regions)
