"""Compares strategies on one workload under equal conditions: memory saved, time until then, accuracy.

    python -m benchmarks.strategies --workload FILE.py --datasets DIR --strategies gemel-published gemel all stem \
        --seeds 0 1 2 --time-budget 20m --out DIR

Takes at most strategies x seeds x budget; each run is a process of its own. Prints two tables and writes
DIR/strategies.json, DIR/strategies.png and, against CPU seconds, DIR/strategies_cpu.png. Finished runs with equal
settings are used again.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from benchmarks.conditions import Bench, add_arguments, open_bench
from benchmarks.one_run import write_json
from benchmarks.plots import plot_saving
from benchmarks.runs import Failure, Result, code_digest, run_all, versions
from benchmarks.summary import BASELINES, COSTS, LEVELS, TIMES, Ratio, levels_of, summarise, variants_of
from benchmarks.workloads import run_command
from gemel.console.tables import mib, share, table
from gemel.environment.units import MIB
from gemel.strategies import STRATEGIES
from gemel.workload import Problem, WorkloadError

BUSY = 0.8  # a run with a smaller share of one core than this shared the machine with other programs
# name -> options of merge_workload. gemel-published: the settings of the paper (NSDI 2023): its learning rate, the
# weights of the first model, unchanged normalisation statistics, no average of weights, no warm-up. gemel-frozen: gemel
# ties the late layers first, so the layers before them can stay frozen. Each strategy with our settings is a variant.
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
    """The named variants, in this order, each once. Raises WorkloadError listing all unknown names."""
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
    optimal = bench.unmerged.optimal_saved_bytes
    cells = (
        f"{outcome.run.variant} seed {outcome.run.seed}:",
        f"saved {mib(outcome.saved_bytes)} ({share(outcome.saved_bytes, optimal)} of optimal),",
        f"worst task at {outcome.worst_ratio:.3f} of its target,",
        f"{len(outcome.rounds)} rounds, {outcome.seconds:.0f} s, {outcome.cpu_seconds:.0f} CPU s,",
        "search finished" if outcome.finished else "cut off",
    )
    return " ".join(cells) + (" (run earlier)" if outcome.run.reused else "")


def end_table(summaries: dict[str, dict]) -> str:
    """The final saving, accuracy and cost of each variant: medians over seeds, as reloaded from disk."""
    header = [*("strategy", "saved", "of workload", "of optimal", "worst acc / target", "on test", "rounds")]
    header += ["seconds", "CPU s", "search finished"]
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
                f"{summary['search_finished']} of {len(summary['seeds'])}",
            )
        )
    return table(header, rows)


def level_table(summaries: dict[str, dict]) -> str:
    """Costs of each variant until it has saved a share of what the baseline saves, and ratios to the baselines."""
    baseline, published = BASELINES
    header = ["level", "strategy", "seconds", "CPU s", "samples", "steps"]
    header += [f"{baseline} takes", "in CPU s", f"{published} takes", "in CPU s"]
    rows = []
    for level in LEVELS:
        for variant, summary in summaries.items():
            found = summary["to_level"].get(f"{level:g}")
            if found is None:
                continue
            never = "never" if summary["search_finished"] == len(summary["seeds"]) else "> budget"
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
    """Warnings and explanations that belong to the tables, one per line."""
    levels = levels_of(results, 1.0)
    lines = []
    if levels:
        saved = sorted(map(round, levels.values()))
        amounts = mib(saved[0]) if saved[0] == saved[-1] else f"{saved[0] / MIB:.2f} to {mib(saved[-1])}"
        lines.append(f"The level 100 % is what {BASELINES[0]} saves within the budget with the same seed: {amounts}.")
    else:
        lines.append(f"No run of {BASELINES[0]} saved anything, so costs until a level cannot be compared.")
    for result in results:
        named = f"{result.run.variant} seed {result.run.seed}"
        if result.worst_ratio < 1:
            lines.append(f"BELOW TARGET: {named} writes a task at {result.worst_ratio:.4f} of its target.")
        recorded = result.history[-1]["saved_bytes"] if result.history else 0
        if recorded != result.saved_bytes:
            lines.append(f"{named}: its history states {mib(recorded)}, the files save {mib(result.saved_bytes)}.")
        if bench.workload.device.type == "cpu" and result.cpu_seconds < BUSY * result.seconds:
            part = share(result.cpu_seconds, result.seconds)
            lines.append(f"{named} had {part} of one core: other programs ran beside it, so compare CPU seconds.")
        if not result.run.same_code:
            lines.append(f"{named} was run with other code than is here now; --fresh runs it again.")
    return lines


# ---- the command ----------------------------------------------------------------------------------------


def report(results: list[Result], failures: list[Failure], bench: Bench) -> str:
    """Writes strategies.json and the two plots; returns the text to print."""
    settings, unmerged = bench.settings, bench.unmerged
    limits = (unmerged.total_bytes, unmerged.optimal_saved_bytes, settings.time_budget)
    summaries = {variant: summarise(results, variant, *limits) for variant in variants_of(results)}
    written = {
        "workload": bench.workload.file,
        "total_bytes": unmerged.total_bytes,
        "optimal_saved_bytes": unmerged.optimal_saved_bytes,
        "time_budget": settings.time_budget,
        "tolerance": settings.tolerance,
        "device": bench.workload.device.type,
        "threads": settings.threads,
        "jobs": settings.jobs,
        "versions": versions(),
        "code": code_digest(),
        "variants": {variant: VARIANTS[variant] for variant in summaries},
        "strategies": summaries,
        "notes": notes(results, bench),
        "failures": [str(failure) for failure in failures],
        "runs": [result.as_json() for result in results],
    }
    write_json(settings.out / "strategies.json", written)
    plot_saving(results, bench, settings.out / "strategies.png")
    plot_saving(results, bench, settings.out / "strategies_cpu.png", "cpu_seconds")
    parts = [end_table(summaries)]
    if levels_of(results, 1.0):
        parts.append(level_table(summaries))
    return "\n\n".join([*parts, "\n".join([*notes(results, bench), *map(str, failures)])])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of this comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strategies", description=__doc__.split("\n\n")[0])
    parser.add_argument("--strategies", nargs="+", default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add_arguments(parser)
    return parser.parse_args(arguments)


def compare(flags: argparse.Namespace) -> list[Failure]:
    """Makes all runs and prints the tables; returns the runs that failed."""
    variants = pick_variants(flags.strategies)
    bench = open_bench(flags)
    num_runs = len(variants) * len(set(flags.seeds))
    minutes = math.ceil(num_runs * flags.time_budget / flags.jobs / 60)
    print(f"{num_runs} runs, at most {minutes} min plus their final evaluations", flush=True)
    results, failures = run_all(bench, variants, flags.seeds, lambda o: print(progress_line(o, bench), flush=True))
    if results:
        print("\n" + report(results, failures, bench))
    return failures


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    flags = parse_arguments(arguments)
    return run_command(lambda: compare(flags))


if __name__ == "__main__":
    sys.exit(main())
