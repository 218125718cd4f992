"""What the runs of the suite come to: the share of optimal kept over CPU seconds, workload by workload and over all.

A curve is one run. With several seeds, a workload counts with the median over its seeds. A run that failed counts as
having kept nothing; a workload without identical layers is in the table and in no median.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.runs import Failure, Result
from gemel.console.tables import share, table

MOMENTS = (5, 15, 30, 60, 120, 300)  # CPU seconds since the merge began
CHOSEN_BY = (30, 60, 120, 300)  # moments whose mean share strategies are chosen by
MAIN_TOLERANCE = 0.95
FINISHED, CUT_OFF, NOTHING_KEPT, NOTHING_TO_MERGE = "search finished", "cut off", "nothing kept", "nothing to merge"
BELOW_TARGET, OTHER_CODE = "BELOW TARGET", "run by other code"


class Curve(NamedTuple):
    """One run on one workload: what it had saved, and when."""

    workload: str
    tolerance: float
    strategy: str
    seed: int
    optimal_saved_bytes: int
    history: list[tuple[float, int]]  # (CPU seconds, bytes saved by then), in order
    saved_bytes: int  # in the end, as reloaded from disk
    cpu_seconds: float  # of the whole run
    worst_ratio: float | None  # the lowest accuracy / target of its tasks, reloaded from disk; None: failed
    outcome: str  # FINISHED, CUT_OFF, or how it failed
    same_code: bool = True  # False: a run of earlier that other code made

    def share_at(self, cpu_seconds: float) -> float:
        """The share of optimal that was kept by then; nan if there is nothing to merge."""
        kept = [saved for moment, saved in self.history if moment <= cpu_seconds]
        return self.share_of(kept[-1] if kept else 0)

    def share_of(self, saved_bytes: int) -> float:
        """A share of optimal; nan if there is nothing to merge."""
        return saved_bytes / self.optimal_saved_bytes if self.optimal_saved_bytes else math.nan

    @property
    def first_kept(self) -> float:
        """CPU seconds until the first byte was saved; infinite if none was."""
        return next((moment for moment, saved in self.history if saved > 0), math.inf)

    @property
    def failed(self) -> bool:
        """Whether the run has no result."""
        return self.worst_ratio is None

    @property
    def note(self) -> str:
        """How the run ended, in words."""
        if self.failed:
            return self.outcome
        if not self.optimal_saved_bytes:
            return NOTHING_TO_MERGE
        said = [NOTHING_KEPT] if not self.saved_bytes else []
        said += [BELOW_TARGET] if self.worst_ratio is not None and self.worst_ratio < 1 else []
        return ", ".join([*said, self.outcome, *([] if self.same_code else [OTHER_CODE])])

    def running_at(self, cpu_seconds: float) -> bool:
        """False if the budget had ended the run by then: what is stated for that moment is what was kept before."""
        return self.outcome != CUT_OFF or cpu_seconds <= self.cpu_seconds


def curve_of(workload: str, tolerance: float, optimal: int, result: Result) -> Curve:
    """The curve of a measured run."""
    return Curve(
        workload,
        tolerance,
        result.run.variant,
        result.run.seed,
        optimal,
        [(entry["cpu_seconds"], entry["saved_bytes"]) for entry in result.history],
        result.saved_bytes,
        result.cpu_seconds,
        result.worst_ratio,
        FINISHED if result.finished else CUT_OFF,
        result.run.same_code,
    )


def failed_curve(workload: str, tolerance: float, strategy: str, seed: int, outcome: str) -> Curve:
    """The curve of a run that has no result. It counts as one that kept nothing of what there is."""
    return Curve(workload, tolerance, strategy, seed, 1, [], 0, 0.0, None, outcome)


def failure_text(failure: Failure) -> str:
    """How a run failed, in a few words."""
    return f"FAILED: exit code {failure.exit_code}"


# ---- over seeds and workloads ---------------------------------------------------------------------------

Quantity = Callable[[Curve], float]


def share_at(cpu_seconds: float) -> Quantity:
    """The quantity `Curve.share_at` of one moment."""
    return lambda curve: curve.share_at(cpu_seconds)


SHARES: dict[str, Quantity] = {
    **{f"{moment} s": share_at(moment) for moment in MOMENTS},
    "end": lambda curve: curve.share_of(curve.saved_bytes),
}


def strategies_of(curves: Sequence[Curve]) -> list[str]:
    """The names of the strategies, in the order of the curves."""
    return list(dict.fromkeys(curve.strategy for curve in curves))


def by_workload(curves: Sequence[Curve], strategy: str) -> dict[str, list[Curve]]:
    """Workload -> the runs of a strategy, one for each seed."""
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.strategy == strategy:
            found.setdefault(curve.workload, []).append(curve)
    return found


def over_seeds(curves: Sequence[Curve], quantity: Quantity) -> float:
    """The median over the seeds of one workload."""
    return statistics.median(map(quantity, curves))


class Overall(NamedTuple):
    """One quantity over workloads."""

    median: float
    worst: float
    worst_workload: str
    num_workloads: int


def overall(curves: Sequence[Curve], strategy: str, quantity: Quantity) -> Overall | None:
    """Median and worst over the workloads that have something to merge; None if there is none."""
    values = {name: over_seeds(runs, quantity) for name, runs in by_workload(curves, strategy).items()}
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    if not values:
        return None
    worst = min(values, key=values.__getitem__)
    return Overall(statistics.median(values.values()), values[worst], worst, len(values))


def score(curve: Curve) -> float:
    """The mean share of optimal at CHOSEN_BY: what strategies are chosen by."""
    return statistics.fmean(curve.share_at(moment) for moment in CHOSEN_BY)


class Choice(NamedTuple):
    """The strategy that is best on all other workloads, and what it is worth on the one that was left out."""

    workload: str
    strategy: str
    score: float
    best: float  # score of the strategy that is best on this workload


def leave_one_out(curves: Sequence[Curve]) -> list[Choice]:
    """For each workload that all strategies ran on: the choice by the mean score on the others."""
    scores = {
        strategy: {name: over_seeds(runs, score) for name, runs in by_workload(curves, strategy).items()}
        for strategy in strategies_of(curves)
    }
    shared = [n for n in dict.fromkeys(c.workload for c in curves) if all(n in of for of in scores.values())]
    shared = [name for name in shared if not any(math.isnan(of[name]) for of in scores.values())]
    choices = []
    for left_out in shared:
        others = [name for name in shared if name != left_out]
        if others:
            means = {strategy: statistics.fmean(of[name] for name in others) for strategy, of in scores.items()}
            chosen = max(means, key=means.__getitem__)
            best = max(of[left_out] for of in scores.values())
            choices.append(Choice(left_out, chosen, scores[chosen][left_out], best))
    return choices


# ---- tables ---------------------------------------------------------------------------------------------

HEADER = ("workload", "tolerance", *SHARES, "first kept, CPU s", "all, CPU s", "worst acc / target", "how it ended")


def strategy_table(curves: Sequence[Curve], strategy: str) -> str:
    """The runs of one strategy, a row for each workload, then median and worst."""
    own = [curve for curve in curves if curve.strategy == strategy]
    rows = [_row(name, runs) for name, runs in by_workload(own, strategy).items()]
    main = [curve for curve in own if curve.tolerance == MAIN_TOLERANCE]
    for label, part in ((f"{MAIN_TOLERANCE:g}", main), ("all", own)):
        rows += _overall_rows(part, strategy, label)
    worst = {title: overall(own, strategy, quantity) for title, quantity in SHARES.items()}
    named = [f"{title} {found.worst_workload}" for title, found in worst.items() if found]
    lines = [f"{strategy}: share of optimal kept, by CPU seconds since the merge began", table(HEADER, rows)]
    lines.append("~: the time budget had ended a run before. Worst workload: " + (", ".join(named) or "none"))
    return "\n".join(lines)


def _row(name: str, runs: Sequence[Curve]) -> tuple[str, ...]:
    cells = [_share(over_seeds(runs, quantity), title, runs) for title, quantity in SHARES.items()]
    first = over_seeds(runs, lambda curve: curve.first_kept)
    ratios = [run.worst_ratio for run in runs if run.worst_ratio is not None]
    return (
        *(name, f"{runs[0].tolerance:g}", *cells),
        f"{first:.0f}" if math.isfinite(first) else "never",
        f"{over_seeds(runs, lambda curve: curve.cpu_seconds):.0f}",
        f"{min(ratios):.3f}" if ratios else "-",
        "; ".join(dict.fromkeys(run.note for run in runs)),
    )


def _overall_rows(curves: Sequence[Curve], strategy: str, label: str) -> list[tuple[str, ...]]:
    found = {title: one for title, quantity in SHARES.items() if (one := overall(curves, strategy, quantity))}
    if not found:
        return []
    rest = ("",) * (len(HEADER) - 2 - len(SHARES))
    counted = f"{found['end'].num_workloads} workloads"
    return [
        (
            *(f"{what} of {counted}", label),
            *(_share(getattr(one, what), title, curves) for title, one in found.items()),
            *rest,
        )
        for what in ("median", "worst")
    ]


def _share(value: float, title: str = "end", runs: Sequence[Curve] = ()) -> str:
    """A cell; marked if the budget had ended one of the runs before the moment in the title of its column."""
    if math.isnan(value):
        return "-"
    moment = 0.0 if title == "end" else float(title.split()[0])
    return ("" if all(run.running_at(moment) for run in runs) else "~") + share(value, 1)


def choice_table(choices: Sequence[Choice]) -> str:
    """What choosing by the other workloads is worth on each; score: as in `score`."""
    rows = [(c.workload, c.strategy, _share(c.score), _share(c.best)) for c in choices]
    return table(("left out", "chosen by the others", "its score there", "best score there"), rows)


def summary_json(curves: Sequence[Curve]) -> dict[str, Any]:
    """Median and worst of each strategy, for the main tolerance and for all, and the choices, as plain values."""
    summary: dict[str, Any] = {}
    for strategy in strategies_of(curves):
        main = [curve for curve in curves if curve.tolerance == MAIN_TOLERANCE]
        summary[strategy] = {
            label: {title: found._asdict() for title, q in SHARES.items() if (found := overall(part, strategy, q))}
            for label, part in ((f"{MAIN_TOLERANCE:g}", main), ("all", curves))
        }
    return {"strategies": summary, "leave_one_out": [choice._asdict() for choice in leave_one_out(curves)]}
