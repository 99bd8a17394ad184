"""kvpoll-fsm: the status of a transfer as an explicit state machine, fed by pluggable transports.

`import kvpoll_fsm` imports no torch, no zmq and no transport: the pure core is here at once, and the names
that touch the outside world are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvpoll_fsm.blocks import BlockLoad
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import (
    AddressError,
    BlockError,
    ChannelOverflow,
    ConfigError,
    DoubleFree,
    DuplicateRoom,
    EndpointClosed,
    Failure,
    FailureCode,
    ForeignBlock,
    ForkedError,
    IllegalTransition,
    InvalidInput,
    KvpollError,
    LayoutError,
    LayoutMismatch,
    LimitReached,
    MalformedMessage,
    MoverUnavailable,
    PolicyError,
    RequestTooLarge,
    TransferFailed,
    TransportUnavailable,
    UnknownRoom,
    UnsupportedVersion,
)
from kvpoll_fsm.events import (
    Aborted,
    Bootstrapped,
    DeadlinePassed,
    LifecycleEvent,
    PartDone,
    PeerLost,
    ProtocolError,
    Resumed,
)
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.lifecycle import Lifecycle, outcome
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.reduction import reduce_ranks
from kvpoll_fsm.session import PartRecord

if TYPE_CHECKING:
    from kvpoll_fsm.address import Address
    from kvpoll_fsm.arena import BlockPool
    from kvpoll_fsm.board import StatusBoard
    from kvpoll_fsm.endpoint import Endpoint
    from kvpoll_fsm.handles import Receiver, Sender
    from kvpoll_fsm.switching import TransportStatus

__version__ = "0.1.0"

_LAZY = {
    "Address": "address",
    "BlockPool": "arena",
    "Endpoint": "endpoint",
    "Receiver": "handles",
    "Sender": "handles",
    "StatusBoard": "board",
    "TransportStatus": "switching",
}
"""Names that touch sockets, threads or arrays, and the module each lives in."""

__all__ = [
    "Aborted",
    "Address",
    "AddressError",
    "BlockError",
    "BlockLoad",
    "BlockPool",
    "Bootstrapped",
    "ChannelOverflow",
    "ConfigError",
    "DeadlinePassed",
    "Deadlines",
    "DoubleFree",
    "DuplicateRoom",
    "Endpoint",
    "EndpointClosed",
    "Failure",
    "FailureCode",
    "Field",
    "ForeignBlock",
    "ForkedError",
    "Gate",
    "IllegalTransition",
    "InvalidInput",
    "KVPoll",
    "KvpollError",
    "Layout",
    "LayoutError",
    "LayoutMismatch",
    "LimitReached",
    "Limits",
    "Lifecycle",
    "LifecycleEvent",
    "MalformedMessage",
    "MoverUnavailable",
    "PartDone",
    "PartRecord",
    "PeerLost",
    "PolicyError",
    "ProtocolError",
    "Receiver",
    "RequestTooLarge",
    "Resumed",
    "Sender",
    "StatusBoard",
    "TransferFailed",
    "TransportStatus",
    "TransportUnavailable",
    "UnknownRoom",
    "UnsupportedVersion",
    "outcome",
    "reduce_ranks",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
