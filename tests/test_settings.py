from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from kvpoll_fsm import Deadlines, Endpoint, Limits
from kvpoll_fsm.config import Config
from kvpoll_fsm.settings import OPTIONS, SETTINGS, variable
from tests.helpers import pool


def test_there_is_a_setting_for_every_argument_of_an_endpoint() -> None:
    names = {key[0] for key in SETTINGS} | {OPTIONS}
    assert names | {"self", "pool", "config"} == set(inspect.signature(Endpoint.__init__).parameters)


@pytest.mark.parametrize(("name", "group"), [("deadlines", Deadlines), ("limits", Limits)])
def test_there_is_one_for_every_part_of_those_that_have_parts(name: str, group: type[Any]) -> None:
    parts = {key[1]: setting.default for key, setting in SETTINGS.items() if key[0] == name and len(key) == 2}
    assert parts == {field.name: getattr(group(), field.name) for field in fields(group)}
    assert (name,) not in SETTINGS


def test_the_defaults_are_those_of_the_config() -> None:
    config = Endpoint(pool=pool(1)).config
    defaults = {field.name: field.default for field in fields(Config)}
    for key, setting in SETTINGS.items():
        if len(key) == 1 and key[0] in defaults and key[0] not in ("listen", "advertise", "keys"):
            assert getattr(config, key[0]) == setting.default == defaults[key[0]], key
    assert (config.deadlines, config.limits, config.keys) == (Deadlines(), Limits(), None)
    assert str(config.policy) == SETTINGS["transports",].default
    assert str(config.listen) == SETTINGS["listen",].default


def test_every_default_is_of_its_kind() -> None:
    for key, setting in SETTINGS.items():
        given = list(setting.default) if isinstance(setting.default, tuple) else setting.default
        assert given is None or setting.kind.fits(given), key


def test_variables_have_names_of_their_own() -> None:
    names = [variable(key) for key in SETTINGS]
    assert len(set(names)) == len(names)
    assert variable(("deadlines", "stall_s")) == "KVPOLL_DEADLINES_STALL_S"
    assert variable((OPTIONS, "my-own", "streams")) == "KVPOLL_TRANSPORT_OPTIONS_MY_OWN_STREAMS"
