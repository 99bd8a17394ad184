"""An endpoint's settings by where they come from: constructor, then file, then environment, then default.

The one module that reads the file and the environment. It does so once, when an endpoint is made; a mover is given
what came out.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvpoll_fsm import registry
from kvpoll_fsm.address import hide_passwords
from kvpoll_fsm.config import Config
from kvpoll_fsm.errors import ConfigError, InvalidInput
from kvpoll_fsm.settings import GROUPS, OPTIONS, PREFIX, SETTINGS, Key, variable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FILE_VARIABLE", "Given", "Resolved", "resolve", "settle", "shown"]

log = logging.getLogger("kvpoll_fsm")
FILE_VARIABLE = "KVPOLL_CONFIG"
"""Names the file, unless the constructor does."""
_NOT_OURS = "KVPOLL_TEST_"
CONSTRUCTOR, DEFAULT = "constructor", "default"
MOST_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Given:
    """A value, and who gave it: "constructor", "default", "file PATH" or "variable NAME"."""

    value: Any
    source: str


@dataclass(frozen=True)
class Resolved:
    """What holds.

    Attributes:
        config: The settings, checked.
        given: Each of them by its key, and where it came from.
        unknown: Variables that look like ours and are not, and what they could have meant.
    """

    config: Config
    given: dict[Key, Given]
    unknown: tuple[str, ...]


PROTECTING: tuple[Key, ...] = (("keys",), ("authorized",))


def settle(settings: Mapping[str, Any], file: str | Path | None) -> Config:
    """What holds for an endpoint whose constructor was given these; None stands for "not given".

    Raises:
        ConfigError: The file or a variable has something that cannot be used.
        InvalidInput: The constructor was given something that cannot be used.
    """
    resolved = resolve(settings, file)
    for line in resolved.unknown:
        log.warning("%s", line)
    return resolved.config


def resolve(settings: Mapping[str, Any], file: str | Path | None, environ: Mapping[str, str] = os.environ) -> Resolved:
    """What holds, and where it comes from. Raises as `settle`."""
    variables, unknown = _of_environment(environ)
    path = file if file is not None else environ.get(FILE_VARIABLE)
    given: dict[Key, Given] = {key: Given(setting.default, DEFAULT) for key, setting in SETTINGS.items()}
    given |= variables
    given |= _of_file(Path(path)) if path else {}
    given |= _of_constructor(settings)
    given = {key: _none_if_empty(key, found) for key, found in given.items()}
    return Resolved(_checked(given), given, unknown)


def _none_if_empty(key: Key, found: Given) -> Given:
    """None itself is "not given" in a constructor, and cannot be said in a file or a variable.

    Keys are never taken away like this: a variable that happens to be empty must not.
    """
    setting = SETTINGS.get(key)
    is_empty = isinstance(found.value, (str, list, tuple)) and not found.value
    may_be_none = setting is not None and setting.default is None and key not in PROTECTING
    return Given(None, found.source) if is_empty and may_be_none else found


# Where they come from


def _of_constructor(settings: Mapping[str, Any]) -> dict[Key, Given]:
    found: dict[Key, Given] = {}
    for name, value in settings.items():
        if value is None:
            continue
        group = GROUPS.get(name)
        if group is not None and isinstance(value, group):
            found |= {(name, field.name): Given(getattr(value, field.name), CONSTRUCTOR) for field in fields(group)}
        elif name == OPTIONS and _is_nested(value):
            found |= {
                (name, transport, option): Given(each, CONSTRUCTOR)
                for transport, options in value.items()
                for option, each in options.items()
            }
        else:  # what does not fit is for `Config` to refuse
            found[name,] = Given(value, CONSTRUCTOR)
    return found


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(options, Mapping) for options in value.values())


def _of_file(path: Path) -> dict[Key, Given]:
    source = f"file {path}"
    try:
        with path.open("rb") as file:
            text = file.read(MOST_NBYTES + 1)
        if len(text) > MOST_NBYTES:
            raise ConfigError(source, "", None, f"is longer than {MOST_NBYTES} bytes: that is no file of settings")
        table = tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(source, "", None, f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(source, "", None, f"is not TOML: {error}") from error
    return {key: Given(_fitting(source, key, value), source) for key, value in _leaves(table, source)}


def _leaves(table: dict[str, Any], source: str) -> Iterator[tuple[Key, Any]]:
    """The settings in a file by their keys."""
    for name, value in table.items():
        if name in GROUPS or name == OPTIONS:
            for part, inner in _table(value, source, (name,)).items():
                if name == OPTIONS:
                    options = _table(inner, source, (name, part))
                    yield from (((name, part, option), each) for option, each in options.items())
                else:
                    yield (name, part), inner
        else:
            yield (name,), value


def _table(value: object, source: str, key: Key) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(source, ".".join(key), value, f"give a table: [{'.'.join(key)}]")
    return value


def _fitting(source: str, key: Key, value: object) -> object:
    """The value, if there is such a setting and it may be of this kind."""
    if key[0] == OPTIONS:
        return value
    setting = SETTINGS.get(key)
    if setting is None:
        names = [*map(".".join, SETTINGS), OPTIONS]
        raise ConfigError(source, ".".join(key), shown(key, value), "there is no such setting" + _near(key, names))
    if not setting.kind.fits(value):
        raise ConfigError(source, ".".join(key), shown(key, value), f"give {setting.kind.wanted}")
    return value


def _near(key: Key, names: list[str]) -> str:
    near = difflib.get_close_matches(".".join(key), names, n=3)
    return "; did you mean " + " or ".join(near) + "?" if near else "; `kvpoll config` lists them"


def _of_environment(environ: Mapping[str, str]) -> tuple[dict[Key, Given], tuple[str, ...]]:
    names = {variable(key): key for key in SETTINGS}
    found: dict[Key, Given] = {}
    unknown: list[str] = []
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name == FILE_VARIABLE or name.startswith(_NOT_OURS):
            continue
        key = names.get(name) or _option(name)
        if key is None:
            short = [other.removeprefix(PREFIX) for other in (*names, FILE_VARIABLE)]
            near = difflib.get_close_matches(name.removeprefix(PREFIX), short, n=1)
            meant = f"; did you mean {PREFIX}{near[0]}?" if near else ""
            unknown.append(f"environment variable {name} is none of kvpoll-fsm's and is ignored{meant}")
        else:
            found[key] = Given(_read(name, key, text), f"variable {name}")
    return found, tuple(unknown)


def _option(name: str) -> Key | None:
    """The transport's setting that a variable is for: KVPOLL_TRANSPORT_OPTIONS_TCP_STREAMS is ("tcp", "streams")."""
    prefix = variable((OPTIONS, ""))
    if not name.startswith(prefix):
        return None
    transports = sorted({*registry.available(), *registry.HINTS}, key=len, reverse=True)
    for transport in transports:
        begin = variable((OPTIONS, transport, ""))
        if name.startswith(begin) and len(name) > len(begin):
            return OPTIONS, transport, name[len(begin) :].lower()
    return None


def _read(name: str, key: Key, text: str) -> object:
    if key[0] == OPTIONS:
        return _value(text)
    kind = SETTINGS[key].kind
    try:
        return kind.read(text)
    except (ValueError, KeyError):
        raise ConfigError("environment", name, shown(key, text), f"give {kind.wanted}") from None


def _value(text: str) -> object:
    """A number, a list or the like if the text is one as TOML writes it, else the text."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


# What comes out


def _checked(given: dict[Key, Given]) -> Config:
    try:
        return _config(given)
    except InvalidInput as error:
        blamed = _blame(given, error)
        if blamed is None:  # what the constructor was given
            raise
        problem = str(error)
    found = given[blamed]
    source, _, name = found.source.partition(" ")
    place = (found.source, ".".join(blamed)) if source == "file" else ("environment", name)
    raise ConfigError(*place, shown(blamed, found.value), problem)


def _blame(given: dict[Key, Given], error: InvalidInput) -> Key | None:
    """The setting of a file or a variable without which this error would not be; None if it is no such setting."""
    for key, found in given.items():
        if found.source in (CONSTRUCTOR, DEFAULT):
            continue
        without = {other: each for other, each in given.items() if other != key}
        if key in SETTINGS:
            without[key] = Given(SETTINGS[key].default, DEFAULT)
        try:
            _config(without)
        except InvalidInput as other:
            if str(other) == str(error):
                continue
        return key
    return None


def _config(given: Mapping[Key, Given]) -> Config:
    """The settings, checked. Raises what `Config` does."""
    flat: dict[str, Any] = {key[0]: found.value for key, found in given.items() if len(key) == 1}
    for name, group in GROUPS.items():
        if name not in flat:
            flat[name] = group(**{key[1]: found.value for key, found in given.items() if key[0] == name})
    options: dict[str, dict[str, Any]] = {}
    for key, found in given.items():
        if len(key) == 3:
            options.setdefault(key[1], {})[key[2]] = found.value
    flat.setdefault(OPTIONS, options)
    return Config.of(**flat)


SECRET = ("secret", "password", "passwd", "token")


def shown(key: Key, value: Any) -> Any:
    """A value as anybody may see it."""
    if any(word in key[-1].lower() for word in SECRET):
        return "(hidden)"
    if isinstance(value, (list, tuple)):
        return [shown(key, each) for each in value]
    return hide_passwords(value) if isinstance(value, str) else value
