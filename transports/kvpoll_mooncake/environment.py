"""The environment that Mooncake reads its settings from, when it is imported."""

from __future__ import annotations

from collections.abc import Mapping

from kvpoll_mooncake.frames import P2P
from kvpoll_mooncake.settings import MooncakeSettings, is_ipv6

__all__ = ["problem_of", "variables"]


def problem_of(environ: Mapping[str, str]) -> str:
    """What of this process's environment makes Mooncake unsafe, or nothing."""
    if environ.get("MC_TCP_PROTO", "0") not in ("", "0"):
        return "MC_TCP_PROTO is set: that framing is not acknowledged, and delivers wrong bytes; unset it"
    return ""


def variables(settings: MooncakeSettings, protocol: str, host: str) -> dict[str, str]:
    """What is set for an engine.

    Args:
        settings: The transport's.
        protocol: "tcp" or "rdma".
        host: Where peers reach this machine, in numbers.
    """
    chosen: dict[str, object] = {
        "MC_FORCE_TCP": 1 if protocol == "tcp" else None,
        "MC_FORCE_HCA": 1 if protocol == "rdma" else None,
        "MC_MIN_RPC_PORT": settings.engine_ports[0],
        "MC_MAX_RPC_PORT": settings.engine_ports[1],
        "MC_TRANSFER_TIMEOUT": settings.transfer_timeout_s,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": settings.progress_timeout_s,
        "MC_TCP_STATUS_TIMEOUT_SEC": settings.progress_timeout_s,
        "MC_TCP_SLICE_SIZE": settings.slice_nbytes,
        "MC_TCP_LANES_PER_PEER": settings.lanes,
        "MC_GID_INDEX": settings.gid_index,
        "MC_IB_PORT": settings.ib_port,
        "MC_IB_TC": settings.traffic_class,
        "MC_IB_SL": settings.service_level,
        "MC_MTU": settings.mtu,
        "MC_SLICE_SIZE": settings.rdma_slice_nbytes,
        "MC_RETRY_CNT": settings.retry_count,
        "MC_USE_IPV6": 1 if is_ipv6(host) else None,
        # What servers tell peers; else it is the address of the first network interface that comes up.
        "MC_TCP_BIND_ADDRESS": None if settings.metadata == P2P else host,
    }
    return {name: str(value) for name, value in chosen.items() if value is not None}
