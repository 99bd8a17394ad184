"""What of Mooncake is on this machine, and what to tell somebody who lacks it. Nothing of it is imported here."""

from __future__ import annotations

import ctypes
from importlib import metadata
from pathlib import Path

from kvpoll_fsm.errors import TransportUnavailable
from kvpoll_mooncake.settings import MooncakeSettings

__all__ = ["has_cuda", "protocol_of", "require_one_wheel", "unimportable"]

PLAIN, CUDA = "mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"
LIBRARIES = "apt-get install libibverbs1 librdmacm1 libnuma1 libcurl4"
_DEVICES = Path("/sys/class/infiniband")


def has_cuda() -> bool:
    """This machine has the driver that the CUDA wheel needs."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def which_extra() -> str:
    """The install line that fits this machine."""
    if has_cuda():
        return (
            "pip install 'kvpoll-fsm[mooncake-cuda]' (this machine has CUDA; [mooncake] works too, without device "
            "memory; never both)"
        )
    return "pip install 'kvpoll-fsm[mooncake]' (this machine has no CUDA; never [mooncake-cuda] as well)"


def _wheels() -> list[str]:
    found = []
    for name in (PLAIN, CUDA):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def require_one_wheel() -> None:
    """See that exactly one of the two wheels is installed.

    Raises:
        TransportUnavailable: None is, or both, which overwrite each other's files.
    """
    wheels = _wheels()
    if not wheels:
        raise TransportUnavailable("mooncake", "Mooncake is not installed", which_extra())
    if len(wheels) == 2:
        problem = f"{PLAIN} and {CUDA} are both installed, and own the same files"
        keep = CUDA if has_cuda() else PLAIN
        hint = f"pip uninstall -y {PLAIN} {CUDA} && pip install {keep}"
        raise TransportUnavailable("mooncake", problem, hint)


def unimportable(problem: str) -> TransportUnavailable:
    """What to say of an ImportError."""
    hint = which_extra()
    if "libcuda" in problem or "libcudart" in problem:
        hint = f"this machine lacks CUDA: pip uninstall -y {CUDA} && pip install 'kvpoll-fsm[mooncake]'"
    elif ".so" in problem:
        hint = LIBRARIES
    return TransportUnavailable("mooncake", f"Mooncake cannot be imported: {problem}", hint)


def rdma_devices() -> list[str]:
    """The RDMA devices of this machine."""
    try:
        return sorted(device.name for device in _DEVICES.iterdir())
    except OSError:
        return []


def protocol_of(settings: MooncakeSettings) -> str:
    """What to force Mooncake to use, which left alone takes TCP where RDMA was asked for.

    Raises:
        TransportUnavailable: RDMA is required, and something is missing.
    """
    if settings.protocol == "tcp":
        return "tcp"
    devices = rdma_devices()
    wanted = [name for name in settings.device.split(",") if name]
    absent = [name for name in wanted if name not in devices]
    if settings.protocol == "auto":
        return "rdma" if devices and not absent else "tcp"
    if not devices:
        problem = f"protocol='rdma', and there is no RDMA device under {_DEVICES}"
        raise TransportUnavailable("mooncake", problem, "needs a network card with its driver; or protocol='tcp'")
    if absent:
        problem = f"device={settings.device!r}: {', '.join(absent)} is not among {', '.join(devices)}"
        raise TransportUnavailable("mooncake", problem, "name others, or leave device= empty")
    return "rdma"
