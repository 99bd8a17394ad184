"""`python -m benchmarks`: measure, then write what came out."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.figures import needed, summary
from benchmarks.plane import Plan, Plane
from benchmarks.plots import draw
from benchmarks.report import into_page, markdown
from benchmarks.results import Results
from benchmarks.task import perform

__all__ = ["main", "measure"]

CALL_ROUNDS = 5
JOB_ROUNDS = 2
SOFTWARE = ("numpy", "pyzmq", "torch", "grpcio", "mooncake-transfer-engine-non-cuda", "nixl-cu12", "transitions")
QUICK = Plan(
    keys=needed(),
    rounds=3,
    sample_s=0.15,
    turn_s=20.0,
    task_s=10.0,
    call_s=0.02,
    rooms=(10, 1_000, 10_000),
    job_tokens=(),
    within_s=50.0,
)


def measure(plan: Plan) -> Results:
    """Everything a plan asks for. Ends in time, whatever the peers do."""
    ends_s = time.monotonic() + plan.within_s
    results = Results(machine=_machine())
    perform(results, "calls", plan.task_s, rounds=CALL_ROUNDS, call_s=plan.call_s)
    perform(results, "growth", plan.task_s, rooms=plan.rooms)
    if plan.job_tokens:
        perform(results, "job", plan.task_s, tokens=plan.job_tokens, rounds=JOB_ROUNDS)
    _say(f"calls, growth, main job: {plan.within_s - (ends_s - time.monotonic()):.0f} s")
    Plane(plan, results, ends_s, _say).run()
    results.machine["seconds"] = round(plan.within_s - (ends_s - time.monotonic()))
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="kvpoll bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what the summary needs, in under 60 s")
    parser.add_argument("--json", action="store_true", help="print the summary as one line of JSON and nothing else")
    parser.add_argument("--out", type=Path, help="folder for benchmarks.md, results.json and the plots")
    options = parser.parse_args()
    results = measure(QUICK if options.quick else Plan())
    results.machine["form"] = "quick: no more than the summary needs" if options.quick else "complete"
    text = markdown(results, _write(results, options.out) if options.out else ())
    if options.out:
        page = options.out / "benchmarks.md"
        page.write_text(into_page(page.read_text() if page.exists() else "# Benchmarks\n", text))
    print(json.dumps(summary(results)) if options.json else text)


def _write(results: Results, out: Path) -> list[str]:
    """The JSON and the plots; returns the latter as links from the page."""
    folder = out / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        drawn = draw(results, folder)
    except ImportError as error:
        results.missing["plots"] = f"{error}: make bench installs it (extra bench)"
        drawn = []
    document = {"summary": summary(results), **results.as_json()}
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    return [f"benchmarks/{name}" for name in drawn]


def _machine() -> dict[str, object]:
    versions = {name: _version(name) for name in SOFTWARE}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processors": f"{os.cpu_count()}, {_processor()}",
        "python": f"{platform.python_version()}, Linux {platform.release()}",
        "software": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "load at the start": round(os.getloadavg()[0], 2),
        "cases": list(CASES),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
