"""A room's data, made from its number, and the SHA-256 of arrays; both step by step.

Each step takes about a millisecond, so that a process can look after its other rooms in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpoll_fsm.arrays import empty
from kvpoll_fsm.layout import ITEMSIZE, Field, Layout

__all__ = ["Arrays", "allocate", "fill", "hash_into"]

Arrays = dict[str, npt.NDArray[Any]]

STEP_NBYTES = 1 << 20


def allocate(layout: Layout, tokens: int) -> Arrays:
    """An array for every field; bfloat16 and float8 are raw bits."""
    return {field.name: empty(field, tokens, "numpy") for field in layout.fields}


def fill(layout: Layout, arrays: Arrays, room: int) -> Iterator[None]:
    """Fill the arrays with random values; the same for the same room."""
    for number, field in enumerate(layout.fields):
        bits = np.random.SFC64([room, number])
        data = _as_bytes(arrays[field.name])
        for start in range(0, data.nbytes, STEP_NBYTES):
            piece = data[start : start + STEP_NBYTES]
            piece[:] = bits.random_raw(-(-piece.nbytes // 8)).view(np.uint8)[: piece.nbytes]
            _make_finite(field, piece)
            yield


def hash_into(hashes: dict[str, str], arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[None]:
    """Put the SHA-256 of every array's bytes into `hashes`, by name, as 64 hexadecimal digits."""
    for name, array in arrays.items():
        digest = hashlib.sha256()
        data = _as_bytes(array)
        for start in range(0, data.nbytes, STEP_NBYTES):
            digest.update(data[start : start + STEP_NBYTES].data)
            yield
        hashes[name] = digest.hexdigest()


def _as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _make_finite(field: Field, piece: npt.NDArray[np.uint8]) -> None:
    """Clear the highest exponent bit of floats: what is left is no NaN, no infinity, and below 2."""
    if "float" in field.dtype:
        size = ITEMSIZE[field.dtype]
        words = piece.view(f"uint{8 * size}")
        words &= words.dtype.type((1 << (8 * size)) - 1 - (1 << (8 * size - 2)))
