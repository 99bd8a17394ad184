from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm.errors import InvalidInput, LayoutError, LayoutMismatch
from kvpoll_fsm.layout import ITEMSIZE, Field, Layout, cut, plan_part, plan_runs, runs

FIELDS = [
    Field("emb", "bfloat16", (3,)),
    Field("aux", "int64", (2,), per_room=True),
    Field("ids", "int32"),
]


def test_itemsizes_are_those_of_numpy() -> None:
    for name, size in ITEMSIZE.items():
        if not name.startswith(("bfloat", "float8")):
            assert np.dtype(name).itemsize == size


def test_field_sizes() -> None:
    field = Field("emb", "bfloat16", (4, 3))
    assert field.slot_nbytes == 24
    assert field.block_nbytes(10) == 240
    assert str(field) == "bfloat16[4x3]"
    room = Field("aux", "int64", per_room=True)
    assert room.slot_nbytes == room.block_nbytes(10) == 8
    assert str(room) == "int64[scalar] per room"


def test_a_shape_becomes_plain_integers() -> None:
    shape: Any = [np.int64(4), 3]
    field = Field("emb", "int8", shape)
    assert field.shape_per_token == (4, 3)
    assert [type(size) for size in field.shape_per_token] == [int, int]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("", "int8"), "1 to 128 printable"),
        (("x" * 129, "int8"), "1 to 128 printable"),
        (("a\nb", "int8"), "1 to 128 printable"),
        (("\ud800", "int8"), "1 to 128 printable"),
        ((7, "int8"), "1 to 128 printable"),
        (("a", "int4"), "unknown dtype 'int4'; known: bool, int8"),
        (("a", ["int8"]), "unknown dtype"),
        (("a", np.float32), "unknown dtype"),
        (("a", "int8", 5), r"write \(5,\)"),
        (("a", "int8", np.int64(5)), r"write \(5,\)"),
        (("a", "int8", None), "not a tuple of integers"),
        (("a", "int8", "34"), "not a tuple of integers"),
        (("a", "int8", (2.0,)), "not a tuple of integers"),
        (("a", "int8", (0,)), "at least 1"),
        (("a", "int8", (-1,)), "at least 1"),
        (("a", "int8", (True,)), "at least 1"),
        (("a", "int8", (1,) * 17), "too large"),
        (("a", "int8", (1 << 41,)), "too large"),
    ],
)
def test_field_refuses(arguments: Any, text: str) -> None:
    with pytest.raises(LayoutError, match=text) as caught:
        Field(*arguments)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_layout_properties() -> None:
    layout = Layout(4, FIELDS)
    assert [field.name for field in layout.token_fields] == ["emb", "ids"]
    assert layout.token_nbytes == 6 + 4
    assert [layout.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize(
    ("block_tokens", "fields", "text"),
    [
        (0, FIELDS, "block_tokens=0"),
        (True, FIELDS, "block_tokens=True"),
        (1.5, FIELDS, "block_tokens=1.5"),
        (1 << 31, FIELDS, "block_tokens"),
        (4, [], "at least one of them"),
        (4, [Field("a", "int8", per_room=True)], "not per_room"),
        (4, [Field(f"f{n}", "int8") for n in range(65)], "1 to 64"),
        (4, [Field("a", "int8"), Field("a", "int16")], "declared twice"),
        (4, ["emb"], "give a list of Field"),
        (4, Field("a", "int8"), "give a list of Field"),
        (4, None, "give a list of Field"),
    ],
)
def test_layout_refuses(block_tokens: Any, fields: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Layout(block_tokens, fields)


def test_fingerprint_tells_fields_apart_but_not_block_sizes() -> None:
    base = Layout(4, FIELDS)
    assert base.fingerprint == Layout(5, FIELDS).fingerprint
    assert len(base.fingerprint) == 16
    others = [
        Layout(4, [Field("b", "int8")]),
        Layout(4, [Field("a", "uint8")]),
        Layout(4, [Field("a", "int8", (1,))]),
        Layout(4, [Field("a", "int8"), Field("b", "int8", per_room=True)]),
        Layout(4, [Field("a", "int8"), Field("b", "int8")]),
        Layout(4, [Field("b", "int8"), Field("a", "int8")]),
        base,
    ]
    for one, other in itertools.combinations(others, 2):
        assert one.fingerprint != other.fingerprint


def test_differences_name_each_field() -> None:
    layout = Layout(4, FIELDS)
    layout.require_same(tuple(FIELDS))
    with pytest.raises(LayoutMismatch) as caught:
        layout.require_same([FIELDS[0], Field("ids", "int64"), Field("new", "int8")])
    assert caught.value.differences == (
        "aux: only on this side (int64[2] per room)",
        "new: only on the peer (int8[scalar])",
        "ids: int32[scalar] here, int64[scalar] on the peer",
    )
    assert "another order" in layout.differences(FIELDS[::-1])[0]


def test_runs_merge_neighbours() -> None:
    assert list(runs([3, 4, 5, 1, 0, 1], 4, 21)) == [(12, 12), (4, 4), (0, 5)]
    assert list(runs([0, 1, 2], 4, 5)) == [(0, 5)]
    assert list(runs([2], 4, 0)) == []
    assert list(runs([], 4, 0)) == []


def test_runs_need_enough_blocks_and_say_so_before_the_first() -> None:
    with pytest.raises(InvalidInput, match="2 blocks of 4 tokens hold less than 9"):
        next(runs([5, 1], 4, 9))


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 5), st.data())
def test_cut_equals_slicing_the_slots(blocks: list[int], block_tokens: int, data: st.DataObject) -> None:
    total = len(blocks) * block_tokens
    offset = data.draw(st.integers(0, total))
    tokens = data.draw(st.integers(0, total - offset))
    pieces = list(cut(runs(blocks, block_tokens, total), offset, tokens))
    assert _slots(pieces) == _slots(runs(blocks, block_tokens, total))[offset : offset + tokens]
    assert all(length > 0 for _, length in pieces)


def _slots(pieces: Any) -> list[int]:
    return [slot + n for slot, length in pieces for n in range(length)]


@st.composite
def block_lists(draw: st.DrawFn, tokens: int) -> tuple[int, list[int]]:
    """A block size and blocks in any order that hold `tokens` tokens; neighbours are likely."""
    block_tokens = draw(st.integers(1, 7))
    least = -(-tokens // block_tokens)
    blocks = draw(st.permutations(range(least + draw(st.integers(0, 4)))))
    if draw(st.booleans()):
        blocks = sorted(blocks)
    return block_tokens, blocks[: draw(st.integers(least, len(blocks)))]


def _arenas(fields: Sequence[Field], block_tokens: int, blocks: int, seed: int) -> list[bytearray]:
    rng = np.random.default_rng(seed)
    return [bytearray(rng.bytes(field.block_nbytes(block_tokens) * blocks)) for field in fields]


def _reference(
    fields: Sequence[Field],
    src: tuple[list[bytearray], int, list[int]],
    dst: tuple[list[bytearray], int, list[int]],
    tokens: int,
    first: bool,
) -> None:
    """Copy one token at a time."""
    for source, target, field in zip(src[0], dst[0], fields, strict=True):
        for token in range(1 if field.per_room else tokens):
            if field.per_room:
                if not first:
                    continue
                src_slot, dst_slot = src[2][0], dst[2][0]
            else:
                src_slot = src[2][token // src[1]] * src[1] + token % src[1]
                dst_slot = dst[2][token // dst[1]] * dst[1] + token % dst[1]
            size = field.slot_nbytes
            target[dst_slot * size : (dst_slot + 1) * size] = source[src_slot * size : (src_slot + 1) * size]


@given(st.data())
def test_pain_19_plan_part_equals_copying_token_by_token(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    src_size, src_blocks = data.draw(block_lists(tokens))
    dst_size, dst_blocks = data.draw(block_lists(tokens))
    first = data.draw(st.booleans())
    source = _arenas(FIELDS, src_size, 50, 1)
    planned, wanted = _arenas(FIELDS, dst_size, 50, 2), _arenas(FIELDS, dst_size, 50, 2)

    extents = plan_part(Layout(src_size, FIELDS), src_blocks, dst_blocks, dst_size, tokens, first=first)

    for e in extents:
        assert e.nbytes > 0
        planned[e.field][e.dst_offset : e.dst_offset + e.nbytes] = source[e.field][
            e.src_offset : e.src_offset + e.nbytes
        ]
    _reference(FIELDS, (source, src_size, src_blocks), (wanted, dst_size, dst_blocks), tokens, first)
    assert planned == wanted
    assert [e.field for e in extents] == sorted(e.field for e in extents)
    assert sum(e.nbytes for e in extents) == tokens * (6 + 4) + (16 if first else 0)


@given(st.data())
def test_extents_are_as_long_as_they_can_be(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    src_size, src_blocks = data.draw(block_lists(tokens))
    dst_size, dst_blocks = data.draw(block_lists(tokens))
    layout = Layout(src_size, [Field("ids", "int32")])
    extents = plan_part(layout, src_blocks, dst_blocks, dst_size, tokens, first=True)
    for one, other in itertools.pairwise(extents):
        ends = (one.src_offset + one.nbytes, one.dst_offset + one.nbytes)
        assert ends != (other.src_offset, other.dst_offset)


def test_plan_part_merges_whole_pools_into_one_copy() -> None:
    layout = Layout(128, [Field("emb", "bfloat16", (16,)), Field("aux", "int8", per_room=True)])
    extents = plan_part(layout, range(8), range(4, 8), 256, 1000, first=True)
    assert [(e.field, e.src_offset, e.dst_offset, e.nbytes) for e in extents] == [
        (0, 0, 1024 * 32, 1000 * 32),
        (1, 0, 4, 1),
    ]


@pytest.mark.parametrize(
    ("src", "dst", "tokens"), [([0], [0, 1], 5), ([0, 1], [0], 5), ([], [], 1), ([], [], 0), ([0], [0], -1)]
)
def test_plan_part_refuses(src: list[int], dst: list[int], tokens: int) -> None:
    with pytest.raises(InvalidInput):
        plan_part(Layout(4, FIELDS), src, dst, 4, tokens, first=True)


def test_plan_runs_starts_inside_a_block() -> None:
    layout = Layout(4, [Field("ids", "int8"), Field("aux", "int8", per_room=True)])
    src = cut(runs([7, 2], 4, 8), 3, 4)
    extents = plan_runs(layout, src, runs([0], 8, 4), None)
    assert [(e.field, e.src_offset, e.dst_offset, e.nbytes) for e in extents] == [(0, 31, 0, 1), (0, 8, 1, 3)]
