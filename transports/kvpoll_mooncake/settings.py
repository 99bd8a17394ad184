"""The settings of the transport, checked before anything is started."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from kvpoll_common.addresses import require_reachable, split_advertised
from kvpoll_fsm.address import hide_passwords
from kvpoll_fsm.errors import InvalidInput
from kvpoll_mooncake.frames import P2P

__all__ = ["MooncakeSettings", "is_ipv6"]

_URL = re.compile(r"((?:http|https|etcd)://)(?:[^\s/]*@)?([^\s/@?#]+(?:/[^\s@?#]*)?)(?:\?[^\s@]*)?")
_DEVICES = re.compile(r"[\w.,-]*")


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """How a `MooncakeTransport` listens, what it asks of Mooncake, and when it gives up on a peer.

    Attributes:
        host: The address to listen on, IPv4 or IPv6, or a name that stands for one of this machine's. Mooncake itself
            listens on every address of the machine.
        advertise: Where peers reach us, as `host`, `host:port` or `[IPv6]:port`, if that is another address. Needed
            if `host` is a wildcard.
        data_ports: The first and the last port to try for the adapter's own port; None takes any free one.
        engine_ports: The first and the last port that Mooncake's engines try for theirs.
        metadata: How Mooncake's engines find each other: "P2PHANDSHAKE" (directly), "http://..." or "etcd://...".
        protocol: "tcp", "rdma" (or the transport is unavailable), or "auto": rdma where there is a device for it.
        engine: "child" (processes that can be killed), "host" (threads of this process, for memory that another
            process cannot be given), or "auto": child, unless a region is such memory.
        device: Names of RDMA devices, with commas between; empty leaves it to Mooncake.
        gid_index: Which GID of the port RDMA uses; None leaves it to Mooncake, as with the next six.
        ib_port: Port of the RDMA device.
        traffic_class: Of RDMA packets.
        service_level: Of RDMA packets.
        mtu: Of RDMA, in bytes.
        rdma_slice_nbytes: Pieces that RDMA transfers are cut into.
        retry_count: How often RDMA tries again.
        slice_nbytes: Pieces that TCP transfers are cut into.
        lanes: TCP connections of Mooncake's to one peer.
        transfer_timeout_s: After which Mooncake gives a transfer up, in whole seconds.
        progress_timeout_s: After which Mooncake gives up a TCP connection that brings nothing, in whole seconds;
            at most half of `transfer_timeout_s`.
        stall_s: How long a transfer may make no progress before the process it runs in is killed.
        answer_s: How long the peer's adapter may leave a question unanswered.
        connect_s: Reaching the peer's adapter, and the mutual proof, on either side.
        probe_s: How long the peer's engine may leave a probe unanswered.
        engine_s: How long an engine may take to start.
        max_senders: Most peers that we send to at a time: each takes a process.
        max_connections: Most connections from peers' adapters at a time.
        max_strangers: Most of them that have not proved themselves yet; the oldest makes room.

    Raises:
        AddressError: A wildcard or multicast address nobody could connect to.
        InvalidInput: A setting out of its range.
    """

    host: str = "127.0.0.1"
    advertise: str | None = None
    data_ports: tuple[int, int] | None = None
    engine_ports: tuple[int, int] = (15000, 17000)
    metadata: str = P2P
    protocol: str = "auto"
    engine: str = "auto"
    device: str = ""
    gid_index: int | None = None
    ib_port: int | None = None
    traffic_class: int | None = None
    service_level: int | None = None
    mtu: int | None = None
    rdma_slice_nbytes: int | None = None
    retry_count: int | None = None
    slice_nbytes: int = 4 << 20
    lanes: int = 4
    transfer_timeout_s: int = 30
    progress_timeout_s: int = 5
    stall_s: float = 3.0
    answer_s: float = 3.0
    connect_s: float = 5.0
    probe_s: float = 3.0
    engine_s: float = 20.0
    max_senders: int = 16
    max_connections: int = 256
    max_strangers: int = 32

    def __post_init__(self) -> None:
        self._check_address()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidInput(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        for name, (kind, least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                if name in _OPTIONAL:
                    continue
                raise InvalidInput(f"{name}=None: give {kind.__name__} from {least:g} to {most:g}")
            if not _is_number(value, kind) or not least <= value <= most:
                raise InvalidInput(f"{name}={value!r}: give {kind.__name__} from {least:g} to {most:g}")
        if self.progress_timeout_s * 2 > self.transfer_timeout_s:
            # A transfer that Mooncake gives up first goes on all the same, and reads its source later.
            raise InvalidInput(
                f"progress_timeout_s={self.progress_timeout_s}: at most half of "
                f"transfer_timeout_s={self.transfer_timeout_s}"
            )
        if self.mtu is not None and self.mtu not in (512, 1024, 2048, 4096):
            raise InvalidInput(f"mtu={self.mtu}: choose one of 512, 1024, 2048, 4096")

    def _check_address(self) -> None:
        if not isinstance(self.host, str) or not isinstance(self.advertise, (str, type(None))):
            raise InvalidInput(f"host={self.host!r}, advertise={self.advertise!r}: give text")
        if self.advertise is None:
            require_reachable(self.host, "tell peers where with advertise=")
        else:
            require_reachable(split_advertised(self.advertise)[0], "advertise one that peers can reach")
        for name, ports in (("data_ports", self.data_ports), ("engine_ports", self.engine_ports)):
            if not _are_ports(ports) and not (name == "data_ports" and ports is None):
                raise InvalidInput(f"{name}={ports!r}: give (first, last) within 1 to 65535")
        if not isinstance(self.metadata, str) or (self.metadata != P2P and not _URL.fullmatch(self.metadata)):
            # Mooncake takes whatever it does not know for etcd, and dies of "redis://".
            raise InvalidInput(
                hide_passwords(f"metadata={self.metadata!r}: ")
                + f"give {P2P!r}, 'http://host:port/path' or 'etcd://host:port'"
            )
        if not isinstance(self.device, str) or not _DEVICES.fullmatch(self.device):
            raise InvalidInput(f"device={self.device!r}: give names of devices with commas between, or nothing")

    @property
    def directory(self) -> str:
        """How engines find each other, as peers may know it: without user, password and query."""
        url = _URL.fullmatch(self.metadata)
        return self.metadata if url is None else url[1] + url[2]


def is_ipv6(host: str) -> bool:
    """Whether it is an IPv6 address in numbers."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


_Kind = type[int] | type[float]
_COUNT: tuple[_Kind, float, float] = (int, 1, 1 << 16)
_SECONDS: tuple[_Kind, float, float] = (float, 0.01, 86_400)
_CHOICES = {"protocol": ("auto", "tcp", "rdma"), "engine": ("auto", "child", "host")}
_OPTIONAL = ("gid_index", "ib_port", "traffic_class", "service_level", "mtu", "rdma_slice_nbytes", "retry_count")
_RANGES: dict[str, tuple[_Kind, float, float]] = {
    "gid_index": (int, 0, 255),
    "ib_port": (int, 1, 255),
    "traffic_class": (int, 0, 255),
    "service_level": (int, 0, 15),
    "mtu": (int, 512, 4096),
    "rdma_slice_nbytes": (int, 4096, 1 << 30),
    "retry_count": (int, 0, 128),
    "slice_nbytes": (int, 4096, 1 << 30),
    "lanes": (int, 1, 64),
    "transfer_timeout_s": (int, 5, 3600),
    "progress_timeout_s": (int, 1, 1800),
    "stall_s": _SECONDS,
    "answer_s": _SECONDS,
    "connect_s": _SECONDS,
    "probe_s": _SECONDS,
    "engine_s": _SECONDS,
    "max_senders": _COUNT,
    "max_connections": _COUNT,
    "max_strangers": _COUNT,
}


def _is_number(value: object, kind: _Kind) -> bool:
    """Whether it is one of that kind; every int is a float too, and no bool is a number."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def _are_ports(value: object) -> bool:
    """Whether it is the first and the last port of a range."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(_is_number(port, int) for port in value):
        return False
    return bool(0 < value[0] <= value[1] < 1 << 16)
