"""Summaries of the runs of several variants: medians over seeds, costs until a level of saving, ratios of costs.

A level is a share of the saving that the baseline strategy ends with, for each seed. A level that was not reached costs
infinity, so a median is finite only if most seeds reached it.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.runs import Result

LEVELS = (0.5, 0.9, 1.0)
TIMES = ("seconds", "cpu_seconds")  # the costs that ratios are computed of; the number of steps can be 0
COSTS = (*TIMES, "samples", "steps")
BASELINES = ("gemel", "gemel-published")  # the levels are shares of what the first one saves


class Spread(NamedTuple):
    """One quantity over seeds; infinite where a level was not reached."""

    median: float
    min: float
    max: float

    def as_json(self) -> dict:
        """As a dictionary in which infinite values are None."""
        return {key: value if math.isfinite(value) else None for key, value in self._asdict().items()}


class Ratio(NamedTuple):
    """Cost of the baseline until a level, divided by that of the variant; 0 if the variant did not reach the level."""

    value: float
    at_least: bool  # the baseline did not reach the level: `value` is a lower bound


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def of_variant(results: Sequence[Result], variant: str) -> list[Result]:
    """The runs of one variant, by seed."""
    return [result for result in results if result.run.variant == variant]


def variants_of(results: Sequence[Result]) -> list[str]:
    """The names of the variants, in the order of `results`."""
    return list(dict.fromkeys(result.run.variant for result in results))


def levels_of(results: Sequence[Result], share: float) -> dict[int, float]:
    """Seed -> bytes to save; without seeds for which the baseline saved nothing or did not run."""
    return {r.run.seed: share * r.saved_bytes for r in of_variant(results, BASELINES[0]) if r.saved_bytes > 0}


def cost_to(result: Result, saved_bytes: float, cost: str) -> float:
    """The cost (one of COSTS) at which the run had first saved that much; infinite if it never had."""
    return next((entry[cost] for entry in result.history if entry["saved_bytes"] >= saved_bytes), math.inf)


def costs_to_level(results: Sequence[Result], variant: str, share: float, cost: str) -> list[float]:
    """The cost until a level, for each seed that has the level."""
    levels = levels_of(results, share)
    runs = [run for run in of_variant(results, variant) if run.run.seed in levels]
    return [cost_to(run, levels[run.run.seed], cost) for run in runs]


def ratio_to(
    results: Sequence[Result], variant: str, baseline: str, share: float, time: str, time_budget: float
) -> Ratio | None:
    """Median over seeds of (time of the baseline / time of the variant) until a level; None if no seed has both.

    time: one of TIMES. A baseline that did not reach the level counts with all it spent within its budget, which makes
    the ratio a lower bound.
    """
    levels = levels_of(results, share)
    of_seed = {r.run.seed: r for r in of_variant(results, baseline)}
    ratios, bounded = [], False
    for result in of_variant(results, variant):
        seed = result.run.seed
        if seed not in levels or seed not in of_seed:
            continue
        other = of_seed[seed]
        own, theirs = (cost_to(r, levels[seed], time) for r in (result, other))
        if math.isinf(theirs):
            bounded, theirs = True, spent(other, time, time_budget)
        ratios.append(theirs / own if math.isfinite(own) else 0.0)
    return Ratio(statistics.median(ratios), bounded) if ratios else None


def spent(result: Result, time: str, time_budget: float) -> float:
    """The time (one of TIMES) of a run until the end of its budget: without its final evaluation."""
    return getattr(result, time) * min(1.0, time_budget / result.seconds)


def summarise(results: Sequence[Result], variant: str, total_bytes: int, optimal: int, time_budget: float) -> dict:
    """All quantities of one variant with their spread over seeds, as plain values for JSON."""
    runs = of_variant(results, variant)
    changes = [r.test_change for r in runs if r.test_change is not None]
    quantities: dict[str, list] = {
        "saved_bytes": [r.saved_bytes for r in runs],
        "saved_of_workload": [r.saved_bytes / total_bytes for r in runs],
        "saved_of_optimal": [r.saved_bytes / optimal if optimal else 1.0 for r in runs],
        "worst_accuracy_of_target": [r.worst_ratio for r in runs],
        "rounds": [len(r.rounds) for r in runs],
        "seconds": [r.seconds for r in runs],
        "cpu_seconds": [r.cpu_seconds for r in runs],
    }
    summary: dict[str, Any] = {key: spread(values).as_json() for key, values in quantities.items()}
    summary["test_change"] = spread(changes).as_json() if changes else None
    summary["seeds"] = [r.run.seed for r in runs]
    summary["search_finished"] = sum(r.finished for r in runs)
    shares = [share for share in LEVELS if levels_of(results, share)]
    summary["to_level"] = {f"{s:g}": _level_summary(results, variant, s, time_budget) for s in shares}
    return summary


def _level_summary(results: Sequence[Result], variant: str, share: float, time_budget: float) -> dict:
    """Costs until one level and their ratios to the baselines."""
    row: dict[str, Any] = {}
    for cost in COSTS:
        values = costs_to_level(results, variant, share, cost)
        row[cost] = spread(values).as_json() if values else None
        row["reached"] = sum(map(math.isfinite, values))
    for time, baseline in itertools.product(TIMES, BASELINES):
        ratio = ratio_to(results, variant, baseline, share, time, time_budget)
        row[f"{time}_of_{baseline}"] = ratio._asdict() if ratio else None
    return row
