"""The documentation says what the code does: its code runs, its generated parts are fresh, its names exist.

`python tests/test_docs.py` writes the generated parts anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import kvpoll_fsm
from kvpoll_fsm import Deadlines, FailureCode, KVPoll, Limits, errors, tables
from kvpoll_fsm.settings import OPTIONS, SETTINGS, variable

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WALK = ROOT / "docs" / "how-a-transfer-works.md"
API = ROOT / "docs" / "api.md"
PAINS = ROOT / "docs" / "users-pains.md"

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


# Code. A block follows on the ones before it on its page; one that starts with "# name.py" is a file. A text block
# right behind a block is what it prints.

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\w+\.py)\n")
PORT = re.compile(r"(tcp://127\.0\.0\.1):\d+")

RUNNER = """
import contextlib, io, json, sys
page, namespace, printed = json.load(sys.stdin), {"__name__": "__main__"}, []
for number, code in enumerate(page["blocks"], 1):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, f"{page['name']}, block {number}", "exec"), namespace)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


def python_blocks(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each Python block of a page, and what it is said to print (None: nothing is said)."""
    text = path.read_text()
    fences = list(FENCE.finditer(text))
    for fence, follower in zip(fences, [*fences, None][1:], strict=True):
        if fence[1] != "python":
            continue
        follows = follower is not None and follower[1] == "text" and not text[fence.end() : follower.start()].strip()
        yield fence[2], follower[2] if follower is not None and follows else None


def session_blocks(path: Path) -> list[tuple[str, str | None]]:
    return [block for block in python_blocks(path) if not FILE.match(block[0])]


@pytest.mark.parametrize("path", [p for p in PAGES if session_blocks(p)], ids=lambda path: path.name)
def test_blocks_run(path: Path) -> None:
    blocks = session_blocks(path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps({"name": path.name, "blocks": [code for code, _ in blocks]}),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    said = [text for _, text in blocks]
    assert [out if text is not None else None for out, text in zip(printed, said, strict=True)] == said


def test_two_processes_of_the_tutorial(tmp_path: Path) -> None:
    tutorial = ROOT / "docs" / "tutorial.md"
    for code, _ in python_blocks(tutorial):
        if name := FILE.match(code):
            (tmp_path / name[1]).write_text(code)
    consoles = [fence[2].splitlines() for fence in FENCE.finditer(tutorial.read_text()) if fence[1] == "console"]
    said = {lines[0].split()[2]: lines[1:] for lines in consoles if lines[0].startswith("$ python ")}
    run = [sys.executable, "-W", "error"]
    with subprocess.Popen([*run, "sender.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        address = sender.stdout.readline().strip()
        try:
            out = subprocess.run(
                [*run, "receiver.py", address], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=30
            )
            assert out.stdout.splitlines() == said["receiver.py"]
            rest = sender.communicate(timeout=30)[0]
        finally:
            sender.kill()
    assert [PORT.sub(r"\1", line) for line in [address, *rest.splitlines()]] == [
        PORT.sub(r"\1", line) for line in said["sender.py"]
    ]


# Generated parts


def codes() -> str:
    rows = [(code, errors.Failure.of(code, "", state=KVPoll.Failed).retryable) for code in FailureCode]
    lines = ["| code | retryable |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{code}` | {'yes' if retryable else 'no'} |" for code, retryable in rows)])


def error_tree() -> str:
    tree = inspect.getdoc(errors) or ""
    return f"```text\n{tree[tree.index('KvpollError') :].split(chr(10) * 2)[0]}\n```"


def settings() -> str:
    rows = [
        ("` `".join([*(f"[{name}]" for name in key[:-1]), key[-1]]), variable(key), s) for key, s in SETTINGS.items()
    ]
    lines = ["| in the file | variable | what it may be | default |", "| --- | --- | --- | --- |"]
    for name, named, setting in rows:
        default = "none" if setting.default in (None, ()) else f"`{json.dumps(setting.default)}`"
        lines.append(f"| `{name}` | `{named}` | {setting.kind.wanted} | {default} |")
    options = "`[transport_options.NAME]` `SETTING`", f"`{variable((OPTIONS, 'NAME', 'SETTING'))}`"
    return "\n".join([*lines, f"| {' | '.join(options)} | what the transport says | the transport's |"])


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings,
    "table": tables.markdown,
    "diagram": lambda: f"```mermaid\n{tables.mermaid()}\n```",
    "deadlines": tables.deadlines_markdown,
    "codes": codes,
    "errors": error_tree,
}
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def regenerated(text: str) -> str:
    return MARKED.sub(lambda part: f"{part[1]}{GENERATED[part[2]]()}\n{part[4]}", text)


@page
def test_generated_parts_are_fresh(path: Path) -> None:
    text = path.read_text()
    assert text == regenerated(text), "write them anew: .venv/bin/python tests/test_docs.py"
    assert text.count("<!-- generated:") == len(MARKED.findall(text)) == text.count("<!-- end -->")


def test_everything_that_can_be_generated_is_somewhere() -> None:
    assert {part[1] for path in PAGES for part in MARKED.findall(path.read_text())} == GENERATED.keys()


# Links


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text())
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "")).lower().replace(" ", "-") for head in heads}


@page
def test_links_resolve(path: Path) -> None:
    text = FENCE.sub("", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# Names

DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\([^`]*\))?`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def resolve(name: str) -> Any:
    """What a dotted name stands for: `module.Class.method` of the library, `Class.method` of its front, or any import.

    Raises:
        LookupError: Nothing.
    """
    first, *rest = name.split(".")
    if hasattr(kvpoll_fsm, first):
        with contextlib.suppress(AttributeError):
            return follow(getattr(kvpoll_fsm, first), rest)
    for home, cut in itertools.product(("kvpoll_fsm.", ""), range(len(rest), -1, -1)):
        try:
            return follow(importlib.import_module(home + ".".join([first, *rest[:cut]])), rest[cut:])
        except (ImportError, AttributeError):
            continue
    raise LookupError(name)


def follow(value: Any, path: list[str]) -> Any:
    for step in path:
        declared = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        slots = getattr(value, "__slots__", ())
        value = step if step in declared or step in slots else getattr(value, step)
    return value


def dotted(text: str) -> list[str]:
    files = (".py", ".md", ".toml", ".txt", ".key", ".key_secret")
    return [name for name in DOTTED.findall(FENCE.sub("", text)) if not name.endswith(files)]


@page
def test_names_exist(path: Path) -> None:
    unknown = []
    for name in dotted(path.read_text()):
        try:
            resolve(name)
        except LookupError:
            unknown.append(name)
    assert not unknown


@page
def test_tests_and_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    for file, name in TEST.findall(text):
        assert re.search(rf"^\s*(?:async def|def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.MULTILINE), (
            name
        )
    for file in re.findall(r"`((?:kvpoll_fsm|transports|tests|docs)/[\w/.]*)`", text):
        assert (ROOT / file).exists(), file


def test_there_are_28_pains_in_order() -> None:
    assert re.findall(r"^\| (\d+) \|", PAINS.read_text(), re.MULTILINE) == [str(n) for n in range(1, 29)]


def test_every_pain_has_tests_of_its_name_and_its_row_names_them_all() -> None:
    """`test_pain_NN_...` shows row NN, and is named there and in no other row."""
    found: dict[int, set[str]] = {number: set() for number in range(1, 29)}
    for path in (ROOT / "tests").rglob("*.py"):
        for name, number in re.findall(r"^ *def (test_pain_(\d\d)_\w+)", path.read_text(), re.MULTILINE):
            found[int(number)].add(f"{path.relative_to(ROOT)}::{name}")
    rows = dict(re.findall(r"^\| (\d+) \|.*\|(.*)\|$", PAINS.read_text(), re.MULTILINE))
    for number, tests in found.items():
        assert tests, f"no test is named test_pain_{number:02}_..."
        named = {f"{file}::{name}" for file, name in TEST.findall(rows[str(number)]) if name.startswith("test_pain_")}
        assert named == tests, f"row {number} of docs/users-pains.md"


def test_every_public_name_is_documented() -> None:
    text = API.read_text()
    tree = {error for error in errors.__all__ if re.search(rf"\b{error}\b", error_tree())}
    assert [name for name in kvpoll_fsm.__all__ if name not in tree and not re.search(rf"`{name}\b", text)] == []


def section(title: str) -> str:
    return re.split(r"^## ", API.read_text().partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


SECTIONS = {
    "Endpoint": "Endpoint",
    "Sender": "Sender",
    "Receiver": "Receiver",
    "BlockPool": "BlockPool",
    "Layout": "Field and Layout",
    "Field": "Field and Layout",
    "StatusBoard": "StatusBoard",
    "Lifecycle": "Lifecycle and its events",
}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_public_member_is_documented(name: str) -> None:
    text = section(SECTIONS[name]) + (section("Sender and Receiver") if name in ("Sender", "Receiver") else "")
    assert text
    members = [
        member for member in dir(getattr(kvpoll_fsm, name)) if not member.startswith("_") and member != "dropped"
    ]
    declared = (
        [field.name for field in dataclasses.fields(getattr(kvpoll_fsm, name))] if name in ("Layout", "Field") else []
    )
    assert [m for m in members if m not in declared and not re.search(rf"`\.{m}\b", text)] == []


def test_every_setting_of_an_endpoint_is_documented_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", section("Endpoint"), re.MULTILINE))
    parameters = list(inspect.signature(kvpoll_fsm.Endpoint).parameters.values())
    assert list(rows) == [parameter.name for parameter in parameters]
    assert {parameter.default for parameter in parameters[1:]} == {None}, "None is: not given"
    for key, setting in SETTINGS.items():
        if len(key) == 1:
            shown = f'"{setting.default}"' if isinstance(setting.default, str) else str(setting.default)
            assert rows[key[0]].split(": ")[0].strip("` ") == shown, key


@pytest.mark.parametrize("opening", ["sender", "receiver"])
def test_openings_are_documented_with_their_defaults(opening: str) -> None:
    shown = re.search(rf"`\.{opening}\(([^`]*)\)`", section("Endpoint"))
    assert shown is not None
    parameters = list(inspect.signature(getattr(kvpoll_fsm.Endpoint, opening)).parameters.values())[1:]
    plain = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])
    assert f"({shown[1]})" == str(plain).replace("'", '"')


def test_deadlines_are_documented_with_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", section("Deadlines"), re.MULTILINE)
    assert {name: float(value) for name, value in rows} == dataclasses.asdict(Deadlines())


def test_limits_are_documented_with_their_defaults() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    table = re.split(r"^\| `Limits` \|.*$", page, maxsplit=1, flags=re.MULTILINE)[1].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", table, re.MULTILINE)
    assert {name: float(value) for name, value in rows} == dataclasses.asdict(Limits())


def test_settings_of_tcp_are_documented() -> None:
    from kvpoll_tcp import TcpSettings

    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", (ROOT / "docs" / "transports.md").read_text(), re.MULTILINE))
    for field in dataclasses.fields(TcpSettings):
        if field.name not in ("host", "advertise"):  # the endpoint fills these in
            assert rows[field.name].split(":")[0].strip() == str(field.default), field.name


# The walk: a real transfer passes the functions that the page names, in that order.

TRACER = """
import json, sys, threading
import numpy as np
import kvpoll_fsm
from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout
from tests.test_docs import code_of
names, wanted, passed = json.load(sys.stdin), {}, []
for name in names:
    wanted.setdefault(code_of(name), name)

def look(frame, event, arg):
    name = wanted.get(frame.f_code)
    if name is not None and event == ("return" if name == names[-1] else "call"):  # the last step is a return
        passed.append(name)

layout = Layout(block_tokens=128, fields=[Field("x", "float32", (64,))])
threading.setprofile(look)
pools = BlockPool(layout, blocks=8), BlockPool(layout, blocks=8)
here = {"transports": "tcp", "isolation": "thread"}
with Endpoint(pool=pools[0], **here) as tx, Endpoint(pool=pools[1], **here) as rx:
    sender = tx.sender(room=42, required_ranks=1)
    receiver = rx.receiver(room=42, peer=str(tx.address), tokens=1024)
    sender.view.wait_until(lambda: sender.poll() is KVPoll.WaitingForInput, 10)
    passed.clear()
    sys.setprofile(look)
    sender.send({"x": np.zeros((500, 64), np.float32)})
    receiver.result(timeout=10)
    sys.setprofile(None)
    sender.wait_quiescent(timeout=10)
    assert [str(state) for state in sender.history] == ["Bootstrapping", "WaitingForInput", "Success"]
json.dump(passed, sys.stdout)
"""


def code_of(name: str) -> Any:
    function = inspect.unwrap(getattr(resolve(name), "__func__", resolve(name)))
    assert isinstance(function, FunctionType), name
    return function.__code__


def steps() -> list[list[str]]:
    """The names of each numbered step of the walk."""
    walk = WALK.read_text().partition("\n## One part, followed")[2]
    numbered = re.split(r"^\d+\. ", walk.partition("\nWith a part that is not the last")[0], flags=re.MULTILINE)[1:]
    return [dotted(step) for step in numbered]


def test_a_real_transfer_passes_the_functions_of_the_walk_in_order() -> None:
    listed = [name for step in steps() for name in step]
    assert len(listed) > 40
    done = subprocess.run(
        [sys.executable, "-c", TRACER], input=json.dumps(listed), capture_output=True, text=True, timeout=50, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    passed = json.loads(done.stdout)
    assert set(listed) <= set(passed)
    rest = iter(passed)
    for before, name in pairwise(["the start", *listed]):
        assert name in rest, f"{name} is not passed behind {before}"  # reads on from where `before` was found


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(regenerated(each.read_text()))
