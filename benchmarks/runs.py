"""The runs of a benchmark: each a merge in a fresh process, under equal conditions, judged by what it left on disk.

`run_all` runs every (variant, seed) and reloads and evaluates each results folder. A finished run with equal settings
is used again, so a benchmark that was interrupted goes on where it was.
"""

import copy
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.conditions import Bench
from benchmarks.one_run import FINISHED, RESULTS, SPEC, write_json
from gemel.evaluation.eval_method import evaluate
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.sharing.memory import distinct_bytes
from gemel.training.options import TrainingOptions
from gemel.workload import Task, WorkloadError
from merge_workloads import EXIT_DONE, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, merge_workload

ROOT = Path(__file__).resolve().parent.parent
EXIT_A_RUN_FAILED = 1
NO_SETTINGS = ("datasets", "fresh", "num_workers")  # options of merge_workload that do not change what is measured


@dataclass(frozen=True)
class Result:
    """One run: memory and accuracy as reloaded from disk, cost and course from its manifest."""

    variant: str
    seed: int
    folder: str  # below the benchmark's --out
    reused: bool  # the run was there already
    same_code: bool  # its process ran the code that is here now
    saved_bytes: int
    finished: bool  # it ended by itself; False: the time budget cut it off
    seconds: float
    cpu_seconds: float
    history: list[dict]  # of workload_stats.json: what was kept, and when
    rounds: list[dict]
    tasks: dict[str, dict]  # val, test, unmerged_val, unmerged_test, target
    validations: list[dict]  # benchmarks.one_run

    @property
    def worst_ratio(self) -> float:
        """Lowest accuracy / target over the tasks: below 1 the result must not have been shipped."""
        return min(task["val"] / task["target"] for task in self.tasks.values())

    @property
    def test_change(self) -> float | None:
        """Mean change of accuracy on the test splits by merging; None where no task has one."""
        changes = [t["test"] - t["unmerged_test"] for t in self.tasks.values() if t["test"] is not None]
        return sum(changes) / len(changes) if changes else None


@dataclass(frozen=True)
class Failure:
    """A run whose process did not end well."""

    variant: str
    seed: int
    exit_code: int
    log: Path

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed}: failed with exit code {self.exit_code}, see {self.log}"


def exit_code_of(command: Callable[[], Sequence[Failure]]) -> int:
    """Runs a benchmark's command, which returns its failures; what is wrong with the input is said and is no crash."""
    try:
        return EXIT_A_RUN_FAILED if command() else EXIT_DONE
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


# ---- running --------------------------------------------------------------------------------------------


def run_all(
    bench: Bench,
    variants: Mapping[str, Mapping],
    seeds: Sequence[int],
    say: Callable[[Result | Failure], None],
) -> tuple[list[Result], list[Failure]]:
    """Runs every variant (a name -> options of merge_workload) with every seed; `say` hears of each as it ends.

    Seed by seed, so that an interrupted benchmark has compared all variants at least once. A run that fails is left
    out and does not stop the others.
    """
    bench.out.mkdir(parents=True, exist_ok=True)
    results, failures = [], []
    with ThreadPoolExecutor(bench.jobs) as pool:
        planned = [(name, options, seed) for seed in dict.fromkeys(seeds) for name, options in variants.items()]
        futures = [pool.submit(_run, bench, *run) for run in planned]
        for outcome in _in_order_of_ending(futures):
            if not isinstance(outcome, Failure):
                outcome = measure(bench, *outcome)
            (failures if isinstance(outcome, Failure) else results).append(outcome)
            say(outcome)
    order = {name: i for i, name in enumerate(variants)}
    return sorted(results, key=lambda result: (order[result.variant], result.seed)), failures


def _in_order_of_ending(futures: list[Future]) -> Iterator:
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _run(bench: Bench, variant: str, options: Mapping, seed: int) -> tuple[str, int, Path, bool] | Failure:
    """Runs one variant, unless it was run; returns what `measure` wants to know."""
    spec = run_spec(bench, options, seed)
    folder = bench.out / run_name(variant, seed, spec["settings"])
    if is_finished(folder, spec["settings"]) and not bench.fresh:
        return variant, seed, folder, True
    if (folder / SPEC).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / SPEC, spec)
    command, log = [sys.executable, "-m", "benchmarks.one_run", str(folder)], folder / "log.txt"
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=_environment(bench.threads))
    return (variant, seed, folder, False) if done.returncode == 0 else Failure(variant, seed, done.returncode, log)


def run_spec(bench: Bench, options: Mapping, seed: int) -> dict:
    """What one process is told. `settings` decide whether a finished run can stand for it, defaults included."""
    conditions = {"tolerance": bench.tolerance, "device": bench.device.type, "time_budget": bench.time_budget}
    call = {**conditions, "seed": seed, **options}
    parameters = inspect.signature(merge_workload).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in NO_SETTINGS}
    settings = {
        "options": {**defaults, **asdict(TrainingOptions()), **call},
        "threads": bench.threads,
        "jobs": bench.jobs,
        "tasks": bench.identity,
    }
    where = {"workload": bench.workload, "datasets": bench.datasets}
    return {"settings": settings, "call": call, **where, "code": code_digest(), "versions": versions()}


def run_name(variant: str, seed: int, settings: Mapping) -> str:
    """The run's folder: other settings, another folder, so that nothing is overwritten."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', variant)}-seed{seed}-{digest}"


def is_finished(folder: Path, settings: Mapping) -> bool:
    """Whether the folder holds a complete run of these settings."""
    if not (folder / FINISHED).is_file():
        return False
    stored = json.loads((folder / SPEC).read_text(encoding="utf-8"))["settings"]
    return stored == json.loads(json.dumps(settings))


def code_digest() -> str:
    """sha256, shortened, over the code that a run executes: all but tests and benchmarks."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        first = path.relative_to(ROOT).parts[0]
        if not first.startswith(".") and first not in ("tests", "benchmarks", "sample_data"):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict:
    return {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}


def _environment(threads: int) -> dict:
    """Of a run's process: as many threads for everybody, this checkout first, wherever it is started from."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **counts, "PYTHONPATH": os.pathsep.join(paths)}


# ---- what a run is worth --------------------------------------------------------------------------------


def measure(bench: Bench, variant: str, seed: int, folder: Path, reused: bool) -> Result:
    """Loads a results folder into fresh copies of the unmerged models, and evaluates and weighs those."""
    copies = {name: copy.deepcopy(task.model) for name, task in bench.tasks.items()}
    models = load_merged(folder / RESULTS, copies, bench.device)
    run = read_manifest(folder / RESULTS)["run"]
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    return Result(
        variant=variant,
        seed=seed,
        folder=folder.name,
        reused=reused,
        same_code=spec["code"] == code_digest(),
        saved_bytes=bench.total_bytes - distinct_bytes(models),
        finished=run["finished"],
        seconds=run["seconds"],
        cpu_seconds=run["cpu_seconds"],
        history=run["history"],
        rounds=run["rounds"],
        tasks={name: _accuracies(bench, task, models[name]) for name, task in bench.tasks.items()},
        validations=json.loads((folder / FINISHED).read_text(encoding="utf-8"))["validations"],
    )


def _accuracies(bench: Bench, task: Task, model: torch.nn.Module) -> dict:
    data, unmerged = bench.data[task.name], bench.unmerged[task.name]
    return {
        "val": evaluate(task, data.val, model),
        "test": None if data.test is None else evaluate(task, data.test, model),
        "unmerged_val": unmerged.unmerged,
        "unmerged_test": unmerged.unmerged_test,
        "target": task.target_acc,
    }
