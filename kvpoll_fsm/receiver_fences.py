"""How a receiver's room sees that nothing lands any more: on one transport while it lives, on all after its end."""

from __future__ import annotations

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import Fence, Release
from kvpoll_fsm.receiver_blocks import ASKED, NONE_LOOSE, ReceiverBlocks
from kvpoll_fsm.session import QUARANTINE_TIMER

__all__ = ["ReceiverFences"]

_OFFERED = ("offered", "withdrawing")


class ReceiverFences(ReceiverBlocks):
    """What `ReceiverSession` knows of writes that may land still."""

    __slots__ = ()

    # While the room lives: one transport

    def _fence_part(self, conn: int, message: messages.FencePart) -> None:
        """What failed on one transport must not land any more, so that the part may come by another or once more."""
        self._keep_grant()
        if self._phase != "offered" or message.part != self.part:
            return  # a peer by the rules asks nothing of the kind
        self._fencing = {**self._fencing, message.transport: message.attempt}
        self._do(Fence(self.part, force=True, transport=message.transport))

    def _fenced_alone(self, event: inputs.Fenced) -> None:
        """Said even after the end: the sender knows then that nothing is on its way, and says so in turn."""
        attempt = self._fencing.get(event.transport)
        self._fencing = {name: tried for name, tried in self._fencing.items() if name != event.transport}
        if attempt is None or event.part != self.part or self._grant is None:
            return
        if event.transport in self._grant.transports:
            self._grant = self._grant.with_token(event.transport, event.token)
        told = messages.PartFenced(
            part=event.part, transport=event.transport, attempt=attempt, token=event.token, **self._ids()
        )
        self._send(self.options.conn, told)

    # After its end: all of them

    def _on_failed(self) -> None:
        if self._phase in ASKED:
            self._give_up_asking()
        if self._second.phase == "asked":
            self._give_up_second()
        if self._phase in _OFFERED:
            self._quarantine(self.part)
        if self._second.grant is not None:  # in use, if the present part has its outcome by now
            self._quarantine(self.part + 1)
        self._settle()

    def _quarantine(self, part: int) -> None:
        """The sender may be writing to the blocks of this part."""
        self._loose |= {part}
        self._do(Fence(part, force=False))
        self._arm(QUARANTINE_TIMER, self.deadlines.quarantine_max_s)

    def _settle(self) -> None:
        """After the end: free the blocks nothing writes to or reads from any more."""
        if self._job:
            return
        if self._grant is not None and self.part not in self._loose:
            self._grant = None
            self._do(Release(self.part))
        if self._second.grant is not None and self.part + 1 not in self._loose:
            self._give_up_second()
        if self._behind is not None:
            self._do(Release(self._behind.part))
            self._behind = None
        if self.options.resume != "manual" or self._cleared:
            self._release_held()

    def _now_quiescent(self) -> None:
        """Every write of this room has ended: by the sender's word, or by the fence."""
        self._loose = NONE_LOOSE
        self._disarm(QUARANTINE_TIMER)
        self._settle()

    def _fenced(self, event: inputs.Fenced) -> None:
        if event.transport:
            return self._fenced_alone(event)
        if event.part not in self._loose:
            return
        self._loose -= {event.part}
        if not self._loose:
            self._send(self.options.conn, messages.Quiesced(**self._ids()))
            self._now_quiescent()

    def _quiesced(self, conn: int, message: messages.Quiesced) -> None:
        if self.state.is_terminal:
            self._now_quiescent()

    def _timer_fired(self, event: inputs.TimerFired) -> None:
        if event.name == QUARANTINE_TIMER and self._clocks.rings(event.name, event.epoch):
            for part in sorted(self._loose):
                self._do(Fence(part, force=True))
            return
        super()._timer_fired(event)
