"""One side of a transfer in a process of its own, for tests that stop or kill it.

Run as `child.py receiver FILE PORT` or `child.py writer`. Speaks JSON lines: what it offers or needs on
standard output and input; ends when its input does.
"""

from __future__ import annotations

import json
import mmap
import sys

from kvpoll_fsm.spi import MAX_TICKET_NBYTES, LeaseId, Range, Region, Write
from kvpoll_tcp import TcpTransport


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


def receive(path: str, port: int) -> None:
    with open(path, "r+b") as file:
        arena = mmap.mmap(file.fileno(), 0)
    transport = TcpTransport(data_ports=(port, port) if port else None)
    transport.start()
    region = transport.register(Region(0, memoryview(arena)))
    token = transport.grant(LeaseId("receiver", 1, 0, 1, 0), [Range(0, 0, len(arena))])
    say(descriptor=transport.descriptor().hex(), region=region.hex(), token=token.hex())
    sys.stdin.read()
    transport.close()
    arena.close()


def write() -> None:
    wanted = json.loads(sys.stdin.readline())
    transport = TcpTransport(buffer_nbytes=wanted["buffer_nbytes"])
    transport.start()
    transport.register(Region(0, memoryview(bytearray(b"\xaa" * MAX_TICKET_NBYTES))))
    link = transport.connect(bytes.fromhex(wanted["descriptor"]), [])
    for _ in range(4):
        link.submit([Write(0, 0, 0, MAX_TICKET_NBYTES)], bytes.fromhex(wanted["token"]))
    say(submitted=4)
    sys.stdin.read()
    transport.close()


if __name__ == "__main__":
    if sys.argv[1] == "receiver":
        receive(sys.argv[2], int(sys.argv[3]))
    else:
        write()
