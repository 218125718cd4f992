"""What each part of recovery is worth: everything tied at once (strategy all), over a grid of options.

    python -m benchmarks.ablation --workload FILE.py --datasets DIR --seeds 0 1 2 --time-budget 10m --out DIR

takes at most (cells of GRID x seeds x budget). Prints one row per cell and writes DIR/ablation.json. Runs that are
there already are used again.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from benchmarks.conditions import Bench, add_arguments, open_bench
from benchmarks.one_run import write_json
from benchmarks.runs import Failure, Result, code_digest, exit_code_of, run_all, versions
from benchmarks.summary import of_variant, spread, variants_of
from gemel.merging.console import share, table

# option of merge_workload -> the values to compare, the first one being the plainest; every combination is a row.
GRID: dict[str, tuple] = {
    "initial_weights": ("first", "mean", "least_squares"),
    "alignment": ("none", "weights"),
    "probability_weight": (0.0, 1.0),  # training with labels alone, or with the unmerged model as teacher as well
}
FIXED = {"strategy": "all", "screening_images": 0}  # its first round ties every group; all of val is always evaluated


def cells(grid: Mapping[str, Sequence]) -> dict[str, dict]:
    """Every combination of the grid: its name -> the options of merge_workload."""
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return {" ".join(f"{k}={v}" for k, v in cell.items()): {**FIXED, **cell} for cell in combinations}


def before_training(result: Result) -> dict[str, float]:
    """Task -> accuracy / unmerged accuracy, right after everything was tied (and statistics re-estimated, if asked)."""
    first: dict[str, float] = {}
    for row in result.validations:
        if row["step"] == 0 and row["task"] not in first:
            first[row["task"]] = row["accuracy"] / result.tasks[row["task"]]["unmerged_val"]
    return first


def worst_at_end(result: Result) -> float | None:
    """Lowest accuracy / target, each task as last validated in the round that ties everything; None if none was."""
    latest: dict[str, float] = {}
    step = 0
    for row in result.validations:
        if row["step"] < step or (row["step"] == 0 and row["task"] in latest):
            break  # the next round
        step = row["step"]
        latest[row["task"]] = row["accuracy"] / row["target"]
    return min(latest.values(), default=None)


def recovery(result: Result) -> dict:
    """How the round that ties everything went; a cost is infinite if not all tasks came back to their targets.

    Seconds are those of the round; CPU seconds those of the run until then, with the evaluation of the unmerged models.
    """
    tied = result.rounds[0] if result.rounds else None
    if tied is None or not tied["kept"]:
        reason = tied["reason"] if tied else "> budget"
        return {"reason": reason, **dict.fromkeys(("seconds", "cpu_seconds", "steps", "samples"), math.inf)}
    costs = {key: tied[key] for key in ("seconds", "steps", "samples")}
    return {"reason": tied["reason"], **costs, "cpu_seconds": result.history[0]["cpu_seconds"]}


# ---- the table ------------------------------------------------------------------------------------------


def summarise(results: Sequence[Result], variant: str) -> dict:
    """One cell over its seeds, as plain values for JSON."""
    runs = of_variant(results, variant)
    recovered, starts = [recovery(run) for run in runs], [before_training(run) for run in runs]
    costs = {
        key: spread([r[key] for r in recovered]).as_json() for key in ("seconds", "cpu_seconds", "steps", "samples")
    }
    tasks = {name for start in starts for name in start}
    ends = [end for run in runs if (end := worst_at_end(run)) is not None]
    return {
        "seeds": [run.seed for run in runs],
        "reached": sum(math.isfinite(r["steps"]) for r in recovered),
        "reasons": sorted({r["reason"] for r in recovered}),
        "before_training": {
            name: statistics.median(start[name] for start in starts if name in start)
            for name in runs[0].tasks
            if name in tasks
        },
        "worst_at_end": statistics.median(ends) if ends else None,
        **costs,
    }


def ablation_table(summaries: Mapping[str, Mapping], grid: Mapping[str, Sequence], tasks: Sequence[str]) -> str:
    """One row per cell: accuracy / unmerged before any training, then what it took until all were at target."""
    rows = []
    for summary in summaries.values():
        starts = [summary["before_training"].get(name) for name in tasks]
        mean = statistics.mean(starts) if None not in starts else None
        costs = [summary[key]["median"] for key in ("seconds", "cpu_seconds", "steps", "samples")]
        rows.append(
            (
                *(str(summary["options"][option]) for option in grid),
                *("-" if start is None else share(start, 1) for start in (*starts, mean)),
                "-" if summary["worst_at_end"] is None else share(summary["worst_at_end"], 1),
                *("-" if cost is None else f"{cost:.0f}" for cost in costs),
                f"{summary['reached']} of {len(summary['seeds'])}",
                ", ".join(summary["reasons"]),
            )
        )
    numbered = [f"task {i}" for i in range(1, len(tasks) + 1)]
    header = (*grid, *numbered, "mean", "worst / target", "seconds", "CPU s", "steps", "samples")
    header += ("all at target", "ended")
    legend = [f"task {i}: {name}" for i, name in enumerate(tasks, 1)]
    what = (
        "Per task: accuracy / unmerged accuracy before any training. Then: the worst task at the end of the round, and "
        "what it took until all were at their targets."
    )
    return "\n".join([table(header, rows), "", what, *legend])


# ---- the command ----------------------------------------------------------------------------------------


def progress_line(outcome: Result | Failure) -> str:
    """One line for a run that has just ended."""
    if isinstance(outcome, Failure):
        return str(outcome)
    starts, found = before_training(outcome), recovery(outcome)
    worst = f"worst task at {share(min(starts.values()), 1)} before training" if starts else "nothing was trained"
    steps = f"{found['steps']} steps, {found['seconds']:.0f} s" if math.isfinite(found["steps"]) else found["reason"]
    return f"{outcome.variant} seed {outcome.seed}: {worst}, {steps}" + (" (run earlier)" if outcome.reused else "")


def report(results: list[Result], failures: list[Failure], bench: Bench) -> str:
    """Writes ablation.json and returns what is printed."""
    options = cells(GRID)
    summaries = {name: {"options": options[name], **summarise(results, name)} for name in variants_of(results)}
    written = {
        "workload": bench.workload,
        "time_budget": bench.time_budget,
        "device": bench.device.type,
        "threads": bench.threads,
        "versions": versions(),
        "code": code_digest(),
        "cells": summaries,
        "failures": [str(failure) for failure in failures],
        "runs": [asdict(result) for result in results],
    }
    write_json(bench.out / "ablation.json", written)
    stale = [f"{r.variant} seed {r.seed} was run earlier, with other code" for r in results if not r.same_code]
    return "\n".join([ablation_table(summaries, GRID, list(bench.tasks)), *stale, *map(str, failures)])


def compare(flags: argparse.Namespace) -> list[Failure]:
    """The whole comparison; returns the runs that failed."""
    bench = open_bench(flags)
    results, failures = run_all(bench, cells(GRID), flags.seeds, lambda o: print(progress_line(o), flush=True))
    if results:
        print("\n" + report(results, failures, bench))
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    flags = parser.parse_args(arguments)
    return exit_code_of(lambda: compare(flags))


if __name__ == "__main__":
    sys.exit(main())
