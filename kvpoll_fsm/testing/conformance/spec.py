"""How another process makes a transport: by the name of an entry point, or by that of something to call."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from kvpoll_fsm import registry
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import Transport

__all__ = ["Spec", "environment"]


class Spec(msgspec.Struct, frozen=True):
    """What to make, and with which settings.

    Attributes:
        factory: The name of an entry point (`tcp`), or `module:attribute`, where the attribute is called.
        options: Keyword settings, as JSON can hold them.
    """

    factory: str
    options: Mapping[str, Any] = {}

    @classmethod
    def of(cls, transport: Transport) -> Spec:
        """The class of this one, without settings."""
        made = type(transport)
        return cls(f"{made.__module__}:{made.__qualname__}")

    @classmethod
    def parse(cls, factory: str, options: str) -> Spec:
        """From words of a command line.

        Raises:
            InvalidInput: The options are no JSON object.
        """
        try:
            return cls(factory, msgspec.json.decode(options, type=dict[str, Any]))
        except msgspec.DecodeError as error:
            raise InvalidInput(f"options {options!r}: {error}") from error

    @property
    def words(self) -> list[str]:
        """What `parse` reads."""
        return [self.factory, json.dumps(dict(self.options))]

    def make(self) -> Transport:
        """A transport that is not started.

        Raises:
            TransportUnavailable: No entry point of that name, or what it names cannot be imported.
        """
        module, colon, path = self.factory.partition(":")
        if not colon:
            return registry.load(self.factory)(**self.options)
        made: Any = importlib.import_module(module)
        for step in path.split("."):
            made = getattr(made, step)
        return cast("Transport", made(**self.options))


def environment() -> dict[str, str]:
    """For a process that is to find the modules that are found here."""
    paths = [path or os.getcwd() for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
