"""What comes from the same machine: requests at a control socket, files of settings, variables."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any, cast

from kvpoll_fsm import ConfigError
from kvpoll_fsm.configuration import Resolved, resolve
from kvpoll_fsm.local.service import Service
from kvpoll_fsm.requests import Requests
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.settings import OPTIONS, SETTINGS
from kvpoll_fsm.switching import TransportStatus
from tests.fuzz.choices import Choices
from tests.fuzz.decoders import folder


class Asked:
    """A driver's requests, and what was asked of them."""

    address = "tcp://127.0.0.1:1"

    def __init__(self) -> None:
        self.switched: list[tuple[Policy, float | None]] = []

    def switch(self, policy: Policy, share: float | None) -> None:
        self.switched.append((policy, share))

    def transports(self) -> TransportStatus:
        return TransportStatus("require:tcp")

    def report(self) -> dict[str, Any]:
        return {}

    def breakers(self) -> list[Any]:
        return []

    def load(self) -> TransportStatus:
        return TransportStatus("any dataclass will do")


@contextlib.contextmanager
def no_tracebacks() -> Iterator[None]:
    """Nothing that a caller says may fill the log."""
    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    logging.getLogger("kvpoll_fsm").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("kvpoll_fsm").removeHandler(handler)
    assert not lines


def control_line(data: bytes) -> None:
    """A line at a control socket is answered, whatever it is; what is switched to is a policy, for a real share."""
    asked = Asked()
    with no_tracebacks():
        said = Service(cast("Requests", asked)).answer(data)
    assert said.endswith(b"\n")
    answer = json.loads(said)
    assert answer.keys() <= {"ok", "result", "error", "detail"}
    assert answer["ok"] or (answer["error"] and not asked.switched)
    for policy, share in asked.switched:
        assert Policy.parse(str(policy)) == policy
        assert share is None or 0 < share < 1


def config_file(data: bytes) -> None:
    """A file of settings: usable ones, or an error that names the file."""
    path = folder() / "kvpoll.toml"
    path.write_bytes(data)
    try:
        _usable(resolve({}, path, {}))
    except ConfigError as error:
        if not str(error).startswith(f"file {path}"):
            raise AssertionError("the file is not named") from error


def variables(data: bytes) -> None:
    """Variables of the environment: usable ones, or an error that names one of them."""
    choices = Choices(data)
    environ = {}
    for _ in range(1 + choices.below(3)):
        key = choices.pick([*SETTINGS, (OPTIONS, "tcp", "streams")])
        environ["KVPOLL_" + "_".join(key).upper()] = choices.text(20)
    try:
        _usable(resolve({}, None, environ))
    except ConfigError as error:
        if error.key not in environ:
            raise AssertionError("the variable is not named") from error


def _usable(resolved: Resolved) -> None:
    config = resolved.config
    assert config.listen.is_loopback or config.keys or config.insecure
    assert resolved.given.keys() >= SETTINGS.keys()
    for key, found in resolved.given.items():
        assert found.source != "constructor", key
