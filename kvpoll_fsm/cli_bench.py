"""The command `kvpoll bench`: runs the benchmark suite, which is a folder of the source tree and in no wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

__all__ = ["bench"]

ROOT = Path(__file__).resolve().parent.parent
"""Where `benchmarks/` is if this is a source tree, installed in editable form or not."""


@click.command()
@click.option("--quick", is_flag=True, help="Only what the summary needs, in under 60 seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON document and nothing else.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for benchmarks.md, its plots and all results as JSON; without it nothing is written.",
)
def bench(quick: bool, as_json: bool, out: Path | None) -> None:
    """Measure this library beside what one would use instead, in one run.

    All that belongs to it is installed by `make bench`; what is not there is named in the output.
    """
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        sys.exit(
            f"kvpoll: the benchmarks are not part of the installed package: there is no {ROOT / 'benchmarks'}.\n"
            "Take the source tree of kvpoll-fsm, where they are the folder benchmarks/, and run `make bench` there."
        )
    options = [*(["--quick"] if quick else []), *(["--json"] if as_json else [])]
    if out is not None:
        options += ["--out", str(out.resolve())]
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=ROOT, check=False).returncode)
