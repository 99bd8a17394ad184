from __future__ import annotations

import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvpoll_fsm import arrays
from kvpoll_fsm.arrays import arena_bytes, as_bytes, empty, require_fields, resolve_kind, wrap
from kvpoll_fsm.errors import InvalidInput, LayoutError
from kvpoll_fsm.layout import ITEMSIZE, Field, Layout

RAW = {
    name: "uint16" if size == 2 else "uint8" for name, size in ITEMSIZE.items() if "float8" in name or name[0:2] == "bf"
}
EMB = Field("emb", "float32", (3,))
ROOM = Field("aux", "int64", (2, 2), per_room=True)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")


def _bits(dtype: str, tokens: int) -> bytes:
    """Bytes that are valid values of the dtype."""
    return bytes(n % (2 if dtype == "bool" else 256) for n in range(tokens * 6 * ITEMSIZE[dtype]))


@pytest.mark.parametrize("per_room", [False, True])
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_numpy_in_and_out(dtype: str, per_room: bool) -> None:
    field = Field("x", dtype, (2, 3), per_room)
    data = _bits(dtype, 1 if per_room else 5)
    shape = (2, 3) if per_room else (5, 2, 3)
    array = np.frombuffer(data, RAW.get(dtype, dtype)).reshape(shape)
    view = as_bytes(field, array)
    assert (view.format, view.readonly, bytes(view)) == ("B", True, data)
    assert np.shares_memory(np.frombuffer(view, np.uint8), array)

    made = empty(field, 5, "numpy")
    assert (made.dtype.name, made.shape) == (RAW.get(dtype, dtype), shape)
    as_bytes(field, made)[:] = data
    assert made.tobytes() == data


@pytest.mark.parametrize("per_room", [False, True])
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_torch_in_and_out(dtype: str, per_room: bool) -> None:
    field = Field("x", dtype, (2, 3), per_room)
    data = _bits(dtype, 1 if per_room else 5)
    shape = (2, 3) if per_room else (5, 2, 3)
    tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)
    view = as_bytes(field, tensor)
    assert (view.format, view.readonly, bytes(view)) == ("B", False, data)
    assert np.frombuffer(view, np.uint8).ctypes.data == tensor.data_ptr()

    made = empty(field, 5, "torch")
    assert (made.dtype, made.shape, made.device.type) == (tensor.dtype, shape, "cpu")
    assert made.is_contiguous()
    assert made.data_ptr() % 64 == 0
    as_bytes(field, made)[:] = data
    assert torch.equal(made.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("dtype", RAW)
def test_ml_dtypes_are_known_by_name(dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is optional: raw bits are what numpy users pass")
    array = np.zeros((4, 3), getattr(ml_dtypes, dtype))
    assert as_bytes(Field("x", dtype, (3,)), array).nbytes == 12 * ITEMSIZE[dtype]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_scalars(kind: Any) -> None:
    assert as_bytes(Field("x", "int16"), empty(Field("x", "int16"), 7, kind)).nbytes == 14
    per_room = Field("x", "bfloat16", (), per_room=True)
    made = empty(per_room, 7, kind)
    assert made.shape == ()
    assert as_bytes(per_room, made).nbytes == 2


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_no_tokens(kind: Any) -> None:
    made = empty(EMB, 0, kind)
    assert made.shape == (0, 3)
    assert as_bytes(EMB, made, 0).nbytes == 0


def test_bytes_keep_the_array_alive() -> None:
    array = np.ones((2, 3), np.float32)
    gone = weakref.ref(array)
    view = as_bytes(EMB, array)
    del array
    assert gone() is not None
    assert bytes(view) == np.ones(6, np.float32).tobytes()
    del view
    assert gone() is None


def test_bytes_keep_the_tensor_memory_alive() -> None:
    view = as_bytes(EMB, torch.full((1000, 3), 7.0))
    torch.zeros((1000, 3))
    assert set(np.frombuffer(view, np.float32)) == {7.0}


def test_not_contiguous_is_copied() -> None:
    table = np.arange(20, dtype=np.float32).reshape(4, 5)
    view = as_bytes(EMB, table[:, 1:4])
    assert bytes(view) == table[:, 1:4].tobytes()
    assert not np.shares_memory(np.frombuffer(view, np.uint8), table)
    assert bytes(as_bytes(EMB, torch.from_numpy(table)[:, 1:4])) == table[:, 1:4].tobytes()
    assert bytes(as_bytes(EMB, torch.from_numpy(table[:3, :4].copy()).t())) == table[:3, :4].T.tobytes()
    assert bytes(as_bytes(EMB, torch.ones(3).expand(4, 3))) == np.ones((4, 3), np.float32).tobytes()


def test_lazy_conjugates_and_negatives_are_resolved() -> None:
    field = Field("x", "complex64", (2,))
    tensor = torch.tensor([[1 + 2j, 3 - 4j]], dtype=torch.complex64)
    assert bytes(as_bytes(field, tensor.conj())) == tensor.numpy().conj().tobytes()
    negative = tensor.conj().imag
    assert negative.is_neg()
    assert bytes(as_bytes(Field("x", "float32", (2,)), negative)) == (-tensor.numpy().imag).tobytes()
    with pytest.raises(LayoutError, match="not C-contiguous"):
        arena_bytes(field, tensor.conj().reshape(1, 1, 2), 1)


def test_gradients_and_subclasses_do_not_matter() -> None:
    assert as_bytes(EMB, torch.zeros((2, 3), requires_grad=True)).nbytes == 24
    assert as_bytes(EMB, torch.nn.Parameter(torch.zeros((2, 3)))).nbytes == 24
    assert as_bytes(EMB, np.zeros((2, 3), np.float32).view(np.recarray)).nbytes == 24


@pytest.mark.parametrize(
    ("field", "array", "tokens", "text"),
    [
        (EMB, [[1.0, 2.0, 3.0]], None, "field 'emb': a list where a numpy array or torch tensor"),
        (EMB, np.float32(1), None, "a numpy.float32 where"),
        (EMB, None, None, "a NoneType where"),
        (
            EMB,
            np.zeros((2, 3)),
            None,
            r"numpy float64\[2, 3\], wanted float32\[tokens, 3\]: convert it with .astype",
        ),
        (EMB, torch.zeros((2, 3)).double(), None, r"torch float64\[2, 3\], wanted .*\.to\(torch.float32\)"),
        (EMB, np.zeros((2, 3), ">f4"), None, r"convert it with .astype\('float32'\)"),
        (
            EMB,
            np.zeros((2, 4), "f4"),
            None,
            r"numpy float32\[2, 4\], wanted float32\[tokens, 3\]: give it the",
        ),
        (EMB, np.zeros((2, 3), "f4"), 5, r"wanted float32\[5, 3\]"),
        (EMB, np.zeros(3, "f4"), None, r"float32\[3\], wanted float32\[tokens, 3\]"),
        (EMB, np.zeros((1, 2, 3), "f4"), None, r"float32\[1, 2, 3\], wanted"),
        (EMB, np.zeros((2, 3), object), None, "object"),
        (EMB, np.zeros((2, 3), "f4,f4"), None, "wanted float32"),
        (
            EMB,
            torch.zeros((2, 3), device="meta"),
            None,
            "on meta, and device memory is not supported here yet",
        ),
        (EMB, torch.zeros((2, 3)).to_sparse(), None, "sparse; pass .to_dense"),
        (ROOM, np.zeros((1, 2, 2), "i8"), None, r"int64\[1, 2, 2\], wanted int64\[2, 2\]"),
        (
            Field("b", "bfloat16"),
            np.zeros(2, "f4"),
            None,
            "no bfloat16; pass its bits as a numpy.uint16 array",
        ),
        (Field("b", "bfloat16"), np.zeros(2, "i2"), None, "numpy.uint16"),
        (Field("b", "bfloat16"), torch.zeros(2, dtype=torch.uint16), None, r"\.to\(torch.bfloat16\)"),
        (Field("b", "float8_e5m2"), np.zeros(2, "u2"), None, "numpy.uint8"),
        (Field("b", "float8_e5m2"), torch.zeros(2, dtype=torch.float8_e4m3fn), None, "float8_e4m3fn"),
    ],
)
def test_as_bytes_refuses(field: Field, array: Any, tokens: int | None, text: str) -> None:
    with pytest.raises(LayoutError, match=text) as caught:
        as_bytes(field, array, tokens)
    assert caught.value.field == field.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_refused() -> None:
    with pytest.raises(LayoutError, match="on cuda:0, and device memory"):
        as_bytes(EMB, torch.zeros((2, 3), device="cuda"))
    pinned = torch.zeros((2, 3)).pin_memory()
    assert as_bytes(EMB, pinned).nbytes == 24


def test_arena_bytes_share_and_write() -> None:
    arena = np.zeros((5, 4, 3), np.float32)
    arena_bytes(EMB, arena, 4)[:] = b"\1" * arena.nbytes
    assert arena.tobytes() == b"\1" * arena.nbytes
    tensor = torch.zeros((5, 2, 2), dtype=torch.int64)
    arena_bytes(ROOM, tensor, 4, 5)[:] = b"\1" * 160
    assert set(tensor.view(torch.uint8).flatten().tolist()) == {1}


def test_arena_bytes_refuses() -> None:
    with pytest.raises(LayoutError, match=r"wanted float32\[blocks, 4, 3\]"):
        arena_bytes(EMB, np.zeros((5, 3, 3), np.float32), 4)
    with pytest.raises(LayoutError, match=r"wanted int64\[6, 2, 2\]"):
        arena_bytes(ROOM, np.zeros((5, 2, 2), np.int64), 4, 6)
    with pytest.raises(LayoutError, match="not C-contiguous"):
        arena_bytes(EMB, np.zeros((5, 4, 6), np.float32)[..., ::2], 4)
    with pytest.raises(LayoutError, match="not C-contiguous"):
        arena_bytes(EMB, torch.zeros((4, 5, 3)).transpose(0, 1), 4)
    with pytest.raises(LayoutError, match="read-only"):
        arena_bytes(EMB, np.frombuffer(bytes(240), np.float32).reshape(5, 4, 3), 4)


def test_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_kind("auto") == resolve_kind("torch") == "torch"
    assert resolve_kind("numpy") == "numpy"
    with pytest.raises(InvalidInput, match="arrays='jax': write 'auto', 'numpy' or 'torch'"):
        resolve_kind("jax")
    # Another thread is in the middle of importing it.
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=torch.Tensor))
    assert resolve_kind("auto") == "numpy"


@pytest.mark.usefixtures("without_torch")
def test_without_torch() -> None:
    assert resolve_kind("auto") == "numpy"
    assert isinstance(empty(EMB, 2), np.ndarray)
    with pytest.raises(InvalidInput, match="torch has not been imported"):
        resolve_kind("torch")
    with pytest.raises(LayoutError, match=r"a torch\.Tensor where a numpy array"):
        as_bytes(EMB, torch.zeros((2, 3)))


def test_an_old_torch_without_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(Tensor=torch.Tensor, from_numpy=torch.from_numpy)
    monkeypatch.setitem(sys.modules, "torch", old)
    with pytest.raises(LayoutError, match="this version of torch has no float8_e8m0fnu: use arrays='numpy'"):
        empty(Field("x", "float8_e8m0fnu"), 3)


def test_torch_is_never_imported() -> None:
    code = (
        "import sys; from kvpoll_fsm import arena, staging; from kvpoll_fsm.layout import Field, Layout;"
        "l = Layout(2, [Field('x', 'int8')]); staging.new_arrays(l, 3); arena.BlockPool(l, 2);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrap_shares_memory() -> None:
    data = bytearray(24)
    first, second = wrap(EMB, memoryview(data), (2, 1)), wrap(EMB, memoryview(data), (2, 1), "torch")
    first[1, 0, 2] = 5
    assert second[1, 0, 2] == 5
    assert first.shape == second.shape == (2, 1, 3)


@pytest.mark.parametrize("tokens", [1 << 50, 1 << 70])
def test_more_than_memory(tokens: int) -> None:
    with pytest.raises(InvalidInput, match="no memory for an array"):
        empty(EMB, tokens, "numpy")


def test_require_fields() -> None:
    layout = Layout(4, [EMB, ROOM])
    some: Any = object()
    require_fields(layout, {"emb": some, "aux": some})
    with pytest.raises(LayoutError, match=r"field 'aux': missing; the layout declares int64\[2x2\] per room"):
        require_fields(layout, {"emb": some})
    with pytest.raises(LayoutError, match="field 'embeddings': not in the layout, which has: emb, aux"):
        require_fields(layout, {"emb": some, "aux": some, "embeddings": some})
    with pytest.raises(InvalidInput, match=r"a numpy.ndarray where a dict"):
        require_fields(layout, np.zeros(3))  # type: ignore[arg-type]


def test_public_names() -> None:
    assert all(hasattr(arrays, name) for name in arrays.__all__)
