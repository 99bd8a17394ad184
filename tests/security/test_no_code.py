"""Nothing that a peer sends is ever run: no shipped module can turn data into code. Pain 24.

Every call and import in every shipped module is looked at; what is allowed is named here, with its reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "pyproject.toml"

MODULES = frozenset(
    (
        *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "jsonpickle", "marshal", "shelve", "dbm", "copyreg"),
        *("code", "codeop", "runpy", "imp", "yaml", "multiprocessing", "xmlrpc", "joblib", "pandas"),
    )
)
"""Each of them reads data that can run code, or is a way to it."""
CALLS = frozenset(["eval", "exec", "compile", "__import__", "execfile"])
METHODS = {
    "torch": frozenset({"load", "jit"}),
    "np": frozenset({"load", "fromfile", "loadtxt", "genfromtxt"}),
    "numpy": frozenset({"load", "fromfile", "loadtxt", "genfromtxt"}),
    "zmq": frozenset(),
}
ANY_OBJECT = frozenset(["recv_pyobj", "send_pyobj", "recv_serialized", "loads_object", "read_pickle"])
"""pyzmq's methods that pickle."""
SHELL = frozenset(["system", "popen"])

EXPLORER = "the explorer's own worker processes, which it starts itself; no endpoint and no peer is near"
OWN = "a submodule of our own, by a name written down in that file"
ALLOWED: dict[tuple[str, str], str] = {
    ("kvpoll_fsm/cli_tools.py", "multiprocessing"): EXPLORER,
    ("kvpoll_fsm/cli_simulate.py", "multiprocessing"): EXPLORER,
    ("kvpoll_fsm/__init__.py", "import_module"): OWN,
    ("transports/kvpoll_mooncake/__init__.py", "import_module"): OWN,
    ("kvpoll_fsm/testing/conformance/__init__.py", "import_module"): f"{OWN}; and pytest",
    ("kvpoll_fsm/testing/conformance/spec.py", "import_module"): "the transport that whoever runs the tests has named",
}
"""(module, what) -> why."""


def shipped() -> list[Path]:
    """What goes into the wheel, by its own list."""
    listed = re.search(
        r"^\[tool\.hatch\.build\.targets\.wheel\]\npackages = (\[.*?\])$", PROJECT.read_text(), re.M | re.S
    )
    assert listed is not None
    packages = ast.literal_eval(listed[1])
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def suspicious(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module that might turn data into code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if is_listed(alias.name))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_listed(name) or name.endswith(".import_module"))
        elif isinstance(node, ast.Name) and node.id in CALLS:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield from ((node.lineno, found) for found in attribute(node))
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            yield node.value.lineno, f"{node.arg}="


def is_listed(name: str) -> bool:
    return name in MODULES or name.split(".")[0] in MODULES


def attribute(node: ast.Attribute) -> Iterator[str]:
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    if node.attr in METHODS.get(owner, ()) or node.attr in ANY_OBJECT or (owner == "os" and node.attr in SHELL):
        yield f"{owner}.{node.attr}"
    if owner in ("builtins", "__builtins__") and node.attr in CALLS:
        yield f"{owner}.{node.attr}"
    if node.attr == "import_module":
        yield "import_module"


def test_the_shipped_modules_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in shipped()}
    assert {"kvpoll_fsm/messages.py", "transports/kvpoll_tcp/wire.py", "kvpoll_fsm/testing/explore.py"} <= names
    assert len(names) > 60


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pain_24_no_module_can_turn_data_into_code(path: Path) -> None:
    module = path.relative_to(ROOT).as_posix()
    found = [(line, what) for line, what in suspicious(ast.parse(path.read_text())) if (module, what) not in ALLOWED]
    assert not found


def test_every_exception_is_still_needed() -> None:
    used = {
        (p.relative_to(ROOT).as_posix(), what) for p in shipped() for _, what in suspicious(ast.parse(p.read_text()))
    }
    assert ALLOWED.keys() <= used


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import multiprocessing.connection",
        "from multiprocessing import connection",
        "import marshal, os",
        "import shelve",
        "import yaml",
        "eval(text)",
        "run = exec",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "torch.load(file)",
        "np.load(file)",
        "numpy.load(file, allow_pickle=True)",
        "frombuffer(data, allow_pickle=flag)",
        "socket.recv_pyobj()",
        "self.socket.send_pyobj(1)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "builtins.eval(text)",
        "importlib.import_module(name)",
        "from importlib import import_module",
    ],
)
def test_the_look_finds_what_it_is_for(line: str) -> None:
    assert list(suspicious(ast.parse(line)))


@pytest.mark.parametrize("line", ["torch.zeros(3)", "np.frombuffer(b)", "evaluate(x)", "re_compiled", "json.loads(x)"])
def test_the_look_lets_the_harmless_pass(line: str) -> None:
    assert not list(suspicious(ast.parse(line)))
