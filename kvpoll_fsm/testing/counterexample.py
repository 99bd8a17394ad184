"""A run that breaks a law, as a file: `kvpoll explore` writes it, `kvpoll explore --replay` performs it again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.testing.explore import NO_END, Finding, reaches_end, tell
from kvpoll_fsm.testing.laws import broken_law
from kvpoll_fsm.testing.scene import Scene
from kvpoll_fsm.testing.universe import Universe

__all__ = ["Counterexample"]


class Counterexample(msgspec.Struct, frozen=True):
    """What is in the file.

    Attributes:
        scene: What was explored.
        law: What was found broken.
        run: For each step the number of the action taken, of those possible in that state.
        text: The same for people. It is not read.
    """

    scene: Scene
    law: str
    run: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    text: tuple[str, ...] = ()

    @classmethod
    def of(cls, scene: Scene, finding: Finding) -> Counterexample:
        """The file for a finding in `scene`."""
        return cls(scene, finding.law, tuple(finding.run), tuple(finding.text))

    @classmethod
    def read(cls, path: str | Path) -> Counterexample:
        """Read a file that `write` wrote.

        Raises:
            InvalidInput: It is no such file.
        """
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"{path}: not a counterexample of `kvpoll explore`: {error}") from error

    def write(self, folder: str | Path) -> Path:
        """Write the file into `folder`; returns its path."""
        path = Path(folder) / f"counterexample-{re.sub('[^a-z0-9]+', '-', self.scene.name.lower())}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        return path

    def replay(self) -> tuple[str, list[str]]:
        """Perform the run: the law that is broken now (or nothing), and the steps for people.

        Raises:
            InvalidInput: The code has changed so much that the run leads nowhere.
        """
        try:
            steps = tell(self.scene, self.run)
            universe = Universe.begin(self.scene)
            for action in self.run:
                universe = universe.step(universe.actions()[action])
        except IndexError:
            raise InvalidInput(f"{self.scene.name}: a step of the run is not possible any more") from None
        law = broken_law(universe)
        if not law and self.law == NO_END and not reaches_end(universe):
            law = NO_END
        return law, steps
