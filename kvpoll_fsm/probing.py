"""Which transports there are and which of them work here, found out by starting each.

Each in a process of its own, `python -m kvpoll_fsm.probing NAME`: what crashes or hangs there is that transport's
answer, and nobody else's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import msgspec

from kvpoll_fsm import registry
from kvpoll_fsm.configuration import settle
from kvpoll_fsm.errors import KvpollError, TransportUnavailable
from kvpoll_fsm.mover.launch import environment

__all__ = ["Probe", "probe_all"]

PROBE_S = 30.0
"""How long a transport may take to start and to end."""


@dataclass(frozen=True)
class Probe:
    """One transport.

    Attributes:
        name: What policies call it.
        installed: Some distribution has it.
        usable: It could be started here, with the settings of the file and the environment.
        problem: Otherwise, why not.
        hint: What helps.
        distribution: What it comes with, and `version` of that.
        entry_point: Where its class is.
        capabilities: What it says that it can do; None if it could not be loaded.
    """

    name: str
    installed: bool
    usable: bool = False
    problem: str = ""
    hint: str = ""
    distribution: str = ""
    version: str = ""
    entry_point: str = ""
    capabilities: dict[str, Any] | None = None


def probe_all(within_s: float = PROBE_S) -> list[Probe]:
    """Every transport that is installed, and those that the registry knows how to get."""
    installed = registry.available()
    names = sorted({*installed, *registry.HINTS})
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda name: _probe(name, installed.get(name), within_s), names))


def _probe(name: str, entry: metadata.EntryPoint | None, within_s: float) -> Probe:
    if entry is None:
        return Probe(name, installed=False, problem="is not installed", hint=registry.HINTS[name])
    source = getattr(entry, "dist", None)
    where = {
        "distribution": source.name if source else "",
        "version": source.version if source else "",
        "entry_point": entry.value,
    }
    return Probe(name, installed=True, **{**where, **_found_out(name, within_s)})


def _found_out(name: str, within_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "kvpoll_fsm.probing", name]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=within_s, stdin=subprocess.DEVNULL, env=environment(), check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"has neither started nor failed within {within_s:g} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return {"problem": f"its process ended with status {done.returncode}: {' '.join(words)}"}
    return found


def main(name: str) -> None:
    """Try one transport, and print what came of it as one line of JSON."""
    found: dict[str, Any] = {}
    try:
        cls = registry.load(name)
        found["capabilities"] = msgspec.to_builtins(cls.capabilities)
        transport = cls(**settle({}, None).options_of(name))
        try:
            transport.start()
        finally:
            transport.close()
        found["usable"] = True
    except TransportUnavailable as error:
        found |= {"problem": error.problem, "hint": error.hint}
    except KvpollError as error:
        found["problem"] = str(error)
    except Exception as error:  # another party's code may raise anything
        found["problem"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=True)


def as_plain(probe: Probe) -> dict[str, Any]:
    """As `kvpoll transports --json` prints it."""
    return asdict(probe)


if __name__ == "__main__":
    main(sys.argv[1])
