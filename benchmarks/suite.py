"""Compares strategies on a suite of small workloads: the share of optimal kept over CPU seconds, median and worst.

    python -m benchmarks.suite --out DIR --strategies gemel adaptive --time-budget 300s

The first run draws images and trains the models, in minutes, and keeps them below DIR. Fashion-MNIST is the Debian
package dataset-fashion-mnist (--fashion-mnist: the folder of its files); --shared-datasets is a folder with sets of
photographs; --mobilenet-v2 a state dict of torchvision's model. Workloads whose source is not given are left out, and
said so. Prints a table per strategy; writes DIR/suite.json (with the curves) and DIR/suite.png. Finished runs with
equal settings are used again; a run that other code made is marked in the table.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.conditions import Bench, add_run_arguments, open_bench
from benchmarks.one_run import write_json
from benchmarks.plots import plot_shares
from benchmarks.runs import Failure, Result, code_digest, run_all, versions
from benchmarks.strategies import VARIANTS, pick_variants, progress_line
from benchmarks.suite_datasets import Sources
from benchmarks.suite_prepare import Prepared, datasets_root, prepare
from benchmarks.suite_summary import (
    Curve,
    choice_table,
    curve_of,
    failed_curve,
    failure_text,
    leave_one_out,
    strategies_of,
    strategy_table,
    summary_json,
)
from benchmarks.suite_workloads import FASHION, MOBILENET, SHARED, SUITE, Suite
from benchmarks.workloads import run_command
from gemel.environment import DEVICES
from gemel.workload import Problem, WorkloadError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package
DEFAULT_STRATEGIES = ("gemel", "adaptive")
TIME_BUDGET = 300.0  # seconds of wall time per run


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.split("\n\n")[0])
    names = parser.add_argument_group("what is run")
    names.add_argument("--workloads", nargs="+", default=None, metavar="NAME", help="default: all of the suite")
    default = " ".join(DEFAULT_STRATEGIES)
    help_of = f"{', '.join(VARIANTS)} (default: {default})"
    names.add_argument("--strategies", nargs="+", default=DEFAULT_STRATEGIES, metavar="NAME", help=help_of)
    help_of = "name of what differs from other runs, such as the value of a threshold; part of the strategies' names"
    names.add_argument("--label", metavar="NAME", help=help_of)
    help_of = "suite.json of earlier runs, to be compared with"
    names.add_argument("--beside", nargs="+", type=Path, default=[], metavar="FILE", help=help_of)
    help_of = "where the curves are written, and beside it the plot (default: DIR/suite.json)"
    names.add_argument("--json", type=Path, metavar="FILE", help=help_of)
    names.add_argument("--prepare-only", action="store_true", help="draw and train what is missing; run nothing")
    sources = parser.add_argument_group("sources, needed until the workloads are prepared")
    sources.add_argument(FASHION, type=Path, default=FASHION_FOLDER, metavar="DIR", help="default: %(default)s")
    sources.add_argument(SHARED, type=Path, metavar="DIR", help="folder with sets of photographs")
    sources.add_argument(MOBILENET, type=Path, metavar="FILE", help="state dict of torchvision's mobilenet_v2")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    add_run_arguments(parser)
    parser.set_defaults(time_budget=TIME_BUDGET)
    return parser.parse_args(arguments)


def pick_workloads(names: Sequence[str] | None, suite: Suite) -> list[str]:
    """The named workloads, each once; all without names. Raises WorkloadError listing all unknown names."""
    allowed = ", ".join(suite.workloads)
    unknown = [name for name in names or () if name not in suite.workloads]
    if unknown:
        raise WorkloadError([Problem("suite", "--workloads", repr(name), allowed) for name in unknown])
    return list(dict.fromkeys(suite.workloads if names is None else names))


def labelled_variants(flags: argparse.Namespace) -> dict[str, dict]:
    """The strategies by the names that their runs have, with the label. Raises WorkloadError for unknown ones."""
    after = f"@{flags.label}" if flags.label else ""
    return {name + after: options for name, options in pick_variants(flags.strategies).items()}


def read_curves(files: Sequence[Path]) -> list[Curve]:
    """The runs of earlier suite.json files. Raises WorkloadError naming every file that is none."""
    curves, problems = [], []
    for file in files:
        try:
            written = json.loads(file.read_text(encoding="utf-8"))["curves"]
            curves += [Curve(**{**one, "history": [(cpu, saved) for cpu, saved in one["history"]]}) for one in written]
        except (OSError, ValueError, KeyError, TypeError) as error:
            got = f"{file}: {type(error).__name__}: {error}"
            problems.append(Problem("suite", "--beside", got, "a suite.json that this command wrote"))
    if problems:
        raise WorkloadError(problems)
    return curves


def sources_of(flags: argparse.Namespace) -> Sources:
    """The sources that the flags name."""
    return {FASHION: flags.fashion_mnist, SHARED: flags.shared_datasets, MOBILENET: flags.mobilenet_v2}


# ---- running --------------------------------------------------------------------------------------------


def run_workload(name: str, file: Path, flags: argparse.Namespace, suite: Suite) -> list[Curve]:
    """All runs on one workload; a workload that cannot be opened has failed with every strategy and seed."""
    variants, tolerance, root = labelled_variants(flags), suite.workloads[name].tolerance, flags.out
    own = {"workload": str(file), "datasets": str(datasets_root(root)), "tolerance": None, "out": root / "runs" / name}
    try:
        bench = open_bench(argparse.Namespace(**{**vars(flags), **own}))
    except WorkloadError as error:
        print(f"{name}: {error}", flush=True)
        return [failed_curve(name, tolerance, v, s, "FAILED: wrong input") for v in variants for s in flags.seeds]
    optimal = bench.unmerged.optimal_saved_bytes
    report = _reporter(name, bench)
    results, failures = run_all(bench, variants, flags.seeds, report)
    curves = [curve_of(name, tolerance, optimal, result) for result in results]
    return curves + [failed_curve(name, tolerance, f.variant, f.seed, failure_text(f)) for f in failures]


def _reporter(name: str, bench: Bench) -> Callable[[Result | Failure], None]:
    def report(outcome: Result | Failure) -> None:
        print(f"{name}: {progress_line(outcome, bench)}", flush=True)

    return report


def write_report(curves: list[Curve], prepared: Prepared, flags: argparse.Namespace, suite: Suite) -> str:
    """Writes suite.json and suite.png; returns the tables."""
    written = {
        "workloads": {name: suite.workloads[name]._asdict() for name in prepared.files},
        "left_out": prepared.left_out,
        "time_budget": flags.time_budget,
        "device": flags.device,
        "threads": flags.threads,
        "jobs": flags.jobs,
        "versions": versions(),
        "code": code_digest(),
        "summary": summary_json(curves),
        "curves": [curve._asdict() for curve in curves],
    }
    file = flags.json or flags.out / "suite.json"
    write_json(file, written)
    plot_shares(curves, file.with_suffix(".png"))
    parts = [strategy_table(curves, strategy) for strategy in strategies_of(curves)]
    if len(strategies_of(curves)) > 1 and (choices := leave_one_out(curves)):
        parts.append(choice_table(choices))
    return "\n\n".join(parts)


# ---- the command ----------------------------------------------------------------------------------------


def left_out_lines(prepared: Prepared, num_asked: int) -> str:
    """How many of the workloads can be run, and which are left out and why."""
    lines = [f"{len(prepared.files)} of {num_asked} workloads are prepared, {len(prepared.left_out)} left out"]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in prepared.left_out.items())])


def compare(flags: argparse.Namespace, suite: Suite = SUITE) -> list[Curve]:
    """Prepares, makes all runs and prints the tables; returns the runs that failed."""
    names = pick_workloads(flags.workloads, suite)
    variants, earlier = labelled_variants(flags), read_curves(flags.beside)
    torch.set_num_threads(flags.threads)
    prepared = prepare(flags.out, suite, names, sources_of(flags), lambda line: print(line, flush=True))
    print(left_out_lines(prepared, len(names)), flush=True)
    if flags.prepare_only or not prepared.files:
        return []
    curves: list[Curve] = []
    for name, file in prepared.files.items():
        curves += run_workload(name, file, flags, suite)
    earlier = [curve for curve in earlier if curve.workload in prepared.files and curve.strategy not in variants]
    print("\n" + write_report([*earlier, *curves], prepared, flags, suite))
    if prepared.left_out:
        print("\n" + left_out_lines(prepared, len(names)))
    return [curve for curve in curves if curve.failed]


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    flags = parse_arguments(arguments)
    return run_command(lambda: compare(flags))


if __name__ == "__main__":
    sys.exit(main())
