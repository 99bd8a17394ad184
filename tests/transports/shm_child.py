"""One side of a shm transfer in a process of its own, for tests that stop or kill it.

Run as `shm_child.py receiver FILE` or `shm_child.py writer`. Speaks JSON lines: what it offers or needs on standard
output and input; ends when its input does.
"""

from __future__ import annotations

import json
import mmap
import sys

from kvpoll_fsm.segment import Segment
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Failed, LeaseId, LinkDown, Range, Region, Write
from kvpoll_shm import ShmTransport


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


def receive(path: str) -> None:
    with open(path, "r+b") as file:
        arena = mmap.mmap(file.fileno(), 0)
    transport = ShmTransport()
    transport.start()
    region = transport.register(Region(0, memoryview(arena)))
    token = transport.grant(LeaseId("receiver", 1, 0, 1, 0), [Range(0, 0, len(arena))])
    say(descriptor=transport.descriptor().hex(), region=region.hex(), token=token.hex())
    sys.stdin.read()
    transport.close()
    arena.close()


def write() -> None:
    wanted = json.loads(sys.stdin.readline())
    segment = Segment(MAX_TICKET_NBYTES)
    segment.buffer[:] = b"\xaa" * MAX_TICKET_NBYTES
    transport = ShmTransport()
    transport.start()
    transport.register(Region(0, segment.buffer, segment.fd))
    link = transport.connect(bytes.fromhex(wanted["descriptor"]), [])
    for _ in range(4):
        link.submit([Write(0, 0, 0, wanted["nbytes"])], bytes.fromhex(wanted["token"]))
    say(submitted=4)
    ends: list[str] = []
    while not ends:
        ends = [str(each) for each in transport.completions() if isinstance(each, (LinkDown, Failed))]
    say(ended=ends)
    sys.stdin.read()
    transport.close()


if __name__ == "__main__":
    if sys.argv[1] == "receiver":
        receive(sys.argv[2])
    else:
        write()
