"""One target under atheris: python -m tests.fuzz.drive TARGET [libFuzzer's arguments].

`python -m tests.fuzz` runs all of them and adds up; this is one of the processes it starts.
"""

from __future__ import annotations

import random
import sys

import atheris

WATCHED = ["kvpoll_fsm", "kvpoll_common", "kvpoll_tcp", "kvpoll_shm", "tests.fuzz.decoders"]
UNWATCHED = [f"kvpoll_fsm.testing.{name}" for name in ("hosts", "invariants", "work", "world")]  # they only host

with atheris.instrument_imports(include=WATCHED, exclude=UNWATCHED, enable_loader_override=False):
    from tests.fuzz.choices import Choices
    from tests.fuzz.targets import TARGETS


def main(arguments: list[str]) -> None:
    """Run until libFuzzer has had enough."""
    target = TARGETS[arguments[1]]

    def mutate(data: bytes, most_nbytes: int, seed: int) -> bytes:
        """Half of the time one place of the structure, else what libFuzzer would do."""
        if target.mutate is None or seed % 2:
            return bytes(atheris.Mutate(data, most_nbytes))
        return target.mutate(data, Choices(random.Random(seed).randbytes(64)))[:most_nbytes]

    more = {} if target.mutate is None else {"custom_mutator": mutate}
    atheris.Setup([arguments[0], *arguments[2:]], target.run, **more)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
