"""Registered memory as peers know it, and what is refused of it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import msgspec

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import LeaseId, Range, Region

__all__ = ["MAX_REGIONS", "check_ranges", "check_region", "describe", "read_regions"]

MAX_REGIONS = 1 << 16


class RegionDescriptor(msgspec.Struct, frozen=True, array_like=True):
    """A region as peers know it."""

    number: int
    nbytes: int


def describe(region: Region) -> bytes:
    """What peers are told of a region."""
    return msgspec.msgpack.encode(RegionDescriptor(region.number, len(region.buffer)))


def read_regions(descriptors: Sequence[bytes], transport: str) -> None:
    """See that these are regions that a peer's `describe` made.

    Raises:
        InvalidInput: One is not.
    """
    try:
        for descriptor in descriptors:
            msgspec.msgpack.decode(descriptor, type=RegionDescriptor)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise InvalidInput(f"not the descriptors of a {transport} transport: {error}") from error


def check_region(region: Region, taken: Container[int], most: int = MAX_REGIONS) -> None:
    """Refuse memory that cannot be written, or whose number cannot be used.

    Raises:
        InvalidInput: Not writable contiguous bytes, or a number that is taken or not below `most`.
    """
    buffer = region.buffer
    if buffer.readonly or not buffer.contiguous or buffer.format != "B" or buffer.ndim != 1:
        raise InvalidInput(f"region {region.number}: needs writable contiguous bytes, format 'B'")
    if not 0 <= region.number < most or region.number in taken:
        raise InvalidInput(f"region {region.number}: the number is taken, or not within 0 to {most - 1}")


def check_ranges(lease: LeaseId, ranges: Sequence[Range], regions: Mapping[int, memoryview]) -> None:
    """Refuse ranges that cannot be granted.

    Raises:
        InvalidInput: One is outside its region, or empty.
    """
    for each in ranges:
        size = len(regions.get(each.region, b""))
        if each.offset < 0 or each.nbytes < 1 or each.offset + each.nbytes > size:
            raise InvalidInput(f"{lease}: {each} is not within its region of {size} bytes")
