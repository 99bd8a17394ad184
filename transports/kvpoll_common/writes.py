"""What a link refuses to send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Write

__all__ = ["check_writes"]

_MAX_OFFSET = (1 << 63) - 1


def check_writes(writes: Sequence[Write], sources: Mapping[int, memoryview], max_entries: int) -> int:
    """Refuse writes that cannot be sent. Whether they may land is for the receiver to say.

    Returns:
        How many bytes they have in all.

    Raises:
        InvalidInput: Says which write is wrong.
    """
    if not 0 < len(writes) <= max_entries:
        raise InvalidInput(f"{len(writes)} writes under one ticket: 1 to {max_entries} are possible")
    total = 0
    sizes = {region: len(source) for region, source in sources.items()}
    for write in writes:
        nbytes, start = write.nbytes, write.src_offset
        size = sizes.get(write.region)
        if size is None:
            raise InvalidInput(f"{write}: region {write.region} is not registered")
        if nbytes < 1 or start < 0 or start + nbytes > size:
            raise InvalidInput(f"{write}: the source's region has bytes 0 to {size}")
        if not 0 <= write.dst_offset <= _MAX_OFFSET - nbytes:
            raise InvalidInput(f"{write}: impossible destination")
        total += nbytes
    if total > MAX_TICKET_NBYTES:
        raise InvalidInput(f"{total} bytes under one ticket: at most {MAX_TICKET_NBYTES} are possible")
    return total
