"""What the runs of several strategies say about them: medians over seeds, costs to a level of saving, ratios.

Levels are shares of the saving that the baseline strategy ends with, seed by seed. A level that was not reached counts
as infinitely dear, so a median is finite only if most seeds reached it.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.runs import Result

LEVELS = (0.5, 0.9, 1.0)
TIMES = ("seconds", "cpu_seconds")  # of these there are ratios; steps may be none at all
COSTS = (*TIMES, "samples", "steps")
BASELINES = ("gemel", "gemel-published")  # the first one's final saving sets the levels


class Spread(NamedTuple):
    """A quantity over seeds; infinite where a level was not reached."""

    median: float
    min: float
    max: float

    def as_json(self) -> dict:
        """Infinite values become null."""
        return {key: value if math.isfinite(value) else None for key, value in self._asdict().items()}


class Ratio(NamedTuple):
    """How many times as much the baseline spent until the same level; 0 if the level was not reached at all."""

    value: float
    at_least: bool  # the baseline did not reach the level either, so the truth is this or more


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def of_variant(results: Sequence[Result], variant: str) -> list[Result]:
    """The runs of one variant, by seed."""
    return [result for result in results if result.variant == variant]


def variants_of(results: Sequence[Result]) -> list[str]:
    """Variants in the order in which they were run."""
    return list(dict.fromkeys(result.variant for result in results))


def levels_of(results: Sequence[Result], share: float) -> dict[int, float]:
    """Seed -> bytes to reach; no entry for a seed with which the baseline saved nothing, or did not run."""
    return {r.seed: share * r.saved_bytes for r in of_variant(results, BASELINES[0]) if r.saved_bytes > 0}


def cost_to(result: Result, saved_bytes: float, cost: str) -> float:
    """What the run had spent when it first kept as much; infinite if it never did."""
    return next((entry[cost] for entry in result.history if entry["saved_bytes"] >= saved_bytes), math.inf)


def costs_to_level(results: Sequence[Result], variant: str, share: float, cost: str) -> list[float]:
    """One cost per seed for which there is a level."""
    levels = levels_of(results, share)
    return [cost_to(r, levels[r.seed], cost) for r in of_variant(results, variant) if r.seed in levels]


def ratio_to(
    results: Sequence[Result], variant: str, baseline: str, share: float, time: str, time_budget: float
) -> Ratio | None:
    """Median over seeds of the baseline's time (one of TIMES) over the variant's; None where there is none to compare.

    A baseline that did not reach the level counts with what it had spent by the end of its budget: a lower bound.
    """
    levels = levels_of(results, share)
    of_seed = {r.seed: r for r in of_variant(results, baseline)}
    ratios, bounded = [], False
    for result in of_variant(results, variant):
        if result.seed not in levels or result.seed not in of_seed:
            continue
        other = of_seed[result.seed]
        own, theirs = (cost_to(r, levels[result.seed], time) for r in (result, other))
        if math.isinf(theirs):
            bounded, theirs = True, spent(other, time, time_budget)
        ratios.append(theirs / own if math.isfinite(own) else 0.0)
    return Ratio(statistics.median(ratios), bounded) if ratios else None


def spent(result: Result, time: str, time_budget: float) -> float:
    """What a run spent in all, without what it did after its budget (its closing evaluation)."""
    return getattr(result, time) * min(1.0, time_budget / result.seconds)


def summarise(results: Sequence[Result], variant: str, total_bytes: int, optimal: int, time_budget: float) -> dict:
    """Everything that is said of one strategy, as plain values for JSON; every quantity with its spread over seeds."""
    runs = of_variant(results, variant)
    changes = [r.test_change for r in runs if r.test_change is not None]
    quantities = {
        "saved_bytes": [r.saved_bytes for r in runs],
        "saved_of_workload": [r.saved_bytes / total_bytes for r in runs],
        "saved_of_optimal": [r.saved_bytes / optimal if optimal else 1.0 for r in runs],
        "worst_accuracy_of_target": [r.worst_ratio for r in runs],
        "rounds": [len(r.rounds) for r in runs],
        "seconds": [r.seconds for r in runs],
        "cpu_seconds": [r.cpu_seconds for r in runs],
    }
    summary = {key: spread(values).as_json() for key, values in quantities.items()}
    summary["test_change"] = spread(changes).as_json() if changes else None
    summary["seeds"] = [r.seed for r in runs]
    summary["ended_by_itself"] = sum(r.finished for r in runs)
    shares = [share for share in LEVELS if levels_of(results, share)]
    summary["to_level"] = {f"{s:g}": _level_summary(results, variant, s, time_budget) for s in shares}
    return summary


def _level_summary(results: Sequence[Result], variant: str, share: float, time_budget: float) -> dict:
    row = {}
    for cost in COSTS:
        values = costs_to_level(results, variant, share, cost)
        row[cost] = spread(values).as_json() if values else None
        row["reached"] = sum(map(math.isfinite, values))
    for time, baseline in itertools.product(TIMES, BASELINES):
        ratio = ratio_to(results, variant, baseline, share, time, time_budget)
        row[f"{time}_of_{baseline}"] = ratio._asdict() if ratio else None
    return row
