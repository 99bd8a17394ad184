"""What rooms carry, and its digest. The same for every process."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

__all__ = ["FIELD_DTYPES", "digest", "make_arrays", "numpy_dtype"]

FIELD_DTYPES = {"bfloat16": "uint16"}
"""The numpy dtypes that stand in for those numpy has not."""


def numpy_dtype(field: dict[str, Any]) -> np.dtype[Any]:
    return np.dtype(FIELD_DTYPES.get(field["dtype"], field["dtype"]))


def make_arrays(fields: list[dict[str, Any]], seed: int, room: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random bits for each field, different for every room."""
    dice, arrays = np.random.default_rng([seed, room]), {}
    for field in fields:
        shape = (*field["shape"],) if field["per_room"] else (tokens, *field["shape"])
        dtype = numpy_dtype(field)
        bits = dice.bytes(int(np.prod(shape)) * dtype.itemsize)
        arrays[field["name"]] = np.frombuffer(bits, dtype).reshape(shape)
    return arrays


def digest(fields: list[dict[str, Any]], arrays: dict[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 over the fields in order, their shapes included."""
    hashed = hashlib.sha256()
    for field in fields:
        array = arrays[field["name"]]
        hashed.update(repr((field["name"], array.shape)).encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()
