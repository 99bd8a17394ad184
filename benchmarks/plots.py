"""The results as pictures (matplotlib, extra bench)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.plane import LOOPS
from benchmarks.results import Results

__all__ = ["draw"]

STYLES = {"limit": ":", "ours": "-", "other": "--"}


def draw(results: Results, folder: Path) -> list[str]:
    """Write the pictures; returns their names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []
    for loop in LOOPS:
        drawn += _speeds(plt, results, folder, loop)
    drawn += _bars(plt, results, folder)
    drawn += _growth(plt, results, folder)
    return drawn


def _speeds(plt: Any, results: Results, folder: Path, loop: str) -> list[str]:
    figure, axes = plt.subplots(figsize=(10, 6))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for peer in results.settings:
        points = [
            (case.nbytes / (1 << 20), results.plane[peer, name, loop].gb_per_s)
            for name, case in CASES.items()
            if case.blocks == 1 and name != "1KiB" and (peer, name, loop) in results.plane
        ]
        if points:
            style = STYLES[results.settings[peer]["kind"]]
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=peer)
    axes.set(xscale="log", yscale="log", xlabel="MiB of one transfer", ylabel="GB/s", title=f"one piece, {loop}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(plt, figure, folder / f"speed-{loop}.png")


def _bars(plt: Any, results: Results, folder: Path) -> list[str]:
    """Scattered blocks, and processor time."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 6))
    for axes, case in zip(panels, ("64x128KiB", "2048x4KiB"), strict=False):
        found = {p: s.gb_per_s for (p, c, loop), s in results.plane.items() if (c, loop) == (case, "alone")}
        axes.barh(list(found), list(found.values()))
        axes.set(title=f"{case}, alone", xlabel="GB/s")
    costs = {p: s.cpu_s_per_gb or 0.0 for (p, c, loop), s in results.plane.items() if (c, loop) == ("64MiB", "alone")}
    panels[2].barh(list(costs), list(costs.values()))
    panels[2].set(title="64MiB, alone", xlabel="processor seconds per GB, both ends")
    for axes in panels:
        axes.invert_yaxis()
    return _save(plt, figure, folder / "scattered-and-cost.png")


def _growth(plt: Any, results: Results, folder: Path) -> list[str]:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    titles = (("turn of the driver", "us", 1e6), ("bytes per room", "bytes", 1.0))
    for axes, (name, unit, scale) in zip(panels, titles, strict=True):
        steps = {int(k.split()[-2]): v * scale for k, v in results.numbers.items() if k.startswith(f"{name},")}
        axes.plot(list(steps), list(steps.values()), marker="o")
        axes.set(xscale="log", title=name, xlabel="open rooms", ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.2)
    return _save(plt, figure, folder / "growth.png")


def _save(plt: Any, figure: Any, path: Path) -> list[str]:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return [path.name]
