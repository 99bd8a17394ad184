"""python -m tests.fuzz: every target under atheris for some seconds, then a table of what was run and found.

Inputs that reached something new go to build/fuzz/corpus, and serve the next run; what breaks a law goes to
build/fuzz/found, and `python -m tests.fuzz --replay FILE TARGET` runs it again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import CORPUS, TARGETS, Target

BUILD = Path("build/fuzz")
RSS_MB = 1024
HANG_S = 20
HEAD = ("target", "executions", "per second", "coverage at the start", "at the end", "new inputs", "found")


@dataclass
class Outcome:
    """What one target's run came to; `log` is what libFuzzer said."""

    name: str
    log: str
    status: int
    found: list[Path]

    @property
    def failed(self) -> bool:
        return bool(self.status or self.found)

    def row(self) -> tuple[str, ...]:
        """A line of the table."""
        numbers = [self._number(rf"stat::{name}:\s*(\d+)") for name in UNITS]
        before, after = self._number(r"INITED cov: (\d+)"), self._number(r"DONE\s+cov: (\d+)")
        return (self.name, numbers[0], numbers[1], before, after, numbers[2], str(len(self.found)))

    def _number(self, pattern: str) -> str:
        match = re.search(pattern, self.log)
        return f"{int(match[1]):,}" if match else "-"


UNITS = ("number_of_executed_units", "average_exec_per_sec", "new_units_added")


def fuzz(target: Target, seconds: int) -> Outcome:
    """Run one target in a process of its own."""
    grown, found = BUILD / "corpus" / target.name, BUILD / "found" / target.name
    for folder in (grown, found):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    command = [sys.executable, "-m", "tests.fuzz.drive", target.name, str(grown), str(CORPUS / target.name)]
    command += [f"-max_total_time={seconds}", f"-max_len={target.most_nbytes}", f"-timeout={HANG_S}"]
    command += [f"-rss_limit_mb={RSS_MB}", "-print_final_stats=1", f"-artifact_prefix={found}/"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          timeout=seconds + 10 * HANG_S, check=False)  # fmt: skip
    return Outcome(target.name, done.stdout, done.returncode, sorted(set(found.iterdir()) - before))


def report(outcome: Outcome) -> None:
    """Say what is known of a target now."""
    print(f"| {' | '.join(outcome.row())} |", flush=True)
    if outcome.failed:
        print(outcome.log[-6000:], file=sys.stderr)
        for path in outcome.found:
            print(f"again: {sys.executable} -m tests.fuzz --replay {path} {outcome.name}", file=sys.stderr)


def main() -> int:
    """Run what the arguments name; 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=6, help="for each target; a few get more")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input again, without atheris")
    given = parser.parse_args()
    names = given.targets or list(TARGETS)
    if not set(names) <= set(TARGETS):
        parser.error(f"targets are {', '.join(TARGETS)}")
    if given.replay is not None:
        for name in names:
            TARGETS[name].run(given.replay.read_bytes())
        return 0
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    failed = False
    for name in names:
        outcome = fuzz(TARGETS[name], given.seconds * TARGETS[name].share)
        report(outcome)
        failed = failed or outcome.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
