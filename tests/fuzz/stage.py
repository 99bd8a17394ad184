"""Production cores in a world where packets are forged, repeated, reordered, spliced and lost: the target "core".

The world is the one the tests of the core use, with one difference: the end of a lease is a fence, as with tcp. So no
peer, whatever it says, gets a byte into blocks that are not leased to its part any more; `Host.store` asserts that.
"""

from __future__ import annotations

from collections.abc import Callable

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import Release
from kvpoll_fsm.core import CoreOptions, Do, EndpointCore, Transmit
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import DuplicateRoom
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.lessor import lease_of
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.messages import Frame, TransportOffer, decode, encode
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing.hosts import token_of
from kvpoll_fsm.testing.invariants import check_blocks, check_history, check_nothing_left, check_timers
from kvpoll_fsm.testing.world import SENDER, Delivery, Host, Job, World
from tests.fuzz.choices import Choices
from tests.fuzz.lies import forged, forged_message, not_meant

MAX_STEPS = 120
MAX_SEEN = 400
BLOCK_TOKENS = 2
LAYOUT = Layout(BLOCK_TOKENS, [Field("x", "int64"), Field("aux", "uint8", (3,), per_room=True)])
LIMITS = Limits(callers=6, rooms_per_peer=4, orphans=6, orphans_per_peer=3, orphan_s=20.0)
"""So small that a short run meets them."""
RESUMES = ("drain", "extend")
GATES_WITH_BLOCKS = (Gate.queued, Gate.moving, Gate.waiting_outcome)


def shared_by_rooms(host: Host) -> object:
    """What concerns all rooms of a peer when it changes: a message for one of them may have them reconsider."""
    return list(host.core.connections), host.core.breakers.key()


class Stage(World):
    """A world whose peers may lie. The laws of one endpoint alone hold all the same.

    Attributes:
        seen: Packets that were ever sent, the material of forgeries.
        opened: Rooms that hosts opened, by host; nobody else may make any.
        told: The history of each life as last seen.
    """

    def __init__(self, choices: Choices) -> None:
        super().__init__(checksums=choices.flag(), transports=choices.pick((("a",), ("a", "b"))))
        self.seen: list[Delivery] = []
        self.opened: list[tuple[str, RoomKey]] = []
        self.told: dict[tuple[bytes, RoomKey], tuple[KVPoll, ...]] = {}
        self.choices = choices

    # The world, but for what peers cannot be trusted with

    def settle(self, host: Host) -> None:
        for connection in host.core.connections.values():
            peer = self._peer_of(host, connection.number, connection.peer)
            if peer is not None:
                self.peers[host.incarnation, connection.number] = peer
        while effects := self._effects(host):
            for effect in effects:
                if isinstance(effect, Transmit):
                    self._transmit(host, effect)
                elif isinstance(effect, Do):
                    self._do(host, effect)
        self.check(host)

    def on_packet(self, delivery: Delivery) -> None:
        data = encode(delivery.packet)
        assert len(data) <= messages.MAX_PACKET_NBYTES
        assert decode(data) == delivery.packet, "what is sent would not be understood"
        super().on_packet(delivery)
        self.seen.append(delivery)
        del self.seen[:-MAX_SEEN]

    def _do(self, host: Host, effect: Do) -> None:
        if effect.key is not None and isinstance(effect.command, Release):
            host.end_tokens(effect.key, effect.command.part, fence=True)
        else:
            super()._do(host, effect)

    def perform(self, at: int = 0, *, ok: bool = True, loose: bool = False) -> None:
        fits = self.fits(self.jobs[at])
        super().perform(at, ok=ok and fits, loose=loose and fits)

    def fits(self, job: Job) -> bool:
        """A transport knows its tokens and their ranges, whatever a grant says."""
        if job.target is None:
            return True
        peer = self.host_of(self.peers.get((self.hosts[job.host].incarnation, job.target.conn)))
        granted = peer.granted.get(token_of(job.target)) if peer is not None else None
        return peer is not None and granted is not None and job.command.tokens <= len(granted[2]) * peer.block_tokens

    def _arrive(self, host: Host, delivery: Delivery) -> None:
        bystanders = {key: host.core.sessions[key].key() for key in not_meant(host, delivery.packet)}
        shared = shared_by_rooms(host)
        super()._arrive(host, delivery)
        for key, before in bystanders.items():
            session = self.lives[host.incarnation, key]
            same = session.key() == before or shared_by_rooms(host) != shared
            assert same, f"{key} was changed by {delivery.packet}"

    # Laws

    def check(self, host: Host) -> None:
        """What no peer can break."""
        check_blocks(host)
        core = host.core
        for (incarnation, key), session in self.lives.items():
            if incarnation != host.incarnation:
                continue
            check_timers(host, key)
            check_history(key, session)
            history, before = tuple(session.history), self.told.get((incarnation, key), ())
            assert history[: len(before)] == before, f"{key} forgot {before}"
            assert not (before and before[-1].is_terminal and history != before), f"{key} left {before[-1]}"
            self.told[incarnation, key] = history
        for key, session in core.sessions.items():
            assert (host.incarnation, key) in self.lives, f"{key} was opened by nobody"
            if isinstance(session, ReceiverSession) and session.gate in GATES_WITH_BLOCKS and not session.options.dummy:
                assert core.accounts.holds(lease_of(key, session.part)), f"{key} is live and lost its blocks"
        connections = core.connections.values()
        parked, dismissed = core.parking.key()
        assert len(parked) <= LIMITS.orphans
        assert len(dismissed) <= LIMITS.orphans_per_peer * len(core.connections)
        assert sum(not connection.outgoing for connection in connections) <= LIMITS.callers
        assert len(core.refused) <= 40, "refusals are counted by reason, and reasons are few"
        for connection in connections:
            assert len(connection.channel.unacked) <= connection.channel.limit
            assert connection.channel.acked <= connection.channel.sent

    # Steps

    def step(self) -> None:
        self.choices.pick(STEPS)(self)

    def go_on(self) -> None:
        """What would happen next by itself, some steps of it."""
        for _ in range(1 + self.choices.below(24)):
            if not self.next():
                return

    def next(self) -> bool:
        """The oldest of what is pending happens, if anything is."""
        if self.network:
            self.deliver()
        elif self.jobs:
            self.perform()
        else:
            return self._owed()
        return True

    def shuffle(self) -> None:
        """A packet overtakes, comes twice or is lost."""
        if self.network:
            keep, lose = self.choices.pick(((False, False), (True, False), (False, True)))
            self.deliver(self.choices.below(len(self.network)), keep=keep, lose=lose)

    def work(self) -> None:
        """Some work is done, well or badly."""
        if self.jobs:
            ok, loose = self.choices.pick(((True, False), (False, False), (False, True)))
            self.perform(self.choices.below(len(self.jobs)), ok=ok, loose=loose)

    def replay(self) -> None:
        """A packet of old comes again."""
        if self.seen:
            self.network.insert(0, self.choices.pick(self.seen))
            self.deliver()

    def forge(self) -> None:
        """A packet comes that differs from a genuine one in one place."""
        if self.seen:
            genuine = self.choices.pick(self.seen)
            packet = forged(genuine.packet, self.choices)
            if packet is not None:
                where = (genuine.source, genuine.dest, genuine.origin, packet, genuine.answers)
                self.network.insert(0, Delivery(*where))
                self.deliver()

    def lie(self) -> None:
        """An endpoint says, in its turn, what it would say at another time, or nearly that."""
        said = [message for one in self.seen if isinstance(one.packet, Frame) for message in one.packet.messages]
        host = self.choices.pick(list(self.hosts.values()))
        known = [conn for conn in host.core.connections.values() if conn.channel.target is not None]
        if not (said and known):
            return
        connection = self.choices.pick(known)
        message = self.choices.pick(said)
        lie = forged_message(message, self.choices) if self.choices.flag() else message
        if lie is None:
            return
        connection.channel.push(lie)
        for frame in connection.channel.flush():
            delivery = self.delivery(host, connection.number, frame)
            if delivery is not None:
                self.network.append(delivery)

    def time(self) -> None:
        """A timer fires."""
        timers = [(host.name, *timer) for host in self.hosts.values() for timer in host.timers if timer[1] != "room"]
        if timers and self.choices.flag(4):
            name, key, timer = self.choices.pick(timers)
            self.fire(name, key, timer, host_alive=self.choices.flag())

    def ticks(self) -> None:
        """A resend or heartbeat tick passes somewhere."""
        self.tick(self.choices.pick(list(self.hosts)), heartbeat=self.choices.flag())

    def late_writes(self) -> None:
        """What nobody waits for lands, or can land no more."""
        if self.late:
            at = self.choices.below(len(self.late))
            if self.choices.flag():
                self.quiesce(at)
            else:
                self.land(at)

    def host_acts(self) -> None:
        """A host gives a room up, clears it, or opens it again."""
        name, key = self.choices.pick(self.opened)
        host = self.hosts[name]
        if self.choices.flag() or (host.incarnation, key) not in self.lives or not host.core.is_open(key):
            return
        if self.choices.flag():
            self.feed(name, key, inputs.AbortRoom("given up"))
        else:
            self.clear(name, key)
            self.open(name, key.room, key.rank)

    def restart(self) -> None:
        """An endpoint dies and starts again."""
        name = self.choices.pick(list(self.hosts))
        if self.choices.flag(8):
            self.start(name)

    # Opening and ending

    def start(self, name: str) -> None:
        """Start an endpoint, or start it again."""
        self.drop_host(name)
        offers = tuple(TransportOffer(transport, name.encode()) for transport in self.transports)
        blocks = 1 + self.choices.below(4)
        options = CoreOptions(
            self._next().to_bytes(16, "big"), LAYOUT, offers, blocks, deadlines=self.deadlines, limits=LIMITS
        )
        self.hosts[name] = Host(name, EndpointCore(options))

    def open(self, name: str, room: int, rank: int) -> None:
        try:
            if name == SENDER:
                key = self.open_sender(room, self.choices.pick((len(self.hosts) - 1, None)))
                total = 1 + self.choices.below(12)
                self.supply(key, total, self.choices.below(total) if self.choices.flag(4) else total)
            else:
                most = self.hosts[name].core.options.blocks
                blocks = 0 if self.choices.flag(8) else 1 + self.choices.below(most)
                ranks, resume = len(self.hosts) - 1, self.choices.pick(RESUMES)
                key = self.open_receiver(name, room, rank, ranks, blocks, resume)
        except DuplicateRoom:
            return
        self.opened.append((name, key))

    def come_to_an_end(self) -> None:
        """Nobody lies any more: every room ends by itself, and once it is cleared nothing of it is left."""
        for _ in range(20):
            self.calm()
            live = [
                (host.name, key)
                for host in self.hosts.values()
                for key, session in host.core.sessions.items()
                if not session.state.is_terminal
            ]
            if not live:
                break
            for name, key in live:
                session = self.session(name, key)  # what was said last holds, and it was perhaps a lie
                timer = "room" if session._kept_waiting(session.gate) else "gate"
                if (key, timer) in self.hosts[name].timers:
                    self.fire(name, key, timer)
        assert not live, f"no deadline ends {self.gates()}"
        for host in self.hosts.values():
            for key in list(host.core.sessions):
                self.clear(host.name, key)
            for conn in list(host.core.connections):
                host.core.end(conn, "the peer is gone")
            self.settle(host)
        self.network.clear()
        self.calm()
        check_nothing_left(self)

    def calm(self) -> None:
        """What is pending happens in order; quarantines end by force."""
        for _ in range(2_000):
            if self.network or self.jobs:
                self.next()
            elif self.late:
                self.quiesce()
            elif forced := [(h.name, *t) for h in self.hosts.values() for t in h.timers if t[1] == "quarantine"]:
                self.fire(*forced[0])
            elif not self._owed():
                return
        raise AssertionError(f"not at rest: {self.network[:3]} {self.jobs[:3]}")

    def still_works(self) -> None:
        """A receiver that comes now is served."""
        name, room = "newcomer", 99
        self.start(name)
        key = self.open_sender(room, 1)
        self.supply(key, 5)
        there = self.open_receiver(name, room)
        self.calm()
        states = [self.session(SENDER, key).state, self.session(name, there).state]
        assert states == [KVPoll.Success, KVPoll.Success], self.gates()
        assert self.received(name, there) == [(room, token) for token in range(5)]


STEPS: tuple[Callable[[Stage], None], ...] = (
    Stage.go_on,
    Stage.lie,
    Stage.forge,
    Stage.go_on,
    Stage.replay,
    Stage.shuffle,
    Stage.work,
    Stage.time,
    Stage.ticks,
    Stage.late_writes,
    Stage.host_acts,
    Stage.restart,
    Stage.lie,
    Stage.go_on,
    Stage.forge,
    Stage.go_on,
)


def core(data: bytes) -> None:
    """Rooms between a sender and one or two receivers, every step of it chosen by `data`."""
    choices = Choices(data)
    stage = Stage(choices)
    names = [SENDER, *(f"r{rank}" for rank in range(1 + choices.below(2)))]
    for name in names:
        stage.start(name)
    for room in range(1, 2 + choices.below(2)):
        for rank, name in enumerate(names):
            stage.open(name, room, max(0, rank - 1))
    stage.go_on()
    for _ in range(MAX_STEPS):
        if not choices:
            break
        stage.step()
    stage.come_to_an_end()
    stage.still_works()
