from __future__ import annotations

import gc
import mmap
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.errors import BlockError, InvalidInput, LayoutError
from kvpoll_fsm.layout import ITEMSIZE, Field, Layout

LAYOUT = Layout(
    4,
    [Field("emb", "bfloat16", (3,)), Field("aux", "int64", (2,), per_room=True), Field("ids", "int32")],
)


def _tensors(blocks: int = 5) -> dict[str, Any]:
    return {
        "ids": np.zeros((blocks, 4), np.int32),
        "emb": torch.zeros((blocks, 4, 3), dtype=torch.bfloat16),
        "aux": np.zeros((blocks, 2), np.int64),
    }


def test_a_pool_of_our_own() -> None:
    pool = BlockPool(LAYOUT, 5)
    assert (pool.layout, pool.blocks, pool.capacity_tokens, pool.managed) == (LAYOUT, 5, 20, True)
    regions = pool.regions()
    assert [region.number for region in regions] == [0, 1, 2]
    assert [region.buffer.nbytes for region in regions] == [5 * 4 * 6, 5 * 16, 5 * 4 * 4]
    assert pool.nbytes == 120 + 80 + 80
    for region in regions:
        view = region.buffer
        assert (view.format, view.ndim, view.readonly, view.c_contiguous) == ("B", 1, False, True)
        assert np.frombuffer(view, np.uint8).ctypes.data % mmap.PAGESIZE == 0
        assert not any(view)


def test_the_memory_is_present_before_the_first_use() -> None:
    nbytes = 64 << 20
    before = _resident_nbytes()
    pool = BlockPool(Layout(1 << 20, [Field("x", "uint8")]), 64)
    assert _resident_nbytes() - before > 0.9 * nbytes
    assert pool.nbytes == nbytes


def _resident_nbytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_views_share_the_arena(dtype: str) -> None:
    pool = BlockPool(Layout(4, [Field("x", dtype, (3,)), Field("y", dtype, per_room=True)]), 2)
    pool.regions()[0].buffer[-1] = 1
    flat = pool.view("x")
    assert flat.shape == (2, 4, 3)
    assert flat.view(np.uint8).reshape(-1)[-1] == 1
    tensor = pool.view("x", "torch")
    assert (tensor.dtype, tensor.shape) == (getattr(torch, dtype), (2, 4, 3))
    assert tensor.data_ptr() == flat.ctypes.data
    assert pool.view("y").shape == (2,)


def test_view_of_an_unknown_field() -> None:
    with pytest.raises(LayoutError, match="field 'emb2': not in the layout, which has: emb, aux, ids"):
        BlockPool(LAYOUT, 1).view("emb2")


@pytest.mark.parametrize("blocks", [0, -1, True, 1.0, "3", None])
def test_bad_block_counts(blocks: Any) -> None:
    with pytest.raises(InvalidInput, match="blocks="):
        BlockPool(LAYOUT, blocks)


def test_bad_layouts() -> None:
    layout: Any = {"emb": "bfloat16"}
    with pytest.raises(InvalidInput, match="needs a Layout"):
        BlockPool(layout, 3)
    with pytest.raises(InvalidInput, match="needs a Layout"):
        BlockPool.adopt(layout, {})


@pytest.mark.parametrize("blocks", [1 << 50, 1 << 70])
def test_more_than_memory(blocks: int) -> None:
    with pytest.raises(InvalidInput, match=r"no memory for .* blocks of field 'emb'"):
        BlockPool(LAYOUT, blocks)


def test_adopt_shares_and_keeps_alive() -> None:
    tensors = _tensors()
    pool = BlockPool.adopt(LAYOUT, tensors)
    assert (pool.blocks, pool.capacity_tokens, pool.managed) == (5, 20, False)
    for region in pool.regions():
        region.buffer[-1] = 1
    assert tensors["ids"].view(np.uint8).reshape(-1)[-1] == 1
    assert tensors["aux"].view(np.uint8).reshape(-1)[-1] == 1
    assert tensors["emb"].view(torch.uint8).flatten()[-1] == 1
    pool.view("emb")[2, 3, 1] = 0x3F80
    assert tensors["emb"][2, 3, 1] == 1.0

    gone = weakref.ref(tensors["ids"])
    del tensors, region
    assert gone() is not None
    pool.close()
    assert gone() is None


def test_adopt_slices_of_one_big_array() -> None:
    layers = np.zeros((2, 3, 4, 8), np.float16)
    layout = Layout(4, [Field("k", "float16", (8,)), Field("v", "float16", (8,))])
    pool = BlockPool.adopt(layout, {"v": layers[0], "k": layers[1]})
    pool.view("k")[:] = 1
    assert layers[0].sum() == 0
    assert layers[1].sum() == 96


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids": None}, "field 'ids': a NoneType"),
        ({"more": np.zeros(1)}, "field 'more': not in the layout"),
        (
            {"ids": np.zeros((6, 4), np.int32)},
            r"field 'ids': given numpy int32\[6, 4\], wanted int32\[5, 4\]",
        ),
        ({"aux": np.zeros((4, 2), np.int64)}, r"field 'aux': .* wanted int64\[5, 2\]"),
        ({"ids": np.zeros((5, 4), np.int64)}, r"field 'ids': .* \.astype\('int32'\)"),
        ({"emb": torch.zeros((5, 3, 3), dtype=torch.bfloat16)}, r"wanted bfloat16\[blocks, 4, 3\]"),
        ({"emb": torch.zeros((5, 3, 4), dtype=torch.bfloat16).mT}, "field 'emb': .* not C-contiguous"),
        ({"emb": torch.zeros((5, 4, 3), dtype=torch.bfloat16, device="meta")}, "field 'emb': .* on meta"),
        ({"emb": torch.zeros((0, 4, 3), dtype=torch.bfloat16)}, "no blocks: 'emb'"),
    ],
)
def test_adopt_refuses(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        BlockPool.adopt(LAYOUT, {**_tensors(), **change})


def test_adopt_refuses_missing_fields_and_other_things() -> None:
    tensors = _tensors()
    del tensors["aux"]
    with pytest.raises(LayoutError, match="field 'aux': missing"):
        BlockPool.adopt(LAYOUT, tensors)
    other: Any = [1, 2]
    with pytest.raises(InvalidInput, match="a list where a dict"):
        BlockPool.adopt(LAYOUT, other)


def test_pain_20_adopt_refuses_fields_that_overlap() -> None:
    layout = Layout(4, [Field("k", "uint8"), Field("v", "uint8")])
    memory = np.zeros(40, np.uint8)
    with pytest.raises(LayoutError, match="field 'k': shares memory with field 'v'"):
        BlockPool.adopt(layout, {"v": memory[:20].reshape(5, 4), "k": memory[19:39].reshape(5, 4)})
    tensor = torch.zeros((5, 4), dtype=torch.uint8)
    with pytest.raises(LayoutError, match="shares memory"):
        BlockPool.adopt(layout, {"k": tensor, "v": tensor})


def test_close_leaves_exported_views_usable() -> None:
    pool = BlockPool(LAYOUT, 5)
    region, view = pool.regions()[0], pool.view("emb")
    pool.close()
    pool.close()
    view[:] = 7
    assert region.buffer[0] == 7
    for use in (pool.regions, lambda: pool.view("emb"), lambda: pool.nbytes):
        with pytest.raises(InvalidInput, match="has been closed"):
            use()
    assert pool.capacity_tokens == 20


def test_close_gives_memory_back() -> None:
    pool = BlockPool(Layout(1 << 20, [Field("x", "uint8")]), 64)
    held = _resident_nbytes()
    pool.close()
    gc.collect()
    assert held - _resident_nbytes() > 50 << 20


def test_one_endpoint_at_a_time() -> None:
    pool = BlockPool(LAYOUT, 2)
    pool.claim()
    with pytest.raises(BlockError, match="another endpoint"):
        pool.claim()
    pool.unclaim()
    pool.claim()
