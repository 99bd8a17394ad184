"""Arrays at the border: numpy's and torch's, as bytes and back.

torch is used where the program has imported it, and never imported from here.
numpy has no bfloat16 and no float8 of its own: they come and go as raw bits, `uint16` and `uint8` of the same
shape. Arrays of the ml_dtypes package, which names them, are taken as well.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvpoll_fsm.errors import InvalidInput, LayoutError
from kvpoll_fsm.layout import Field, Layout

__all__ = ["Array", "Kind", "arena_bytes", "as_bytes", "empty", "require_fields", "resolve_kind", "wrap"]

Array = Any
"""A `numpy.ndarray` or a `torch.Tensor`."""

Kind = Literal["auto", "numpy", "torch"]

_RAW = {
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
}
"""The numpy dtypes that stand in for those numpy has not."""

_ALIGNMENT = 64
"""Bytes; what torch aligns its own memory to."""


def resolve_kind(kind: str) -> Literal["numpy", "torch"]:
    """Which library's arrays to make; "auto" is torch if the program has imported it, else numpy.

    Raises:
        InvalidInput: Another word, or torch where it has not been imported.
    """
    if kind == "numpy" or (kind == "auto" and _torch() is None):
        return "numpy"
    if kind not in ("auto", "torch"):
        raise InvalidInput(f"arrays={kind!r}: write 'auto', 'numpy' or 'torch'")
    if _torch() is None:
        raise InvalidInput("arrays='torch', but torch has not been imported: import it first, or use 'numpy'")
    return "torch"


def require_fields(layout: Layout, data: Mapping[str, Array]) -> None:
    """Check that there is an array for every field and none besides.

    Raises:
        InvalidInput: Not a mapping.
        LayoutError: Names the field that is missing or unknown.
    """
    if not isinstance(data, Mapping):
        raise InvalidInput(f"a {_kind_of(data)} where a dict of field name to array is wanted")
    names = [field.name for field in layout.fields]
    for field in layout.fields:
        if field.name not in data:
            raise LayoutError(field.name, f"missing; the layout declares {field}")
    for name in data:
        if name not in names:
            raise LayoutError(str(name), f"not in the layout, which has: {', '.join(names)}")


def as_bytes(field: Field, array: Array, tokens: int | None = None) -> memoryview:
    """The bytes of an array of one field, without copying where the array is C-contiguous.

    Of an array that is not (a slice of columns, a transpose, a lazy conjugate), a contiguous copy is made and
    the bytes are that copy's. The view keeps the memory alive. It is read-only if the array is.

    Args:
        field: What the array is to hold.
        array: Of shape `[tokens, *shape_per_token]`, or `shape_per_token` for a per-room field.
        tokens: How many tokens it must hold; None takes any number.

    Raises:
        LayoutError: Another dtype or shape, device memory, or no array at all.
    """
    _require_fit(field, array, () if field.per_room else ("tokens" if tokens is None else tokens,))
    return _flat(array)


def arena_bytes(field: Field, array: Array, block_tokens: int, blocks: int | None = None) -> memoryview:
    """The bytes of an engine's own arena for one field, never a copy, writable.

    Args:
        field: What the arena is to hold.
        array: Of shape `[blocks, block_tokens, *shape_per_token]`, or `[blocks, *shape_per_token]` for a
            per-room field.
        block_tokens: Tokens per block.
        blocks: How many blocks it must have; None takes any number.

    Raises:
        LayoutError: As `as_bytes`; also an array that is not C-contiguous or not writable.
    """
    count = "blocks" if blocks is None else blocks
    _require_fit(field, array, (count,) if field.per_room else (count, block_tokens))
    if not _is_contiguous(array):
        raise LayoutError(
            field.name,
            f"{_describe(array)} is not C-contiguous: transfers write into it, so a copy would not do; "
            "allocate it contiguously, token-major",
        )
    data = _flat(array)
    if data.readonly:
        raise LayoutError(field.name, f"{_describe(array)} is read-only, but transfers write into it")
    return data


def wrap(field: Field, data: memoryview, lead: tuple[int, ...], kind: Kind = "numpy") -> Array:
    """An array of shape `[*lead, *shape_per_token]` over writable bytes, which it keeps alive.

    Raises:
        LayoutError: This torch does not know the field's dtype.
    """
    flat = np.frombuffer(data, np.uint8)
    shape = (*lead, *field.shape_per_token)
    if resolve_kind(kind) == "torch":
        return _require_torch().from_numpy(flat).view(_torch_dtype(field)).view(shape)
    return flat.view(_RAW.get(field.dtype, field.dtype)).reshape(shape)


def empty(field: Field, tokens: int, kind: Kind = "auto") -> Array:
    """An array for `tokens` tokens of a field (or one per-room value), its content undefined.

    Raises:
        InvalidInput: More than memory can hold.
        LayoutError: This torch does not know the field's dtype.
    """
    lead = () if field.per_room else (tokens,)
    # numpy's allocator asks for huge pages, torch's does not: filling new memory is four times as fast.
    return wrap(field, _aligned(field.block_nbytes(tokens)).data, lead, kind)


def _aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    try:
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    except (MemoryError, ValueError, OverflowError):
        raise InvalidInput(f"no memory for an array of {nbytes} bytes") from None
    start = -raw.__array_interface__["data"][0] % _ALIGNMENT
    return raw[start : start + nbytes]


def _torch() -> ModuleType | None:
    """torch, if the program has imported it to the point where it has tensors."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "Tensor") and hasattr(torch, "from_numpy") else None


def _require_torch() -> ModuleType:
    resolve_kind("torch")
    return sys.modules["torch"]


def _torch_dtype(field: Field) -> Any:
    dtype = getattr(_require_torch(), field.dtype, None)
    if dtype is None:
        raise LayoutError(field.name, f"this version of torch has no {field.dtype}: use arrays='numpy'")
    return dtype


def _is_tensor(array: Array) -> bool:
    torch = _torch()
    return torch is not None and isinstance(array, torch.Tensor)


def _kind_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _dtype_name(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.") if _is_tensor(array) else str(array.dtype.name)


def _describe(array: Array) -> str:
    return f"{'torch' if _is_tensor(array) else 'numpy'} {_dtype_name(array)}{list(array.shape)}"


def _require_fit(field: Field, array: Array, lead: tuple[int | str, ...]) -> None:
    """Raise LayoutError unless the array has the field's dtype and shape and lies in host memory.

    A size of `lead` that is a word may be any number.
    """
    shape = (*lead, *field.shape_per_token)
    if isinstance(array, np.ndarray):
        misfit = _numpy_misfit(field, array)
    elif _is_tensor(array):
        misfit = _tensor_misfit(field, array)
    else:
        given = _kind_of(array)
        raise LayoutError(field.name, f"a {given} where a numpy array or torch tensor is wanted: convert it")
    problem = misfit or _shape_misfit(array.shape, shape)
    if problem:
        wanted = f"{field.dtype}[{', '.join(map(str, shape))}]"
        raise LayoutError(field.name, f"given {_describe(array)}, wanted {wanted}: {problem}")


def _tensor_misfit(field: Field, tensor: Any) -> str:
    """What is wrong with a tensor's memory or dtype and how to mend it, or nothing."""
    if tensor.device.type != "cpu":
        return f"it is on {tensor.device}, and device memory is not supported here yet; pass .cpu()"
    if _dtype_name(tensor) != field.dtype:
        return f"convert it with .to(torch.{field.dtype})"
    return "" if str(tensor.layout) == "torch.strided" else "it is sparse; pass .to_dense()"


def _numpy_misfit(field: Field, array: npt.NDArray[Any]) -> str:
    raw, dtype = _RAW.get(field.dtype), array.dtype
    if dtype.isnative and dtype.name in (field.dtype, raw):
        return ""
    if raw:
        return f"numpy has no {field.dtype}; pass its bits as a numpy.{raw} array of the same shape"
    return f"convert it with .astype('{field.dtype}')"


def _shape_misfit(given: tuple[int, ...], wanted: tuple[int | str, ...]) -> str:
    if given == wanted:
        return ""
    fits = len(given) == len(wanted) and all(isinstance(w, str) or g == w for g, w in zip(given, wanted, strict=True))
    return "" if fits else "give it the wanted shape"


def _is_contiguous(array: Array) -> bool:
    if _is_tensor(array):
        return bool(array.is_contiguous() and not array.is_conj() and not array.is_neg())
    return bool(array.flags.c_contiguous)


def _flat(array: Array) -> memoryview:
    """The array's bytes in C order. Copies only what is not contiguous."""
    if _is_tensor(array):
        # A lazy conjugate or negative has bits that are not its values; the resolve_ calls copy only those.
        tensor = array.detach().resolve_conj().resolve_neg().contiguous()
        array = tensor.reshape(-1).view(_require_torch().uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
