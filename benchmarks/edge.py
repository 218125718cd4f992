"""Merged against unmerged on a box with too little memory: frames answered, bytes moved, and what the simulator says.

    python -m benchmarks.edge [RESULTS] [--workload FILE.py] [--size 64] [--budgets 3] [--seconds 4] [--repeats 3]

Without RESULTS, models of --architectures with random weights are written into a temporary folder with everything tied
that can be. The workload is profiled; then frames arrive at --load times the rate that would fit if everything were in
memory, and at every budget the merged and the unmerged workload run in turn, `repeats` times. Medians. Time is counted
in CPU seconds, so that other programs do not matter; --wall: in seconds. --cold: weights come from the disk each time,
as on a box whose memory does not hold them (with --wall). About budgets x repeats x 2 x seconds. Every model runs all
of its layers: what it saves to run common ones once is measured by one_camera.py.

    python -m benchmarks.edge [RESULTS] --minutes 30

Instead, one run of `edge run` of so many minutes (by the wall clock), of the unmerged workload in 1.4 x the memory of
its largest model: whether the memory of the process stays flat, whether every frame that arrived is counted, and
whether SIGTERM ends it within a second (edge_long_run.py).
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.edge_long_run import long_run
from gemel.console.tables import table
from gemel.edge.blocks import blocks_of, sizes_of
from gemel.edge.counts import CpuClock, Stopwatch
from gemel.edge.frames import RandomFrames, default_transform
from gemel.edge.own import NOTHING_OWN, own_of
from gemel.edge.profile import Profile, measure
from gemel.edge.runtime import Result, Runtime
from gemel.edge.simulator import Load, Plan, budgets_between, simulate
from gemel.results_store.manifest import read_result
from gemel.results_store.write import write_results
from gemel.sharing.groups import Configuration, find_groups, saved_bytes, to_plain
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import tie
from model_architectures import build

MIB = 1 << 20
MOST = 4  # a run ends once its last frame is answered; if none is, after so many times its frames
PLAN = Plan(shared_computation=False)
NUM_CLASSES = 10


def write_tied(path: Path, architectures: Sequence[str]) -> None:
    """A result of models with random weights, with everything tied that can be."""
    torch.manual_seed(0)
    models = nn.ModuleDict({f"task{i}_{name}": build(name, NUM_CLASSES) for i, name in enumerate(architectures)})
    groups = find_groups(models)
    tie(models, groups, "first")
    write_as_merged(path, models, groups)


def write_as_merged(path: Path, models: nn.ModuleDict, groups: Configuration) -> None:
    """A result of these models, in which these groups are tied, that says of every task that it is at its target."""
    merged, saved = distinct_bytes(models), saved_bytes(groups)
    record = {"unmerged_acc": 1.0, "measured_unmerged_acc": 1.0, "target_acc": 0.9, "merged_acc": 1.0, "met": True}
    tasks = {
        name: {"task": _kind(name), "architecture": model.architecture, **record} for name, model in models.items()
    }
    memory = {"unmerged_bytes": merged + saved, "merged_bytes": merged, "saved_bytes": saved}
    manifest = {
        "tasks": tasks,
        "shared_layers": to_plain(groups),
        "memory": {**memory, "optimal_saved_bytes": saved},
        "run": {},
    }
    write_results(path, dict(models.items()), manifest, {"history": []})


def _kind(name: str) -> str:
    detects = any(part in name for part in ("fcos", "rcnn", "ssd", "retinanet", "yolo"))
    return "object_detection" if detects else "image_classification"


class Bench:
    """A profiled workload."""

    def __init__(self, results: Path, flags: argparse.Namespace):
        self.results, self.flags = results, flags
        self.frames = RandomFrames(flags.size, flags.size)
        manifest, store = read_result(results)
        own = own_of(flags.workload) if flags.workload else NOTHING_OWN
        self.models = {task: model for task, model in own.models.items() if task in manifest["tasks"]}
        kinds = {task: record["task"] for task, record in manifest["tasks"].items()}
        shared = {kind: default_transform(kind, flags.size) for kind in set(kinds.values())}
        self.transforms = {task: shared[kind] for task, kind in kinds.items()}
        sizes = sizes_of(store.entries)
        self.merged, self.unmerged = (
            blocks_of(manifest["tensors"], sizes, list(kinds), merged) for merged in (True, False)
        )
        self.profile = self.measured()

    def measured(self) -> Profile:
        """The profile as it is now: on a busy machine it changes from minute to minute."""
        with self.runtime(None, True) as runtime:
            return measure(runtime, self.frames, (1, 2, 4))

    @property
    def cycle_seconds(self) -> float:
        """Of one turn of every model, without reading weights."""
        return sum(task.run_seconds(1) + task.input_ms / 1e3 for task in self.profile.tasks.values())

    def runtime(self, budget: int | None, merged: bool) -> Runtime:
        options: dict[str, Any] = {"merged": merged, "device": "cpu", "through_cache": not self.flags.cold}
        options |= {"clock": Stopwatch if self.flags.wall else CpuClock, "shared_computation": False}
        return Runtime(self.results, budget, models=self.models, transforms=self.transforms, **options)

    def run(self, budget: int, merged: bool, load: Load) -> dict[str, Any]:
        with self.runtime(budget, merged) as runtime:

            def stop_after(result: Result) -> None:
                if result.frame >= load.count:
                    runtime.stop()

            return runtime.run(self.frames, load.fps, load.sla, MOST * load.count, on_result=stop_after)


def share_of(summary: dict[str, Any]) -> float:
    """Share of frames that were answered in time."""
    tasks = summary["tasks"].values()
    return sum(t["processed"] for t in tasks) / sum(t["processed"] + t["late"] + t["dropped"] for t in tasks)


def row_of(bench: Bench, budget: int, load: Load, repeats: int) -> list[str]:
    """The cells of one budget."""
    runs: dict[bool, list[dict]] = {False: [], True: []}
    profile = bench.measured()
    for _ in range(repeats):
        for merged in runs:
            runs[merged].append(bench.run(budget, merged, load))
    shares = {merged: statistics.median(map(share_of, found)) for merged, found in runs.items()}
    cells = [f"{budget / MIB:.1f}", f"{100 * shares[False]:.1f} %", f"{100 * shares[True]:.1f} %"]
    cells.append(f"{shares[True] / shares[False]:.2f}" if shares[False] else "-")
    for merged, blocks in ((False, bench.unmerged), (True, bench.merged)):
        summaries = runs[merged]
        cells.append(f"{100 * simulate(blocks, profile, budget, load, PLAN).share:.1f} %")
        exact = all(
            simulate(blocks, profile, budget, replace(load, count=MOST * load.count), PLAN, s["turns"]).bytes_moved
            == s["bytes_moved"]
            for s in summaries
        )
        moved = statistics.median(s["bytes_moved"] / s["turns"] for s in summaries)
        cells.append(f"{moved / MIB:.2f}{'' if exact else ' (simulated: other)'}")
        cells.append(f"{statistics.median(s['swap_seconds'] for s in summaries):.2f}")
        assert all(s["peak_resident_bytes"] <= budget for s in summaries), "more in memory than the budget"
    return cells


HEADER = (
    *("MiB", "in time, unmerged", "merged", "ratio"),
    *("unmerged, simulated", "MiB a turn", "s waited", "merged, simulated", "MiB a turn", "s waited"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", metavar="RESULTS", help="default: models with random weights")
    parser.add_argument("--workload", metavar="FILE.py", help="models that the results do not describe")
    parser.add_argument("--architectures", nargs="+", default=["resnet18"] * 4, help="default: four resnet18")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: %(default)s)")
    parser.add_argument("--budgets", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--load", type=float, default=2.0, help="times what fits (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="read weights from the disk every time")
    parser.add_argument("--wall", action="store_true", help="by wall time: for an idle machine")
    parser.add_argument("--minutes", type=float, help="instead, one run of so many minutes: its memory, and its end")
    flags = parser.parse_args(arguments)
    flags.wall |= flags.minutes is not None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if flags.results is None:
            write_tied(Path(folder) / "tied", flags.architectures)
        bench = Bench(Path(flags.results or Path(folder) / "tied"), flags)
        if flags.minutes is not None:
            return int(not long(bench, flags))
        print_table(bench, flags)
    return 0


def long(bench: Bench, flags: argparse.Namespace) -> bool:
    """Whether a long run of the unmerged workload is as it should be."""
    given = ["--size", str(flags.size), *(["--workload", flags.workload] if flags.workload else [])]
    budget = int(1.4 * bench.unmerged.bytes_of(bench.unmerged.largest))
    return long_run(bench.results, given, budget, load_of(bench, flags), flags.minutes)


def load_of(bench: Bench, flags: argparse.Namespace) -> Load:
    """--load times the frames that would fit if everything were in memory."""
    cycle = bench.cycle_seconds
    fps = flags.load / cycle
    return Load(fps, max(2.5 * cycle, 2 / fps), max(10, round(flags.seconds * fps)))


def print_table(bench: Bench, flags: argparse.Namespace) -> None:
    load = load_of(bench, flags)
    print(
        f"{len(bench.profile.tasks)} tasks, {bench.merged.distinct_bytes / MIB:.1f} MiB merged, "
        f"{bench.unmerged.distinct_bytes / MIB:.1f} MiB unmerged; a cycle runs {1e3 * bench.cycle_seconds:.1f} ms; "
        f"{load.fps:.1f} frames a second and task, each to be answered within {1e3 * (load.sla or 0):.0f} ms"
    )
    rows = [row_of(bench, b, load, flags.repeats) for b in budgets_between(bench.merged, bench.unmerged, flags.budgets)]
    print(table(HEADER, rows), flush=True)


if __name__ == "__main__":
    sys.exit(main())
