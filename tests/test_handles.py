from __future__ import annotations

import asyncio
import threading
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch

from kvpoll_fsm import (
    BlockPool,
    Endpoint,
    FailureCode,
    Field,
    ForeignBlock,
    Gate,
    InvalidInput,
    KVPoll,
    Layout,
    LayoutError,
    TransferFailed,
)
from kvpoll_memory import Faults
from tests.helpers import (
    ANY_SOURCE,
    BLOCK_TOKENS,
    FIELDS,
    LAYOUT,
    ROOM_NBYTES,
    SOON_S,
    TOKEN_NBYTES,
    TRANSPORTS,
    adopted,
    bits,
    driver_stopped,
    failed,
    make_data,
    open_pair,
    pair,
    parked,
    same,
    transfer,
    until,
)

B, W, T, S = KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success


# The API as the documentation shows it


def test_the_documented_example_runs() -> None:
    tokens = 2000
    emb = np.random.default_rng(1).integers(0, 1 << 16, (tokens, 3584), np.uint16)
    ids, aux = np.arange(tokens, dtype=np.int32), np.arange(16, dtype=np.int64)
    layout = Layout(
        block_tokens=128,
        fields=[
            Field("embeddings", "bfloat16", (3584,)),
            Field("fill_ids", "int32"),
            Field("aux", "int64", (16,), per_room=True),
        ],
    )
    with Endpoint(
        pool=BlockPool(layout, blocks=64), transports="prefer:mooncake,tcp", listen="tcp://127.0.0.1:0"
    ) as tx:
        sender = tx.sender(room=42, required_ranks=1, tag="request-7")
        sender.send({"embeddings": emb, "fill_ids": ids, "aux": aux})
        assert isinstance(sender.poll(), KVPoll)
        with Endpoint(pool=BlockPool(layout, blocks=64), transports="prefer:mooncake,tcp") as rx:
            receiver = rx.receiver(room=42, peer=tx.address, tokens=1024, rank=0, ranks=1, resume="drain")
            data = receiver.result(timeout=10)
            assert list(data) == ["embeddings", "fill_ids", "aux"]
            assert bits(data["embeddings"]) == bits(emb)
            assert data["fill_ids"].tolist() == ids.tolist()
            assert data["aux"].tolist() == aux.tolist()
            assert sender.wait(SOON_S) is S
            assert receiver.history == (B, W, T, S)
            assert [part.tokens for part in receiver.parts] == [1024, 976]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("tokens", "parts"),
    [(1, [1]), (63, [63]), (64, [64]), (65, [64, 1]), (128, [64, 64]), (300, [64, 64, 64, 64, 44])],
)
def test_pain_15_any_size_arrives_in_parts(transport: str, tokens: int, parts: list[int]) -> None:
    data = make_data(tokens)
    with pair(transport) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 42)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert sender.wait(SOON_S) is S
        expected = (B, W, S) if len(parts) == 1 else (B, W, T, S)
        assert sender.history == receiver.history == expected
        assert [part.tokens for part in receiver.parts] == [part.tokens for part in sender.parts] == parts
        assert [part.is_last for part in sender.parts] == [False] * (len(parts) - 1) + [True]
        assert {part.transport for part in receiver.parts} == {transport}
        assert sender.gate is receiver.gate is Gate.closed
        assert sender.failure is receiver.failure is None
        assert sender.bytes_done == tokens * TOKEN_NBYTES + ROOM_NBYTES
        assert sender.wait_quiescent(SOON_S)
        assert receiver.wait_quiescent(SOON_S)


@pytest.mark.both
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_await(transport: str) -> None:
    data = make_data(100)

    async def receive() -> Any:
        with pair(transport) as (tx, rx):
            sender, receiver = open_pair(tx, rx, 1)
            sender.send(data)
            return await receiver, await receiver

    first, second = asyncio.run(receive())
    assert same(first, data)
    assert same(second, data)


@pytest.mark.both
def test_awaiting_a_room_that_fails_raises() -> None:
    async def receive() -> None:
        with pair() as (tx, rx):
            sender, receiver = open_pair(tx, rx, 1)
            until(lambda: receiver.poll() is W)
            sender.abort("not today")
            with pytest.raises(TransferFailed, match="not today"):
                await receiver

    asyncio.run(receive())


@pytest.mark.both
def test_an_await_that_is_given_up_leaves_the_room_alone() -> None:
    data = make_data(10)

    async def receive(receiver: Any) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(receiver, 0.02)

    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        asyncio.run(receive(receiver))
        assert not receiver.view._callbacks, "an engine that polls so leaves nothing behind"
        sender.send(data)
        assert same(receiver.result(SOON_S), data)


@pytest.mark.both
def test_a_loop_that_was_closed_while_it_awaited_harms_nobody() -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        loop = asyncio.new_event_loop()
        awaiting = loop.create_task(receiver._result_async())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        assert receiver.view._callbacks
        sender.send(make_data(10))
        assert receiver.wait(SOON_S) is S
        transfer(tx, rx, 2)
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            awaiting.cancel()


@pytest.mark.both
def test_a_timeout_leaves_the_room_alone() -> None:
    data = make_data(10)
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        with pytest.raises(TimeoutError, match=r"room 1 is \w+, waiting at \w+, after 0.01 s"):
            receiver.result(timeout=0.01)
        assert not sender.wait(timeout=0.01).is_terminal
        assert not sender.wait_quiescent(timeout=0.01)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)


@pytest.mark.both
def test_transfer_failed_carries_the_failure() -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 77)
        until(lambda: receiver.poll() is W)
        sender.abort("the request was cancelled")
        with pytest.raises(TransferFailed) as caught:
            receiver.result(SOON_S)
        assert caught.value.room == 77
        assert caught.value.failure is receiver.failure
        assert caught.value.failure.code is FailureCode.Aborted
        assert "the request was cancelled" in str(caught.value)
        assert receiver.poll() is KVPoll.Failed


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("order", ["send open receive", "open receive send", "receive open send"])
def test_either_side_may_come_first(transport: str, order: str) -> None:
    data = make_data(80)
    with pair(transport) as (tx, rx):
        if order == "receive open send":
            receiver = rx.receiver(5, peer=str(tx.address), tokens=64)
            until(lambda: parked(tx), "the reservation is parked")
            sender = tx.sender(5)
        else:
            sender = tx.sender(5)
            if order == "send open receive":
                sender.send(data)
            receiver = rx.receiver(5, peer=str(tx.address), tokens=64)
        if order != "send open receive":
            until(lambda: order != "open receive send" or receiver.poll() is W)
            sender.send(data)
        assert same(receiver.result(SOON_S), data)


@pytest.mark.both
def test_the_handle_tells_what_it_is() -> None:
    with pair() as (tx, rx):
        sender = tx.sender(room=9, required_ranks=2, tag="t")
        receiver = rx.receiver(room=9, peer=tx.address, rank=1, ranks=2, tag="u")
        assert (sender.room, sender.rank, receiver.room, receiver.rank) == (9, 0, 9, 1)
        assert repr(sender) == "<Sender room=9 rank=0 Bootstrapping>"
        assert repr(receiver) == "<Receiver room=9 rank=1 Bootstrapping>"
        assert receiver.part is None


# What is sent


@pytest.mark.both
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_copy_is_a_snapshot(transport: str) -> None:
    data = make_data(100)
    changed = {name: array.copy() for name, array in data.items()}
    with pair(transport) as (tx, rx):
        sender = tx.sender(1)
        sender.send(changed, copy=True)
        for array in changed.values():
            array[...] = 0
        assert same(rx.receiver(1, peer=str(tx.address), tokens=32).result(SOON_S), data)


@pytest.mark.both
def test_without_a_copy_the_arrays_are_borrowed() -> None:
    """What is sent is what the arrays hold when their part is staged, so they must be left alone."""
    data = make_data(100)
    with pair() as (tx, rx):
        sender = tx.sender(1)
        sender.send(data)
        data["fill_ids"][:] = 5
        assert rx.receiver(1, peer=str(tx.address)).result(SOON_S)["fill_ids"].tolist() == [5] * 100


def test_borrowed_arrays_are_let_go_of_once_quiescent() -> None:
    """Until then the room keeps them alive, whatever the host does."""
    faults = Faults()
    faults.hold()
    data = make_data(10)
    with pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        until(lambda: faults.submitted)
        assert tx.driver.outgoing.sources
        assert not sender.wait_quiescent(0.01)
        faults.release()
        assert receiver.wait(SOON_S) is S
        assert sender.wait_quiescent(SOON_S)
        assert tx.driver.outgoing.sources == {}


TORCH_FIELDS = [
    Field("b", "bfloat16", (3,)),
    Field("f", "float8_e4m3fn", (5,)),
    Field("g", "float8_e5m2"),
    Field("x", "float32", (2, 2)),
    Field("room", "int64", (3,), per_room=True),
]


def torch_data(tokens: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(tokens)
    return {
        "b": torch.randn(tokens, 3).to(torch.bfloat16),
        "f": torch.randn(tokens, 5).to(torch.float8_e4m3fn),
        "g": torch.randn(tokens).to(torch.float8_e5m2),
        "x": torch.randn(tokens, 2, 2),
        "room": torch.tensor([1, -2, 3]),
    }


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("arrays", ["auto", "torch", "numpy"])
def test_tensors_in_and_tensors_out(transport: str, arrays: str) -> None:
    """`auto` gives torch where torch has been imported, as it has here."""
    data, layout = torch_data(50), Layout(8, TORCH_FIELDS)
    both: dict[str, Any] = {"arrays": arrays}
    with pair(transport, tx={"pool": BlockPool(layout, 8)}, rx={"pool": BlockPool(layout, 4)}, **both) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None)
        sender.send(data)
        got = receiver.result(SOON_S)
    assert {name: bits(value) for name, value in got.items()} == {name: bits(value) for name, value in data.items()}
    if arrays == "numpy":
        assert {name: str(value.dtype) for name, value in got.items()} == {
            "b": "uint16", "f": "uint8", "g": "uint8", "x": "float32", "room": "int64"
        }  # fmt: skip
    else:
        assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in data.items()}
        assert {name: value.shape for name, value in got.items()} == {name: value.shape for name, value in data.items()}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_large_part_goes_in_several_tickets_and_shows_progress(transport: str) -> None:
    layout = Layout(256, [Field("kv", "uint8", (32_768,)), Field("ids", "int32")])
    random = np.random.default_rng(5)
    data = {"kv": random.integers(0, 256, (1100, 32_768), np.uint8), "ids": np.arange(1100, dtype=np.int32)}
    faults = Faults()
    faults.hold(2)  # of 36 MB, in tickets of at most 16 MiB
    with pair(transport, faults=faults, tx={"pool": BlockPool(layout, 5)}, rx={"pool": BlockPool(layout, 5)}) as (
        tx,
        rx,
    ):
        sender, receiver = open_pair(tx, rx, 1, tokens=1280)
        sender.send(data)
        if transport == "memory":
            until(lambda: sender.bytes_done == 32 << 20)
            assert not sender.poll().is_terminal
            faults.release()
        assert same(receiver.result(SOON_S), data)
        assert [part.tokens for part in receiver.parts] == [1100]
        assert sender.wait(SOON_S) is S
        assert sender.bytes_done == 1100 * 32_772


@pytest.mark.parametrize("transport", ANY_SOURCE)
def test_thousands_of_scattered_blocks(transport: str) -> None:
    """More pieces than one ticket may have, in any order on both sides."""
    layout, blocks = Layout(1, FIELDS), 3000
    (theirs, source), (ours, target) = adopted(blocks, layout), adopted(blocks, layout)
    random, data = np.random.default_rng(6), make_data(blocks)
    there, here = random.permutation(blocks), random.permutation(blocks)
    source["embeddings"][there, 0], source["fill_ids"][there, 0] = data["embeddings"], data["fill_ids"]
    source["aux"][there[0]] = data["aux"]
    with pair(transport, tx={"pool": theirs}, rx={"pool": ours}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, (1 << 63) - 1, tokens=None, resume="manual", blocks=here)
        sender.open(blocks)
        sender.send_blocks(there, blocks)
        assert receiver.wait(SOON_S) is S
        assert (target["embeddings"][here, 0] == data["embeddings"]).all()
        assert (target["fill_ids"][here, 0] == data["fill_ids"]).all()
        assert (target["aux"][here[0]] == data["aux"]).all()


# What cannot be sent


def test_what_does_not_fit_is_named_and_nothing_is_sent() -> None:
    good = make_data(10)
    bad: list[tuple[Any, type[Exception], str]] = [
        (None, InvalidInput, "dict of field name to array"),
        ([1, 2], InvalidInput, "dict of field name to array"),
        ({}, LayoutError, "field 'embeddings': missing"),
        ({k: v for k, v in good.items() if k != "aux"}, LayoutError, "field 'aux': missing"),
        ({**good, "extra": good["aux"]}, LayoutError, "field 'extra': not in the layout"),
        ({**good, "fill_ids": good["fill_ids"].astype(np.int64)}, LayoutError, "field 'fill_ids'.*int64.*int32"),
        (
            {**good, "embeddings": good["embeddings"][:, :4]},
            LayoutError,
            "field 'embeddings'.*give it the wanted shape",
        ),
        ({**good, "aux": good["aux"][:2]}, LayoutError, "field 'aux'"),
        ({**good, "fill_ids": good["fill_ids"][:9]}, LayoutError, "field 'fill_ids': has 9 tokens where"),
        ({**good, "fill_ids": good["fill_ids"].tolist()}, LayoutError, "field 'fill_ids'.*convert it"),
        ({**make_data(0), "aux": good["aux"]}, InvalidInput, "no tokens to send"),
    ]
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        for data, error, problem in bad:
            with pytest.raises(error, match=problem):
                sender.send(data)
        until(lambda: receiver.poll() is W)
        assert tx.driver.outgoing.sources == {}
        sender.send(good)  # the room is none the worse
        assert same(receiver.result(SOON_S), good)


@pytest.mark.both
def test_data_is_given_once() -> None:
    data = make_data(10)
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        with pytest.raises(InvalidInput, match="room 1 was given its data before"):
            sender.send(make_data(20))
        with pytest.raises(InvalidInput, match="room 1 was given its data before"):
            sender.open(5)
        assert same(receiver.result(SOON_S), data)
        with pytest.raises(InvalidInput, match="given its data before"):
            sender.send(data)


def test_a_managed_pool_takes_no_blocks() -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        with pytest.raises(InvalidInput, match=r"use BlockPool\.adopt\(\), or call send\(\)"):
            sender.open(5)
        with pytest.raises(InvalidInput, match="call open"):
            sender.send_blocks([0], 5)
        with pytest.raises(InvalidInput, match='resume="manual"'):
            receiver.resume([0])
        assert (sender.poll(), receiver.poll().is_terminal) == (sender.view.state, False)


def test_an_adopted_pool_takes_only_blocks() -> None:
    with pair(tx={"pool": adopted(8)[0]}) as (tx, _):
        sender = tx.sender(1)
        with pytest.raises(InvalidInput, match=r"call open\(\) and send_blocks\(\)"):
            sender.send(make_data(10))
        for total in (0, -1, True, 2.0, None, "5"):
            with pytest.raises(InvalidInput, match=r"total_tokens=.*integer of at least 1"):
                sender.open(total)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match=r"call open\(total_tokens\) before"):
            sender.send_blocks([0], 5)
        sender.open(40)
        for blocks in ([8], [-1], [0, 99], ["0"], [1.0], None):
            with pytest.raises(ForeignBlock, match="block ids of this pool are 0 to 7"):
                sender.send_blocks(blocks, 5)  # type: ignore[arg-type]
        with pytest.raises(ForeignBlock, match="named twice"):
            sender.send_blocks([3, 3], 20)
        for blocks, tokens in (([0], 17), ([0, 1], 16), ([], 5)):
            with pytest.raises(InvalidInput, match="tokens take"):
                sender.send_blocks(blocks, tokens)
        for count in (0, -3, True, 1.5, "5", None):
            with pytest.raises(InvalidInput, match=r"tokens=.*integer of at least 1"):
                sender.send_blocks([0], count)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="48 tokens in a room opened for 40"):
            sender.send_blocks([0, 1, 2], 48)
        with pytest.raises(InvalidInput, match="given its data before"):
            sender.open(40)
        assert tx.driver.outgoing.sources == {}


# Memory and blocks of the engine's own


@pytest.mark.parametrize("transport", ANY_SOURCE)
@pytest.mark.parametrize("chunks", [[100], [40, 60], [7, 16, 1, 30, 46], [16, 16, 68]])
def test_chunks_from_an_engines_own_blocks(transport: str, chunks: list[int]) -> None:
    """Chunked prefill: chunks end inside blocks, parts end inside chunks, and the total alone says which is last."""
    data = make_data(sum(chunks))
    theirs, arrays = adopted(32)
    order = iter(np.random.default_rng(len(chunks)).permutation(32).tolist())
    with pair(transport, tx={"pool": theirs}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=48)
        sender.open(sum(chunks))
        at = 0
        for tokens in chunks:
            blocks = [next(order) for _ in range(-(-tokens // BLOCK_TOKENS))]
            for number, block in enumerate(blocks):
                low = number * BLOCK_TOKENS
                size = min(BLOCK_TOKENS, tokens - low)
                arrays["embeddings"][block, :size] = data["embeddings"][at + low : at + low + size]
                arrays["fill_ids"][block, :size] = data["fill_ids"][at + low : at + low + size]
            if not at:
                arrays["aux"][blocks[0]] = data["aux"]
            sender.send_blocks(blocks, tokens)
            at += tokens
        assert same(receiver.result(SOON_S), data)
        assert sender.wait(SOON_S) is S
        assert [part.is_last for part in sender.parts] == [False] * (len(sender.parts) - 1) + [True]
        assert sender.wait_quiescent(SOON_S)
        assert tx.load().free == 32


@pytest.mark.parametrize("transport", ANY_SOURCE)
def test_a_chunk_is_sent_before_the_next_is_there(transport: str) -> None:
    theirs, arrays = adopted(4)
    with pair(transport, tx={"pool": theirs}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=64)
        sender.open(30)
        arrays["fill_ids"][2, :10] = range(10)
        sender.send_blocks([2], 10)
        until(lambda: receiver.poll() is T)
        assert [(part.tokens, part.is_last) for part in receiver.parts] == [(10, False)]
        until(lambda: sender.gate is Gate.queued and receiver.gate is Gate.queued)
        arrays["fill_ids"][3] = range(10, 26)
        arrays["fill_ids"][0, :4] = range(26, 30)
        sender.send_blocks([3, 0], 20)
        assert receiver.result(SOON_S)["fill_ids"].tolist() == list(range(30))
        assert [(part.offset, part.tokens, part.is_last) for part in sender.parts] == [(0, 10, False), (10, 20, True)]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 24), (64, 7), (5, 32)])
def test_pain_19_block_sizes_may_differ(transport: str, sizes: tuple[int, int]) -> None:
    fields, data = list(LAYOUT.fields), make_data(101)
    tx_pool, rx_pool = BlockPool(Layout(sizes[0], fields), 40), BlockPool(Layout(sizes[1], fields), 40)
    with pair(transport, tx={"pool": tx_pool}, rx={"pool": rx_pool}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=50)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)


def gather(arrays: dict[str, Any], part: Any, name: str) -> Any:
    """The tokens of a part, from an engine's own blocks."""
    return np.concatenate([arrays[name][block] for block in part.blocks])[: part.tokens]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_manual_resume_into_an_engines_own_blocks(transport: str) -> None:
    """The engine names the blocks of each part, keeps them as long as it likes, and gives them back."""
    data = make_data(75)
    ours, arrays = adopted(8)
    with pair(transport, rx={"pool": ours}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[5, 2])
        sender.send(data)
        got: list[Any] = []
        for blocks in ([5, 2], [7, 0], [5]):
            if got:
                receiver.resume(blocks)
            until(lambda: len(receiver.parts) == len(got) + 1)
            part = receiver.part
            assert part is not None
            assert part.blocks == tuple(blocks)
            got.append(gather(arrays, part, "fill_ids"))
            if part.part == 0:
                assert arrays["aux"][5].tolist() == data["aux"].tolist()
                receiver.release(0)
            if not part.is_last:
                until(lambda: receiver.gate is Gate.waiting_resume)
        assert receiver.wait(SOON_S) is S
        assert receiver.history == (B, W, T, S)
        assert [astuple(part)[1:4] for part in receiver.parts] == [(0, 32, False), (32, 32, False), (64, 11, True)]
        assert np.concatenate(got).tolist() == data["fill_ids"].tolist()
        assert receiver.wait_quiescent(SOON_S)
        assert rx.load().leased == 3  # parts 1 and 2 are the engine's until it says otherwise
        receiver.release(1)
        receiver.release(1)
        receiver.release(2)
        until(lambda: rx.load().free == 8)
        with pytest.raises(InvalidInput, match="read them by `part`"):
            receiver.result(0)


def test_blocks_that_are_ours_are_not_the_hosts_to_release() -> None:
    """With `extend` the first parts are copied out with the last one; released before, they would be another room's."""
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, resume="extend", tokens=16)
        with pytest.raises(InvalidInput, match="gives blocks back by itself"):
            receiver.release(0)
        sender.send(make_data(100))
        assert same(receiver.result(SOON_S), make_data(100))
    with pair(rx={"pool": adopted(8)[0]}) as (tx, rx):
        _, receiver = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[1])
        for part in ("0", -1, [0]):
            with pytest.raises(InvalidInput, match="part="):
                receiver.release(part)  # type: ignore[arg-type]


def test_manual_blocks_go_back_with_the_room() -> None:
    with pair(rx={"pool": adopted(8)[0]}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[1, 3])
        sender.send(make_data(20))
        assert receiver.wait(SOON_S) is S
        assert rx.load().leased == 2
        receiver.clear()
        until(lambda: rx.load().free == 8)


def test_resume_only_where_it_is_awaited_and_with_blocks_there_are() -> None:
    with pair(rx={"pool": adopted(8)[0]}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[0])
        with pytest.raises(InvalidInput, match="takes no resume now"):
            receiver.resume([1])
        sender.send(make_data(20))
        until(lambda: receiver.gate is Gate.waiting_resume)
        for blocks in ([], [8], [-1], ["1"], 1):
            with pytest.raises(ForeignBlock, match="0 to 7, and at least one is needed"):
                receiver.resume(blocks)  # type: ignore[arg-type]
        with pytest.raises(ForeignBlock, match="twice"):
            receiver.resume([1, 1])
        receiver.resume([1])
        assert receiver.wait(SOON_S) is S


def test_resume_with_a_block_in_use_is_refused_and_the_room_waits_for_another() -> None:
    with pair(rx={"pool": adopted(8)[0]}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[0])
        sender.send(make_data(20))
        until(lambda: receiver.gate is Gate.waiting_resume)
        with pytest.raises(ForeignBlock, match="held by a room"):
            receiver.resume([0])
        receiver.release(0)
        receiver.resume([0])
        assert receiver.wait(SOON_S) is S


def test_integers_of_numpy_are_integers() -> None:
    """Engines keep block tables and lengths in arrays; msgspec could not encode what is in them."""
    theirs, arrays = adopted(8)
    ours, _ = adopted(8)
    with pair(tx={"pool": theirs}, rx={"pool": ours}) as (tx, rx):
        table = np.array([3, 6, 1])
        room, ranks = np.array([5, 1])
        sender, receiver = open_pair(tx, rx, room, tokens=None, ranks=ranks, resume="manual", blocks=table[:2])
        sender.open(np.int64(40))
        arrays["fill_ids"][table] = np.arange(48).reshape(3, 16)
        sender.send_blocks(table, np.int64(40))
        until(lambda: receiver.gate is Gate.waiting_resume)
        receiver.resume(table[2:])
        assert receiver.wait(SOON_S) is S
        assert [part.blocks for part in receiver.parts] == [(3, 6), (1,)]


# Making room


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("resume", ["drain", "extend"])
@pytest.mark.parametrize("blocks", [2, 5, 64])
def test_makes_room_by_itself(transport: str, resume: str, blocks: int) -> None:
    """`extend` takes fresh blocks while there are some, and drains once there are none."""
    data = make_data(200)
    with pair(transport, rx={"pool": BlockPool(LAYOUT, blocks)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=32, resume=resume)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert [part.tokens for part in receiver.parts] == [32] * 6 + [8]
        used = [part.blocks for part in receiver.parts]
        assert len({block for part in used for block in part}) == (2 if resume == "drain" or blocks == 2 else min(
            blocks - blocks % 2, 14
        ))  # fmt: skip
        assert receiver.wait_quiescent(SOON_S)
        until(lambda: rx.load().free == blocks)


# Ending a room


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("state", ["alone", "bootstrapping", "waiting", "moving", "transferring"])
def test_pain_02_an_abort_in_any_state_is_told_to_the_peer(side: str, state: str) -> None:
    faults = Faults()
    faults.hold(0 if state == "moving" else 1)
    ranks = 2 if state == "bootstrapping" else 1
    with pair(faults=faults) as (tx, rx):
        if state == "alone" and side == "sender":
            sender = tx.sender(1)
            sender.abort("why not")
            assert failed(sender).detail == "why not"
            return
        receiver = rx.receiver(1, peer=str(tx.address), tokens=32, ranks=ranks)
        if state == "alone":
            until(lambda: parked(tx))
            receiver.abort("why not")
            assert failed(receiver).detail == "why not"
            until(lambda: not parked(tx), "the reservation is withdrawn")
            return
        sender = tx.sender(1)
        if state in ("moving", "transferring"):
            sender.send(make_data(50))
        until(
            {
                "bootstrapping": lambda: any(s.slots for s in tx.driver.core.sessions.values()),  # type: ignore[attr-defined]
                "waiting": lambda: receiver.poll() is W,
                "moving": lambda: sender.gate is Gate.moving,
                "transferring": lambda: receiver.poll() is T and faults.submitted == 2,
            }[state]
        )
        (sender if side == "sender" else receiver).abort("why not")
        for handle in (sender, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.Aborted
            assert failure.detail == "why not"
            assert failure.rank == (None if side == "sender" else 0)
            assert handle.wait_quiescent(SOON_S)
        until(lambda: tx.load().free == 64 and rx.load().free == 64)
        handle.abort("again")
        assert failed(handle).detail == "why not"


@pytest.mark.parametrize("reason", [b"bytes", None, ValueError("x"), "\ud800" * 2000, ""])
def test_any_reason_can_be_told(reason: Any) -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        receiver.abort(reason)
        assert failed(sender).code is failed(receiver).code is FailureCode.Aborted
        assert failed(sender).detail == failed(receiver).detail
        transfer(tx, rx, 2)


@pytest.mark.both
def test_after_success_an_abort_changes_nothing() -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(10))
        assert receiver.wait(SOON_S) is S
        assert sender.wait(SOON_S) is S
        sender.abort("late")
        receiver.abort("late")
        tx.load(), rx.load()  # both drivers have had a turn
        assert (sender.poll(), receiver.poll()) == (S, S)
        assert sender.failure is receiver.failure is None


@pytest.mark.both
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_clearing_a_live_room_aborts_the_peer(side: str) -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        (sender if side == "sender" else receiver).clear()
        for handle in (sender, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.Aborted
            assert "cleared while the room was live" in failure.detail
        transfer(tx, rx, 2)


def test_a_cleared_room_still_tells_when_its_arrays_are_free() -> None:
    faults = Faults()
    faults.hold()
    with pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(10))
        until(lambda: faults.submitted)
        with driver_stopped(tx):
            sender.clear()
            assert not sender.wait_quiescent(0.01)
        assert sender.wait_quiescent(SOON_S)
        assert failed(sender).code is FailureCode.Aborted
        assert failed(receiver).code is FailureCode.Aborted


@pytest.mark.both
def test_a_cleared_handle_has_no_hold_on_the_next_room_of_its_number() -> None:
    with pair() as (tx, rx):
        old_sender, old = open_pair(tx, rx, 1)
        until(lambda: old.poll() is W)
        old_sender.clear()
        old.clear()
        sender, receiver = open_pair(tx, rx, 1)
        for handle in (old_sender, old):
            handle.clear()
            handle.abort("from the past")
        old_sender.send(make_data(5))
        data = make_data(100)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert failed(old).code is failed(old_sender).code is FailureCode.Aborted


@pytest.mark.both
def test_methods_may_be_called_from_any_thread() -> None:
    data = make_data(40)
    with pair() as (tx, rx):
        results: dict[int, bool] = {}

        def use(room: int) -> None:
            sender, receiver = open_pair(tx, rx, room, tokens=16)
            sender.send(data)
            results[room] = same(receiver.result(SOON_S), data)
            sender.clear()
            receiver.clear()

        threads = [threading.Thread(target=use, args=(room,), daemon=True) for room in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON_S)
        assert results == dict.fromkeys(range(16), True)
