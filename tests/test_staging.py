from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm import staging
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.arrays import as_bytes, empty
from kvpoll_fsm.commands import HeldPart
from kvpoll_fsm.errors import ForeignBlock, InvalidInput, LayoutError, LayoutMismatch
from kvpoll_fsm.layout import ITEMSIZE, Field, Layout, cut, runs
from kvpoll_fsm.staging import Source, checksum, checksum_runs, new_arrays, stage, verify

FIELDS = [
    Field("ids", "int32"),
    Field("aux", "int64", (2,), per_room=True),
    Field("emb", "float32", (3,)),
    Field("flag", "bool", per_room=True),
]
LAYOUT = Layout(4, FIELDS)


def _data(tokens: int, kind: Any = "numpy", fields: list[Field] = FIELDS) -> dict[str, Any]:
    """Random bits for every field."""
    rng = np.random.default_rng(tokens)
    data = {}
    for field in fields:
        data[field.name] = empty(field, tokens, kind)
        view = as_bytes(field, data[field.name])
        view[:] = rng.integers(0, 2 if field.dtype == "bool" else 256, view.nbytes, np.uint8).tobytes()
    return data


def _bytes(data: dict[str, Any], fields: list[Field] = FIELDS) -> list[bytes]:
    return [bytes(as_bytes(field, data[field.name])) for field in fields]


def _reference_checksum(data: dict[str, Any], offset: int, tokens: int, first: bool) -> bytes:
    digest = xxhash.xxh3_128()
    for field, content in zip(FIELDS, _bytes(data), strict=True):
        if not field.per_room:
            digest.update(content[offset * field.slot_nbytes : (offset + tokens) * field.slot_nbytes])
        elif first:
            digest.update(content)
    return digest.digest()


@st.composite
def pools(draw: st.DrawFn, tokens: int) -> tuple[BlockPool, list[int]]:
    """A pool of random block size and blocks of it, in any order, that hold `tokens` tokens."""
    block_tokens = draw(st.integers(1, 9))
    least = -(-tokens // block_tokens)
    pool = BlockPool(Layout(block_tokens, FIELDS), least + draw(st.integers(0, 3)))
    blocks = draw(st.permutations(range(pool.blocks)))
    return pool, blocks[: draw(st.integers(least, pool.blocks))]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SLICE_NBYTES", 7)
    monkeypatch.setattr(staging, "_HASH_NBYTES", 5)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_every_dtype_there_and_back(dtype: str, kind: Any) -> None:
    fields = [Field("x", dtype, (2, 3)), Field("s", dtype), Field("r", dtype, (2,), per_room=True)]
    layout = Layout(4, fields)
    data = _data(10, kind, fields)
    pool = BlockPool(layout, 5)
    stage(pool, [4, 0, 1], Source.of(layout, data), 0, 10, True)
    destination = new_arrays(layout, 10, kind)
    destination.copy_out(pool, [HeldPart(0, 0, 10, (4, 0, 1))])
    arrays = destination.result
    assert list(arrays) == ["x", "s", "r"]
    assert _bytes(arrays, fields) == _bytes(data, fields)
    for name, array in arrays.items():
        assert (type(array), array.dtype, array.shape) == (
            type(data[name]),
            data[name].dtype,
            data[name].shape,
        )


@given(st.data())
def test_stage_and_copy_out_in_parts(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    room = _data(tokens)
    source, destination = Source.of(LAYOUT, room), new_arrays(LAYOUT, tokens, "numpy")
    for field in FIELDS:
        as_bytes(field, destination.result[field.name])[:] = bytes(
            as_bytes(field, destination.result[field.name]).nbytes
        )
    offset = part = 0
    while offset < tokens:
        length = data.draw(st.integers(1, tokens - offset))
        pool, blocks = data.draw(pools(length))
        stage(pool, blocks, source, offset, length, part == 0)
        destination.copy_out(pool, [HeldPart(part, offset, length, tuple(blocks))])
        offset, part = offset + length, part + 1
    assert _bytes(destination.result) == _bytes(room)


@given(st.data())
def test_checksums_do_not_depend_on_blocks(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    offset = data.draw(st.integers(0, tokens - 1))
    length = data.draw(st.integers(1, tokens - offset))
    first = data.draw(st.booleans())
    room = _data(tokens)
    source = Source.of(LAYOUT, room)
    sums = set()
    for _ in range(2):
        pool, blocks = data.draw(pools(length))
        stage(pool, blocks, source, offset, length, first)
        sums.add(checksum(pool, blocks, length, first))
    assert sums == {_reference_checksum(room, offset, length, first)}


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_slices(tokens: int) -> None:
    room, pool, blocks = _data(tokens), BlockPool(LAYOUT, 5), (3, 4, 0, 1, 2)
    stage(pool, blocks, Source.of(LAYOUT, room, copy=True), 0, tokens, True)
    assert checksum(pool, blocks, tokens, True) == _reference_checksum(room, 0, tokens, True)
    destination = new_arrays(LAYOUT, tokens, "numpy")
    destination.copy_out(pool, [HeldPart(0, 0, tokens, blocks)])
    assert _bytes(destination.result) == _bytes(room)


def test_larger_than_a_slice() -> None:
    layout = Layout(1024, [Field("x", "uint8", (1021,))])
    tokens = 3 * staging.SLICE_NBYTES // 1021
    room = {"x": np.random.default_rng(0).integers(0, 256, (tokens, 1021), np.uint8)}
    pool = BlockPool(layout, layout.blocks_for(tokens))
    blocks = tuple(range(pool.blocks))
    stage(pool, blocks, Source.of(layout, room), 0, tokens, True)
    assert checksum(pool, blocks, tokens, True) == xxhash.xxh3_128(room["x"].tobytes()).digest()
    destination = new_arrays(layout, tokens, "numpy")
    destination.copy_out(pool, [HeldPart(0, 0, tokens, blocks)])
    assert np.array_equal(destination.result["x"], room["x"])


def test_stage_touches_nothing_else() -> None:
    pool = BlockPool(LAYOUT, 4)
    for region in pool.regions():
        region.buffer[:] = b"\1" * region.buffer.nbytes
    stage(pool, [2, 0], Source.of(LAYOUT, _data(9)), 3, 5, False)
    emb, ids = pool.view("emb").view(np.uint32), pool.view("ids").view(np.uint32)
    for view in (emb, ids):
        untouched = np.argwhere((view.reshape(4, 4, -1) == 0x01010101).all(axis=2)).tolist()
        assert untouched == [[0, 1], [0, 2], [0, 3], *([b, t] for b in (1, 3) for t in range(4))]
    assert set(pool.regions()[1].buffer) == set(pool.regions()[3].buffer) == {1}


def test_per_room_values_go_to_the_first_block_with_part_0_only() -> None:
    room, pool = _data(8), BlockPool(LAYOUT, 4)
    stage(pool, [3, 1], Source.of(LAYOUT, room), 0, 8, True)
    assert np.array_equal(pool.view("aux")[3], room["aux"])
    assert not pool.view("aux")[:3].any()
    destination = new_arrays(LAYOUT, 8, "numpy")
    destination.result["aux"][:] = -1
    destination.copy_out(pool, [HeldPart(1, 0, 8, (3, 1))])
    assert destination.result["aux"].tolist() == [-1, -1]


def test_one_changed_bit_changes_the_checksum() -> None:
    pool = BlockPool(LAYOUT, 2)
    held = HeldPart(0, 0, 5, (1, 0))
    stage(pool, held.blocks, Source.of(LAYOUT, _data(5)), 0, 5, True)
    expected = checksum(pool, held.blocks, 5, True)
    assert len(expected) == 16
    assert verify(pool, held, expected)
    assert not verify(pool, HeldPart(1, 0, 5, (1, 0)), expected)
    # The last byte that counts of each field, and one that does not: token 5, the sixth.
    for view, at, counts in (("emb", (0, 0, 2), True), ("ids", (0, 1), False), ("aux", (1, 1), True)):
        pool.view(view).view(np.uint8).reshape(*pool.view(view).shape, -1)[at][-1] ^= 1
        assert verify(pool, held, expected) != counts
        pool.view(view).view(np.uint8).reshape(*pool.view(view).shape, -1)[at][-1] ^= 1
    assert verify(pool, held, expected)


def test_checksum_of_a_part_that_starts_inside_a_block() -> None:
    room, pool = _data(12), BlockPool(LAYOUT, 4)
    blocks = [2, 0, 3]
    stage(pool, blocks, Source.of(LAYOUT, room), 0, 12, True)
    pieces = list(cut(runs(blocks, 4, 12), 3, 6))
    assert checksum_runs(pool, pieces, None) == _reference_checksum(room, 3, 6, False)
    assert checksum_runs(pool, pieces, 2) == _reference_checksum(room, 3, 6, True)
    for bad, room_block in (([(-1, 2)], None), ([(15, 2)], None), ([(0, 1)], 4), ([(0, 1)], -1)):
        with pytest.raises(ForeignBlock, match="block ids of this pool are 0 to 3"):
            checksum_runs(pool, bad, room_block)


def test_an_adopted_pool_can_be_staged_into_and_summed() -> None:
    tensors = {"x": torch.zeros((3, 4, 2), dtype=torch.bfloat16)}
    layout = Layout(4, [Field("x", "bfloat16", (2,))])
    pool = BlockPool.adopt(layout, tensors)
    room = {"x": torch.arange(10, dtype=torch.bfloat16).view(5, 2)}
    stage(pool, [2, 1], Source.of(layout, room), 0, 5, True)
    assert torch.equal(tensors["x"][2], room["x"][:4])
    assert torch.equal(tensors["x"][1][0], room["x"][4])
    assert checksum(pool, [2, 1], 5, True) == xxhash.xxh3_128(room["x"].view(torch.uint8).numpy()).digest()


def test_borrowed_sources_copy_nothing_and_copies_are_snapshots() -> None:
    layout = Layout(4, [Field("x", "uint8", (1024,))])
    array = np.zeros((1024, 1024), np.uint8)
    tracemalloc.start()
    borrowed = Source.of(layout, {"x": array})
    assert tracemalloc.get_traced_memory()[1] < 1 << 19
    tracemalloc.stop()
    snapshot = Source.of(layout, {"x": array}, copy=True)
    array[:] = 5
    assert borrowed.buffers[0][-1] == 5
    assert not any(snapshot.buffers[0])
    assert borrowed.total_tokens == snapshot.total_tokens == 1024


def test_read_only_sources_are_fine() -> None:
    layout = Layout(4, [Field("x", "uint8")])
    pool = BlockPool(layout, 1)
    stage(pool, [0], Source.of(layout, {"x": np.frombuffer(b"abc", np.uint8)}), 1, 2, True)
    assert bytes(pool.regions()[0].buffer) == b"bc\0\0"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"emb": np.zeros((8, 3), np.float32)}, "field 'emb': has 8 tokens where 'ids' has 9"),
        ({"emb": np.zeros((0, 3), np.float32)}, "field 'emb': has 0 tokens where 'ids' has 9"),
        ({"ids": np.zeros(9, np.int64)}, r"field 'ids': given numpy int64\[9\], wanted int32\[tokens\]"),
        ({"aux": np.zeros((9, 2), np.int64)}, r"field 'aux': .* wanted int64\[2\]"),
        ({"idz": np.zeros(9, np.int32)}, "field 'idz': not in the layout"),
        ({"ids": np.zeros(0, np.int32), "emb": np.zeros((0, 3), np.float32)}, "no tokens to send"),
    ],
)
def test_source_refuses(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Source.of(LAYOUT, {**_data(9), **change})


def test_source_needs_every_field() -> None:
    data = _data(9)
    del data["flag"]
    with pytest.raises(LayoutError, match="field 'flag': missing"):
        Source.of(LAYOUT, data)
    other: Any = None
    with pytest.raises(InvalidInput, match="a NoneType where a dict"):
        Source.of(LAYOUT, other)


@pytest.mark.parametrize(
    ("blocks", "offset", "tokens", "error", "text"),
    [
        ([0, 1], 0, 9, InvalidInput, "2 blocks of 4 tokens hold less than 9"),
        ([], 0, 1, InvalidInput, "0 blocks"),
        ([0], 0, 0, InvalidInput, "a part of 0 tokens"),
        ([0], 9, 1, InvalidInput, "a part of 1 tokens at 9 in a room of 9"),
        ([0], -1, 1, InvalidInput, "at -1"),
        ([-1], 0, 1, ForeignBlock, r"blocks \[-1\]: block ids of this pool are 0 to 2"),
        ([1, 3], 0, 1, ForeignBlock, r"blocks \[3\]"),
    ],
)
def test_bad_parts_move_nothing(blocks: list[int], offset: int, tokens: int, error: type[Exception], text: str) -> None:
    pool, source, destination = BlockPool(LAYOUT, 3), Source.of(LAYOUT, _data(9)), new_arrays(LAYOUT, 9)
    with pytest.raises(error, match=text):
        stage(pool, blocks, source, offset, tokens, True)
    assert not any(any(region.buffer) for region in pool.regions())
    with pytest.raises(error, match=text):
        destination.copy_out(pool, [HeldPart(0, offset, tokens, tuple(blocks))])
    if 0 <= offset < 9:
        with pytest.raises(error):
            checksum(pool, blocks, tokens, True)


def test_other_layouts_are_refused_and_other_block_sizes_are_not() -> None:
    data = _data(9)
    other = Layout(4, [*FIELDS[:-1], Field("flag", "int8", per_room=True)])
    with pytest.raises(LayoutMismatch, match=r"flag: int8\[scalar\] per room here, bool"):
        stage(BlockPool(other, 3), [0, 1, 2], Source.of(LAYOUT, data), 0, 9, True)
    with pytest.raises(LayoutMismatch, match="flag"):
        new_arrays(LAYOUT, 9).copy_out(BlockPool(other, 3), [HeldPart(0, 0, 9, (0, 1, 2))])
    stage(BlockPool(Layout(5, FIELDS), 2), [0, 1], Source.of(LAYOUT, data), 0, 9, True)


def test_destinations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(new_arrays(LAYOUT, 3).result["emb"], torch.Tensor)
    assert isinstance(new_arrays(LAYOUT, 3, "numpy").result["emb"], np.ndarray)
    with pytest.raises(InvalidInput, match="a room of 0 tokens"):
        new_arrays(LAYOUT, 0)
    with pytest.raises(InvalidInput, match="no memory"):
        new_arrays(LAYOUT, 1 << 60)
    with pytest.raises(InvalidInput, match="arrays='x'"):
        new_arrays(LAYOUT, 3, "x")  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "torch")
    assert isinstance(new_arrays(LAYOUT, 3).result["emb"], np.ndarray)


def test_pain_18_the_arrays_outlive_the_pool() -> None:
    room, pool = _data(8), BlockPool(LAYOUT, 2)
    stage(pool, [0, 1], Source.of(LAYOUT, room), 0, 8, True)
    destination = new_arrays(LAYOUT, 8)
    destination.copy_out(pool, [HeldPart(0, 0, 8, (0, 1))])
    arrays = destination.result
    pool.close()
    del pool, destination
    assert _bytes(arrays) == _bytes(room)
