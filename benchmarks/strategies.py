"""Compares strategies on one workload under equal conditions: what they save, how soon, and what it costs in accuracy.

    python -m benchmarks.strategies --workload FILE.py --datasets DIR --strategies gemel-published gemel all stem \
        --seeds 0 1 2 --time-budget 20m --out DIR

takes at most (strategies x seeds x budget), each run in a process of its own. It prints two tables and writes
DIR/strategies.json, DIR/strategies.png and the same against CPU seconds, DIR/strategies_cpu.png. Runs that are there
already are used again.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.conditions import Bench, add_arguments, open_bench
from benchmarks.one_run import write_json
from benchmarks.plots import plot_saving
from benchmarks.runs import Failure, Result, code_digest, exit_code_of, run_all, versions
from benchmarks.summary import BASELINES, COSTS, LEVELS, TIMES, Ratio, levels_of, summarise, variants_of
from gemel.merging.console import MIB, mib, share, table
from gemel.strategies import STRATEGIES
from gemel.workload import Problem, WorkloadError

BUSY = 0.8  # share of one core that a run on an idle machine gets, and more
# name -> options of merge_workload. Gemel as published (NSDI 2023): its learning rate, the first model's weights,
# normalisation statistics left alone, the trained weights themselves, no warm-up. Gemel ties the late layers first, so
# it is what the frozen prefix is for. Each strategy is also a variant of its own name, with our settings.
VARIANTS: dict[str, dict] = {
    "gemel-published": {
        "strategy": "gemel",
        "learning_rate": 1e-5,
        "initial_weights": "first",
        "statistics_batches": 0,
        "average_decay": 0,
        "warmup_steps": 0,
    },
    "gemel-frozen": {"strategy": "gemel", "freeze_prefix": True},
    **{name: {"strategy": name} for name in STRATEGIES},
}


def pick_variants(names: Sequence[str]) -> dict[str, dict]:
    """The named variants, in this order, once each. Raises WorkloadError for names that there are not."""
    allowed = ", ".join(VARIANTS)
    problems = [Problem("benchmark", "--strategies", repr(name), allowed) for name in names if name not in VARIANTS]
    if problems:
        raise WorkloadError(problems)
    return {name: VARIANTS[name] for name in names}


# ---- the tables -----------------------------------------------------------------------------------------


def progress_line(outcome: Result | Failure, bench: Bench) -> str:
    """One line for a run that has just ended."""
    if isinstance(outcome, Failure):
        return str(outcome)
    cells = (
        f"{outcome.variant} seed {outcome.seed}:",
        f"saved {mib(outcome.saved_bytes)} ({share(outcome.saved_bytes, bench.optimal_saved_bytes)} of optimal),",
        f"worst task at {outcome.worst_ratio:.3f} of its target,",
        f"{len(outcome.rounds)} rounds, {outcome.seconds:.0f} s, {outcome.cpu_seconds:.0f} CPU s,",
        "ended by itself" if outcome.finished else "cut off",
    )
    return " ".join(cells) + (" (run earlier)" if outcome.reused else "")


def end_table(summaries: dict[str, dict]) -> str:
    """What each strategy ends with: medians over seeds, as reloaded from disk."""
    header = ("strategy", "saved", "of workload", "of optimal", "worst acc / target", "on test", "rounds")
    header += ("seconds", "CPU s", "ended by itself")
    rows = []
    for variant, summary in summaries.items():
        test = summary["test_change"]
        rows.append(
            (
                variant,
                mib(summary["saved_bytes"]["median"]),
                share(summary["saved_of_workload"]["median"], 1),
                share(summary["saved_of_optimal"]["median"], 1),
                f"{summary['worst_accuracy_of_target']['median']:.3f}",
                "-" if test is None else f"{100 * test['median']:+.1f} %",
                f"{summary['rounds']['median']:g}",
                f"{summary['seconds']['median']:.0f}",
                f"{summary['cpu_seconds']['median']:.0f}",
                f"{summary['ended_by_itself']} of {len(summary['seeds'])}",
            )
        )
    return table(header, rows)


def level_table(summaries: dict[str, dict]) -> str:
    """What each strategy spends until it has saved a share of what the baseline ends with."""
    baseline, published = BASELINES
    header = ("until it has", "strategy", "seconds", "CPU s", "samples", "steps")
    header += (f"{baseline} takes", "in CPU s", f"{published} takes", "in CPU s")
    rows = []
    for level in LEVELS:
        for variant, summary in summaries.items():
            found = summary["to_level"].get(f"{level:g}")
            if found is None:
                continue
            never = "never" if summary["ended_by_itself"] == len(summary["seeds"]) else "> budget"
            costs = [_cost(found[cost], never) for cost in COSTS]
            ratios = [_times(found[f"{time}_of_{other}"]) for other in BASELINES for time in TIMES]
            rows.append((f"{100 * level:.0f} %", variant, *costs, *ratios))
    return table(header, rows)


def _cost(found: dict | None, never: str) -> str:
    if found is None:
        return "-"
    return never if found["median"] is None else f"{found['median']:.0f}"


def _times(found: dict | None) -> str:
    if found is None or found["value"] == 0:
        return "-"
    ratio = Ratio(**found)
    return f"{'> ' if ratio.at_least else ''}{ratio.value:.{1 if ratio.value < 100 else 0}f} x"


def notes(results: Sequence[Result], bench: Bench) -> list[str]:
    """What a reader of the tables must know."""
    levels = levels_of(results, 1.0)
    lines = []
    if levels:
        saved = sorted(levels.values())
        amounts = mib(saved[0]) if saved[0] == saved[-1] else f"{saved[0] / MIB:.2f} to {mib(saved[-1])}"
        lines.append(f"100 % is what {BASELINES[0]} ends with within the budget, seed by seed: {amounts}.")
    else:
        lines.append(f"No run of {BASELINES[0]} saved anything, so there are no levels to compare at.")
    for result in results:
        named = f"{result.variant} seed {result.seed}"
        if result.worst_ratio < 1:
            lines.append(f"BELOW TARGET: {named} ships a task at {result.worst_ratio:.4f} of its target.")
        recorded = result.history[-1]["saved_bytes"] if result.history else 0
        if recorded != result.saved_bytes:
            lines.append(f"{named}: its history says {mib(recorded)}, what is on disk saves {mib(result.saved_bytes)}.")
        if bench.device.type == "cpu" and result.cpu_seconds < BUSY * result.seconds:
            part = share(result.cpu_seconds, result.seconds)
            lines.append(f"{named} had {part} of one core: other programs ran beside it, so go by CPU seconds.")
        if not result.same_code:
            lines.append(f"{named} was run earlier, with other code than is here now (--fresh runs it again).")
    return lines


# ---- the command ----------------------------------------------------------------------------------------


def report(results: list[Result], failures: list[Failure], bench: Bench) -> str:
    """Writes strategies.json and the two plots and returns what is printed."""
    limits = (bench.total_bytes, bench.optimal_saved_bytes, bench.time_budget)
    summaries = {variant: summarise(results, variant, *limits) for variant in variants_of(results)}
    written = {
        "workload": bench.workload,
        "total_bytes": bench.total_bytes,
        "optimal_saved_bytes": bench.optimal_saved_bytes,
        "time_budget": bench.time_budget,
        "tolerance": bench.tolerance,
        "device": bench.device.type,
        "threads": bench.threads,
        "jobs": bench.jobs,
        "versions": versions(),
        "code": code_digest(),
        "variants": {variant: VARIANTS[variant] for variant in summaries},
        "strategies": summaries,
        "notes": notes(results, bench),
        "failures": [str(failure) for failure in failures],
        "runs": [asdict(result) for result in results],
    }
    write_json(bench.out / "strategies.json", written)
    plot_saving(results, bench, bench.out / "strategies.png")
    plot_saving(results, bench, bench.out / "strategies_cpu.png", "cpu_seconds")
    parts = [end_table(summaries)]
    if levels_of(results, 1.0):
        parts.append(level_table(summaries))
    return "\n\n".join([*parts, "\n".join([*notes(results, bench), *map(str, failures)])])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strategies", description=__doc__.split("\n\n")[0])
    parser.add_argument("--strategies", nargs="+", default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add_arguments(parser)
    return parser.parse_args(arguments)


def compare(flags: argparse.Namespace) -> list[Failure]:
    """The whole comparison; returns the runs that failed."""
    variants = pick_variants(flags.strategies)
    bench = open_bench(flags)
    num_runs = len(variants) * len(set(flags.seeds))
    minutes = math.ceil(num_runs * bench.time_budget / bench.jobs / 60)
    print(f"{num_runs} runs, at most {minutes} min and their closing evaluations", flush=True)
    results, failures = run_all(bench, variants, flags.seeds, lambda o: print(progress_line(o, bench), flush=True))
    if results:
        print("\n" + report(results, failures, bench))
    return failures


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    return exit_code_of(lambda: compare(flags))


if __name__ == "__main__":
    sys.exit(main())
