"""What every transport must do, as tests: any transport gets them by subclassing one class.

    from kvpoll_fsm.testing.conformance import TransportSuite

    class TestMine(TransportSuite):
        def make(self) -> MyTransport:
            return MyTransport()

pytest runs that. It is needed here alone, and comes with the extra "conformance". The promises tested are those of
`kvpoll_fsm.spi`; `base.Base` says what a subclass may set where transports differ.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpoll_fsm.testing.conformance.sides import Pair, Side
    from kvpoll_fsm.testing.conformance.spec import Spec
    from kvpoll_fsm.testing.conformance.suite import TransportSuite

__all__ = ["Pair", "Side", "Spec", "TransportSuite"]

HINT = "the conformance kit needs pytest: pip install 'kvpoll-fsm[conformance]'"
_LAZY = {"Pair": "sides", "Side": "sides", "Spec": "spec", "TransportSuite": "suite"}
_TESTS = (
    "base",
    "claims",
    "crowds",
    "fencing",
    "forks",
    "leaks",
    "links",
    "processes",
    "refusing",
    "remote",
    "sides",
    "suite",
    "writing",
)
"""The modules whose asserts tell what was compared, where pytest is what imports them."""


def rewrite_asserts() -> None:
    """Let pytest rewrite the asserts of what is imported later, if it is pytest that imports."""
    if sys.modules.get("pytest") is not None:
        names = [f"{__name__}.{module}" for module in _TESTS]
        new = [name for name in names if name not in sys.modules]
        importlib.import_module("pytest").register_assert_rewrite(*new)


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    rewrite_asserts()
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        raise ModuleNotFoundError(HINT, name="pytest") from error


rewrite_asserts()  # whoever imports a module of ours by name does not come by __getattr__


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
