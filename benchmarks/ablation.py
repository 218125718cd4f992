"""Measures what each part of recovery contributes: all groups tied at once (strategy "all"), over a grid of options.

    python -m benchmarks.ablation --workload FILE.py --datasets DIR --seeds 0 1 2 --time-budget 10m --out DIR

Takes at most cells of GRID x seeds x budget. Prints one row per cell and writes DIR/ablation.json. Finished runs with
equal settings are used again.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence

from benchmarks.conditions import Bench, add_arguments, open_bench
from benchmarks.one_run import write_json
from benchmarks.runs import Failure, Result, code_digest, run_all, versions
from benchmarks.summary import of_variant, spread, variants_of
from benchmarks.workloads import run_command
from gemel.console.tables import share, table

# option of merge_workload -> the values to compare, the simplest first; every combination is a cell, one row each.
GRID: dict[str, tuple] = {
    "initial_weights": ("first", "mean", "least_squares"),
    "alignment": ("none", "weights"),
    "probability_weight": (0.0, 1.0),  # 0: training with labels alone; 1: with the unmerged model as teacher as well
}
FIXED = {"strategy": "all", "screening_images": 0}  # the first round ties every group; all of val is evaluated


def cells(grid: Mapping[str, Sequence]) -> dict[str, dict]:
    """The name of every combination of the grid -> its options of merge_workload."""
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return {" ".join(f"{k}={v}" for k, v in cell.items()): {**FIXED, **cell} for cell in combinations}


def before_training(result: Result) -> dict[str, float]:
    """Task -> accuracy / unmerged accuracy, after all groups are tied and statistics re-estimated, before training."""
    first: dict[str, float] = {}
    for row in result.validations:
        if row["step"] == 0 and row["task"] not in first:
            first[row["task"]] = row["accuracy"] / result.tasks[row["task"]]["unmerged_val"]
    return first


def worst_at_end(result: Result) -> float | None:
    """Lowest accuracy / target in the first round, each task as last validated; None if no task was validated."""
    latest: dict[str, float] = {}
    step = 0
    for row in result.validations:
        if row["step"] < step or (row["step"] == 0 and row["task"] in latest):
            break  # the next round begins
        step = row["step"]
        latest[row["task"]] = row["accuracy"] / row["target"]
    return min(latest.values(), default=None)


def recovery(result: Result) -> dict:
    """Outcome and costs of the first round, which ties all groups; costs are infinite if a task missed its target.

    seconds: of the round. cpu_seconds: of the run until the end of the round, evaluation of unmerged models included.
    """
    tied = result.rounds[0] if result.rounds else None
    if tied is None or not tied["kept"]:
        reason = tied["reason"] if tied else "> budget"
        return {"reason": reason, **dict.fromkeys(("seconds", "cpu_seconds", "steps", "samples"), math.inf)}
    costs = {key: tied[key] for key in ("seconds", "steps", "samples")}
    return {"reason": tied["reason"], **costs, "cpu_seconds": result.history[0]["cpu_seconds"]}


# ---- the table ------------------------------------------------------------------------------------------


def summarise(results: Sequence[Result], variant: str) -> dict:
    """One cell of the grid over its seeds, as plain values for JSON."""
    runs = of_variant(results, variant)
    recovered, starts = [recovery(run) for run in runs], [before_training(run) for run in runs]
    costs = {
        key: spread([r[key] for r in recovered]).as_json() for key in ("seconds", "cpu_seconds", "steps", "samples")
    }
    tasks = {name for start in starts for name in start}
    ends = [end for run in runs if (end := worst_at_end(run)) is not None]
    return {
        "seeds": [run.run.seed for run in runs],
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
    """One row per cell: accuracy / unmerged accuracy before training, then the costs until all tasks are at target."""
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
    header = [*grid, *numbered, "mean", "worst / target", "seconds", "CPU s", "steps", "samples"]
    header += ["all at target", "ended"]
    legend = [f"task {i}: {name}" for i, name in enumerate(tasks, 1)]
    what = (
        "Per task: accuracy / unmerged accuracy before any training. Then: the worst task at the end of the round, and "
        "the costs until all tasks are at target."
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
    run = outcome.run
    return f"{run.variant} seed {run.seed}: {worst}, {steps}" + (" (run earlier)" if run.reused else "")


def report(results: list[Result], failures: list[Failure], bench: Bench) -> str:
    """Writes ablation.json; returns the text to print."""
    options = cells(GRID)
    summaries = {name: {"options": options[name], **summarise(results, name)} for name in variants_of(results)}
    written = {
        "workload": bench.workload.file,
        "time_budget": bench.settings.time_budget,
        "device": bench.workload.device.type,
        "threads": bench.settings.threads,
        "versions": versions(),
        "code": code_digest(),
        "cells": summaries,
        "failures": [str(failure) for failure in failures],
        "runs": [result.as_json() for result in results],
    }
    write_json(bench.settings.out / "ablation.json", written)
    runs = [result.run for result in results]
    stale = [f"{run.variant} seed {run.seed} was run with other code" for run in runs if not run.same_code]
    return "\n".join([ablation_table(summaries, GRID, list(bench.workload.tasks)), *stale, *map(str, failures)])


def compare(flags: argparse.Namespace) -> list[Failure]:
    """Makes all runs and prints the table; returns the runs that failed."""
    bench = open_bench(flags)
    results, failures = run_all(bench, cells(GRID), flags.seeds, lambda o: print(progress_line(o), flush=True))
    if results:
        print("\n" + report(results, failures, bench))
    return failures


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    flags = parser.parse_args(arguments)
    return run_command(lambda: compare(flags))


if __name__ == "__main__":
    sys.exit(main())
