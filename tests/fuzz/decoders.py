"""What takes apart bytes that come from elsewhere: packets, descriptors, traces, key files, files of the explorer.

Each target takes bytes and returns if all is well: what came out is a value that survives being written and read
again, or the error that is documented. Everything else leaves as the exception it is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq
from click.testing import CliRunner

from kvpoll_common.regions import read_regions
from kvpoll_fsm.cli_tools import check_trace
from kvpoll_fsm.demos.lines import Lines
from kvpoll_fsm.errors import InvalidInput, MalformedMessage, UnsupportedVersion
from kvpoll_fsm.messages import PROTOCOL, Hello, Packet, Welcome, decode, encode
from kvpoll_fsm.security import Keys, generate_keys
from kvpoll_fsm.testing.counterexample import Counterexample
from kvpoll_fsm.trace import MessageRecord, Record, check, decode_line, encode_line
from kvpoll_tcp.handshake import read_descriptor
from tests.fuzz.choices import Choices

END_OF_FILE = b"\n=====\n"
"""Parts the files of a target that takes two."""


@functools.cache
def folder() -> Path:
    """A folder of this process's own; it goes when the process ends."""
    made = tempfile.mkdtemp(prefix="kvpoll-fuzz-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def parts_of(value: Any) -> Iterator[Any]:
    """A value and everything in it."""
    yield value
    if isinstance(value, msgspec.Struct):
        value = [getattr(value, name) for name in value.__struct_fields__]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from parts_of(part)


def packet(data: bytes) -> None:
    """The control plane: a packet, or one of two errors."""
    try:
        taken = decode(data)
    except MalformedMessage:
        return
    except UnsupportedVersion as error:
        low, high = error.theirs
        if set(range(low, high + 1)) & set(range(PROTOCOL[0], PROTOCOL[1] + 1)):
            raise
        return
    survives(taken)
    assert sum(1 for _ in parts_of(taken)) <= 32 * len(data) + 64, "much from little"
    if isinstance(taken, (Hello, Welcome)):
        assert taken.min_version <= taken.max_version


def survives(taken: Packet) -> None:
    """What was taken can be said again, and means the same."""
    again = decode(encode(taken))
    assert again == taken
    assert hash(again) == hash(taken)
    assert encode(again) == encode(taken)


def trace_line(data: bytes) -> None:
    """A line of a trace: a record, or MalformedMessage."""
    try:
        record = decode_line(data)
    except MalformedMessage:
        return
    for problem in check([record, record]):
        assert problem.isprintable(), "a trace writes on the terminal"
    try:
        line = encode_line(record)
    except (OverflowError, RecursionError):
        assert isinstance(record, MessageRecord), "only what others said may be read and not written"
        return
    assert line.count(b"\n") == 1
    assert decode_line(line) == record


def trace_files(data: bytes) -> None:
    """`kvpoll check-trace` with two files: status 2 names file and line, 1 a problem, 0 neither."""
    files = [folder() / "one.jsonl", folder() / "two.jsonl"]
    contents = [*data.split(END_OF_FILE, 1), b""][:2]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    result = CliRunner().invoke(check_trace, [str(path) for path in files])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    records: list[Record] = []
    for path, content in zip(files, contents, strict=True):
        for number, line in enumerate(content.splitlines(), 1):
            try:
                records.append(decode_line(line))
            except MalformedMessage:
                assert result.exit_code == 2, result.output
                said = re.sub(r"\s+", "", result.output)
                assert f"{path.name},line{number}:" in said, result.output
                return
    problems = check(records)
    assert result.exit_code == (1 if problems else 0), result.output
    assert all(problem in result.output for problem in problems)


def descriptor(data: bytes) -> None:
    """What a peer offers for tcp: a descriptor that can be tried, or a typed error. Regions of it likewise."""
    with contextlib.suppress(InvalidInput):
        read_regions([data], "tcp")
    try:
        taken = read_descriptor(data)
    except InvalidInput:
        return
    assert read_descriptor(msgspec.msgpack.encode(taken)) == taken
    assert taken.secret.hex() not in f"{taken} {taken!r}"
    with contextlib.suppress(OSError):  # an interface that this machine has not
        socket.getaddrinfo(taken.host, taken.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)


def key_files(data: bytes) -> None:
    """A secret key file and one in the folder of trusted keys: keys that ZeroMQ takes, or InvalidInput."""
    secret, trusted = folder() / "own.key_secret", folder() / "trusted"
    trusted.mkdir(exist_ok=True)
    contents = [*data.split(END_OF_FILE, 1), b""][:2]
    secret.write_bytes(contents[0])
    secret.chmod(0o600)
    (trusted / "peer.key").write_bytes(contents[1])
    try:
        keys = Keys.load(secret, trusted)
    except InvalidInput:
        return
    assert keys.secret.decode() not in repr(keys)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        keys.protect_listener(router)
        for peer in keys.authorized:
            keys.protect_caller(dealer, peer)
            assert keys.admits(peer)


def key_name(data: bytes) -> None:
    """A name for `kvpoll keygen`: two files in the folder and nowhere else, or InvalidInput."""
    with tempfile.TemporaryDirectory(dir=folder()) as made:
        inside = Path(made) / "keys"
        if len(data) % 2:
            inside.mkdir()
        try:
            public, secret = generate_keys(inside, data.decode("utf-8", "surrogateescape"))
        except InvalidInput:
            return
        assert sorted(inside.iterdir()) == sorted([public, secret])
        assert [*Path(made).iterdir()] == [inside]
        assert secret.stat().st_mode & 0o777 == 0o600


def counterexample(data: bytes) -> None:
    """A file for `kvpoll explore --replay`: a counterexample, or InvalidInput. Small ones are performed."""
    path = folder() / "counterexample.json"
    path.write_bytes(data)
    try:
        found = Counterexample.read(path)
    except InvalidInput:
        return
    assert Counterexample.read(found.write(folder())) == found
    scene = found.scene
    small = max(scene.ranks, scene.parts, scene.pool, scene.source_pool, len(scene.rooms), len(scene.transports)) <= 3
    if small and len(found.run) <= 30:
        with contextlib.suppress(InvalidInput):
            found.replay()


def demo_lines(data: bytes) -> None:
    """What the demo's processes say to each other, in pieces: the same messages as in one, or ValueError."""
    choices = Choices(data)
    width, text = 1 + choices.below(16), choices.rest()
    whole, pieces = Lines(), Lines()
    try:
        expected = whole.feed(text)
    except ValueError:
        expected = None
    try:
        got = [message for at in range(0, len(text), width) for message in pieces.feed(text[at : at + width])]
    except ValueError:
        got = None
    assert repr(got) == repr(expected)
