"""Hosts: network namespaces with one network device each, whose other end we hold.

They have no name: they are gone with the last process and descriptor in them, however these end.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["NETWORK", "Host", "enter"]

T = TypeVar("T")
NETWORK = "10.177.0."
MTU = 1500
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI, IFF_UP = 0x1, 0x1000, 0x1
SET_ADDRESS, SET_NETMASK, SET_MTU, SET_FLAGS = 0x8916, 0x891C, 0x8922, 0x8914
_libc = ctypes.CDLL(None, use_errno=True)


class Host:
    """A namespace with one network device.

    Attributes:
        address: Its IPv4 address.
        namespace: A path that other processes can `enter`, as long as this one lives.
        tun: The other end of its network device.
    """

    def __init__(self, number: int) -> None:
        self.address = f"{NETWORK}{number + 1}"
        self._namespace_fd, self.tun = _in_a_thread(self._make)
        self.namespace = f"/proc/{os.getpid()}/fd/{self._namespace_fd}"

    def run(self, action: Callable[[], T]) -> T:
        """Act inside the namespace; a socket made there belongs to it for good."""

        def act() -> T:
            enter(self.namespace)
            return action()

        return _in_a_thread(act)

    def plug(self, plugged: bool = True) -> None:
        """Take the network device up or down."""
        self.run(lambda: _configure(b"tun0", SET_FLAGS, struct.pack("H", IFF_UP if plugged else 0)))

    def close(self) -> None:
        """Let go of the namespace and its device."""
        os.close(self.tun)
        os.close(self._namespace_fd)

    def _make(self) -> tuple[int, int]:
        _check(_libc.unshare(CLONE_NEWNET))
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
            _configure(b"tun0", SET_ADDRESS, _inet(self.address))
            _configure(b"tun0", SET_NETMASK, _inet("255.255.255.0"))
            _configure(b"tun0", SET_MTU, struct.pack("i", MTU))
            for name in (b"lo", b"tun0"):
                _configure(name, SET_FLAGS, struct.pack("H", IFF_UP))
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), tun
        except OSError:
            os.close(tun)
            raise


def enter(namespace: str) -> None:
    """Move the calling thread into a network namespace; what it starts from now on is there too."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, CLONE_NEWNET))
    finally:
        os.close(fd)


def _in_a_thread(action: Callable[[], T]) -> T:
    """Act in a thread that may change its namespace, because it ends with that."""
    done: list[T] = []
    failed: list[BaseException] = []

    def act() -> None:
        try:
            done.append(action())
        except BaseException as error:  # raised again where it was asked for
            failed.append(error)

    thread = threading.Thread(target=act, name="in a namespace")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def _check(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _configure(device: bytes, request: int, value: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, request, struct.pack("16s24s", device, value))


def _inet(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
