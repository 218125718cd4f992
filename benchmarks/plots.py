"""The plot of a comparison: memory saved against time, one line per variant, a band over seeds."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from benchmarks.conditions import Bench
from benchmarks.runs import Result
from benchmarks.suite_summary import MOMENTS, Curve, by_workload, over_seeds, share_at, strategies_of
from benchmarks.summary import of_variant, spent, variants_of
from gemel.environment.units import MIB

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # Okabe, Ito: colour-blind safe
AXIS = {"seconds": "seconds since the run began", "cpu_seconds": "CPU seconds since the run began"}


def saved_at(result: Result, moments: np.ndarray, time: str = "seconds") -> np.ndarray:
    """MiB that the run had saved at each of these moments; time: one of summary.TIMES, the unit of `moments`."""
    times = [entry[time] for entry in result.history]
    saved = np.array([0, *(entry["saved_bytes"] for entry in result.history)]) / MIB
    return saved[np.searchsorted(times, moments, side="right")]


def plot_saving(results: Sequence[Result], bench: Bench, path: Path, time: str = "seconds") -> None:
    """Writes the plot to `path`. A line is dotted after the median run has ended, as its saving no longer changes."""
    budget, optimal = bench.settings.time_budget, bench.unmerged.optimal_saved_bytes / MIB
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    times = [entry[time] for result in results for entry in result.history]
    end = max([*times, *(spent(result, time, budget) for result in results)])
    begin = 0.8 * min([*times, end])
    moments = np.unique(np.concatenate([np.geomspace(begin, end, 500), times]))
    for variant, colour in zip(variants_of(results), itertools.cycle(COLOURS), strict=False):
        _draw_variant(axes, of_variant(results, variant), moments, time, budget, colour)
    axes.set(xlabel=f"{AXIS[time]} (log scale)", ylabel="memory saved (MiB)", xscale="log", xlim=(begin, end * 1.05))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if end > 5 * begin else MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _draw_optimal(axes, optimal)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False)
    axes.set_title(_title(results, bench), fontsize="medium")
    figure.savefig(path, dpi=140)


def _draw_variant(
    axes: Axes, runs: list[Result], moments: np.ndarray, time: str, time_budget: float, colour: str
) -> None:
    """Adds the median, the band over seeds and the saving as reloaded, of the runs of one variant."""
    curves = np.stack([saved_at(result, moments, time) for result in runs])
    median = np.median(curves, axis=0)
    ended = float(np.median([spent(result, time, time_budget) for result in runs]))
    running = moments <= ended
    variant = runs[0].run.variant
    label = variant if all(result.finished for result in runs) else f"{variant} (cut off)"
    axes.step(moments[running], median[running], where="post", color=colour, linewidth=1.8, label=label)
    axes.step(moments[~running], median[~running], where="post", color=colour, linewidth=1.2, linestyle=":")
    kept = float(np.median([result.saved_bytes for result in runs])) / MIB  # as reloaded from disk
    axes.plot([ended], [kept], marker="o", markersize=5, color=colour, clip_on=False)
    if len(runs) > 1:
        axes.fill_between(moments, curves.min(0), curves.max(0), step="post", color=colour, alpha=0.15, linewidth=0)


def _draw_optimal(axes: Axes, optimal: float) -> None:
    """Adds a line at the limit of what can be saved, and a right axis in per cent of it."""
    axes.axhline(optimal, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        f"optimal {optimal:.2f} MiB", (axes.get_xlim()[0], optimal), (4, 4), textcoords="offset points", color="grey"
    )
    axes.set_ylim(0, optimal * 1.1 or 1)

    def per_cent(saved: ArrayLike) -> ArrayLike:
        return 100 * np.asarray(saved) / (optimal or 1)

    def mebibytes(share: ArrayLike) -> ArrayLike:
        return np.asarray(share) * optimal / 100

    share = axes.secondary_yaxis("right", functions=(per_cent, mebibytes))
    share.set_ylabel("% of optimal")


def _title(results: Sequence[Result], bench: Bench) -> str:
    workload, threads = bench.workload, bench.settings.threads
    name = Path(workload.file).stem if workload.file else "embedded default"
    seeds = len({result.run.seed for result in results})
    counted = f"median of {seeds} seeds, band: min to max" if seeds > 1 else "1 seed"
    return f"{name}: {counted}; {workload.device.type}, {threads} thread{'s' * (threads > 1)}"


def plot_shares(curves: Sequence[Curve], path: Path) -> None:
    """Writes the plot of the suite: for each strategy a panel with every workload, their median and their worst."""
    strategies = strategies_of(curves)
    figure = Figure(figsize=(5.5 * len(strategies), 4.8), layout="constrained")
    panels = figure.subplots(1, len(strategies), sharey=True, squeeze=False)[0]
    moments = [moment for curve in curves for moment, _ in curve.history]
    ends = [curve.cpu_seconds for curve in curves]
    begin, end = 0.8 * min([*moments, *MOMENTS]), max([*moments, *ends, MOMENTS[-1]])
    grid = np.unique(np.concatenate([np.geomspace(begin, end, 400), moments]))
    for axes, strategy, colour in zip(panels, strategies, itertools.cycle(COLOURS)):
        own = [c for c in curves if c.strategy == strategy and c.optimal_saved_bytes]
        _draw_shares(axes, by_workload(own, strategy), grid, colour)
        axes.set(title=f"{strategy}: {len(by_workload(own, strategy))} workloads", xscale="log", xlim=(begin, end))
        axes.set(xlabel=f"{AXIS['cpu_seconds']} (log scale)", ylim=(-2, 102))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("memory saved, % of optimal")
    panels[0].legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=140)


def _draw_shares(axes: Axes, runs: Mapping[str, Sequence[Curve]], grid: np.ndarray, colour: str) -> None:
    """Adds the workloads of one strategy as thin lines, and their median and worst at every moment."""
    shares = [[over_seeds(own, share_at(moment)) for moment in grid] for own in runs.values()]
    if not shares:
        return
    per_cent = 100 * np.array(shares)
    axes.step(grid, per_cent.T, where="post", color=colour, linewidth=0.7, alpha=0.35)
    axes.step(grid, np.median(per_cent, axis=0), where="post", color=colour, linewidth=2.4, label="median workload")
    worst = per_cent.min(axis=0)
    axes.step(grid, worst, where="post", color="black", linewidth=1.4, linestyle="--", label="worst workload")
