"""How a frame lies on a stream: its length (4 bytes, little-endian), then itself."""

from __future__ import annotations

import struct

__all__ = ["LENGTH", "pack"]

LENGTH = struct.Struct("<I")


def pack(frame: bytes) -> bytes:
    """A frame as it travels."""
    return LENGTH.pack(len(frame)) + frame
