"""The runs of a comparison: each a merge in a process of its own, under equal conditions, measured from its results.

`run_all` runs every (variant, seed), then reloads and evaluates each results folder. A finished run with equal settings
is used again, so a comparison that was interrupted resumes where it stopped.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.conditions import Bench
from benchmarks.one_run import FINISHED, RESULTS, SPEC, write_json
from gemel.evaluation.eval_method import evaluate
from gemel.options import MergeOptions
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.sharing.memory import distinct_bytes
from gemel.training.options import TrainingOptions
from gemel.workload import Task

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = (
    "fresh",
    "num_threads",
    "num_workers",
    "training",
)  # fields of MergeOptions that do not change what is measured


@dataclass(frozen=True)
class Run:
    """One variant merged with one seed."""

    variant: str
    seed: int
    folder: str  # below the comparison's --out
    reused: bool  # the run was finished before this comparison started
    same_code: bool  # its process ran the code that is here now


@dataclass(frozen=True)
class Result:
    """The measured run: memory and accuracy as reloaded from disk, costs and history from its manifest."""

    run: Run
    saved_bytes: int
    finished: bool  # the search ended normally; False: the time budget ended it
    seconds: float
    cpu_seconds: float
    history: list[dict]  # of workload_stats.json: what was kept, and when
    rounds: list[dict]
    tasks: dict[str, dict]  # val, test, unmerged_val, unmerged_test, target
    validations: list[dict]  # every evaluation during training (benchmarks.one_run)

    @property
    def worst_ratio(self) -> float:
        """Lowest accuracy / target over the tasks: a result below 1 must not have been released merged."""
        return min(task["val"] / task["target"] for task in self.tasks.values())

    @property
    def test_change(self) -> float | None:
        """Mean change of accuracy on the test splits by merging; None if no task has a test split."""
        changes = [t["test"] - t["unmerged_test"] for t in self.tasks.values() if t["test"] is not None]
        return sum(changes) / len(changes) if changes else None

    def as_json(self) -> dict:
        """One flat dictionary, the fields of the run among them."""
        values = asdict(self)
        return {**values.pop("run"), **values}


@dataclass(frozen=True)
class Failure:
    """A run whose process exited with an error."""

    variant: str
    seed: int
    exit_code: int
    log: Path

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed}: failed with exit code {self.exit_code}, see {self.log}"


# ---- running --------------------------------------------------------------------------------------------


def run_all(
    bench: Bench,
    variants: Mapping[str, Mapping],
    seeds: Sequence[int],
    report: Callable[[Result | Failure], None],
) -> tuple[list[Result], list[Failure]]:
    """Runs every variant (a name -> options of merge_workload) with every seed; calls `report` as each one ends.

    All variants of one seed run before the next seed, so that an interrupted comparison has compared all variants at
    least once. A run that fails is left out of the results and does not stop the others.
    """
    bench.settings.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    failures: list[Failure] = []
    with ThreadPoolExecutor(bench.settings.jobs) as pool:
        planned = [(name, options, seed) for seed in dict.fromkeys(seeds) for name, options in variants.items()]
        futures = [pool.submit(_run, bench, *run) for run in planned]
        for run in _as_they_end(futures):
            if isinstance(run, Failure):
                failures.append(run)
                report(run)
            else:
                results.append(measure(bench, run))
                report(results[-1])
    order = {name: i for i, name in enumerate(variants)}
    return sorted(results, key=lambda result: (order[result.run.variant], result.run.seed)), failures


def _as_they_end(futures: list[Future]) -> Iterator[Run | Failure]:
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _run(bench: Bench, variant: str, options: Mapping, seed: int) -> Run | Failure:
    """Runs one variant with one seed, unless a finished run with equal settings exists."""
    settings, spec = bench.settings, run_spec(bench, options, seed)
    folder = settings.out / run_name(variant, seed, spec["settings"])
    if is_finished(folder, spec["settings"]) and not settings.fresh:
        return Run(variant, seed, folder.name, True, _spec_of(folder)["code"] == code_digest())
    if (folder / SPEC).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / SPEC, spec)
    command, log = [sys.executable, "-m", "benchmarks.one_run", str(folder)], folder / "log.txt"
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=_environment(settings.threads))
    if done.returncode != 0:
        return Failure(variant, seed, done.returncode, log)
    return Run(variant, seed, folder.name, False, spec["code"] == code_digest())


def run_spec(bench: Bench, options: Mapping, seed: int) -> dict:
    """What the process of one run reads. `settings`, defaults included, decide whether a finished run is used again."""
    workload, settings = bench.workload, bench.settings
    common = {
        "tolerance": settings.tolerance,
        "device": workload.device.type,
        "time_budget": settings.time_budget,
    }
    call = {**common, "seed": seed, **options}
    compared = {
        "options": {**default_options(), **call},
        "threads": settings.threads,
        "jobs": settings.jobs,
        "tasks": bench.unmerged.fingerprints,
    }
    where = {"workload": workload.file, "datasets": workload.datasets}
    return {"settings": compared, "call": call, **where, "code": code_digest(), "versions": versions()}


def default_options() -> dict:
    """The options of merge_workload and of training that change what is measured, with their defaults."""
    defaults = {f.name: f.default for f in fields(MergeOptions) if f.name not in NOT_MEASURED}
    return {**defaults, **asdict(TrainingOptions())}


def run_name(variant: str, seed: int, settings: Mapping) -> str:
    """The run's folder; its name depends on the settings, so that other settings overwrite nothing."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', variant)}-seed{seed}-{digest}"


def is_finished(folder: Path, settings: Mapping) -> bool:
    """Whether the folder holds a complete run of these settings."""
    if not (folder / FINISHED).is_file():
        return False
    return _spec_of(folder)["settings"] == json.loads(json.dumps(settings))


def _spec_of(folder: Path) -> dict:
    return json.loads((folder / SPEC).read_text(encoding="utf-8"))


def code_digest() -> str:
    """sha256, shortened, of all code that a run executes: everything but tests and benchmarks."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        first = path.relative_to(ROOT).parts[0]
        if not first.startswith(".") and first not in ("tests", "benchmarks", "sample_data"):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict:
    """The versions and the number of cores that a measurement depends on."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}


def _environment(threads: int) -> dict[str, str]:
    """The environment of a run's process: the same number of threads for every library, and this checkout first."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **counts, "PYTHONPATH": os.pathsep.join(paths)}


# ---- measuring ------------------------------------------------------------------------------------------


def measure(bench: Bench, run: Run) -> Result:
    """Loads a results folder into fresh copies of the unmerged models, evaluates them and counts their bytes."""
    folder = bench.settings.out / run.folder
    copies = {name: copy.deepcopy(task.model) for name, task in bench.workload.tasks.items()}
    models = load_merged(folder / RESULTS, copies, bench.workload.device)
    record = read_manifest(folder / RESULTS)["run"]
    return Result(
        run=run,
        saved_bytes=bench.unmerged.total_bytes - distinct_bytes(models),
        finished=record["finished"],
        seconds=record["seconds"],
        cpu_seconds=record["cpu_seconds"],
        history=record["history"],
        rounds=record["rounds"],
        tasks={name: _accuracies(bench, task, models[name]) for name, task in bench.workload.tasks.items()},
        validations=json.loads((folder / FINISHED).read_text(encoding="utf-8"))["validations"],
    )


def _accuracies(bench: Bench, task: Task, model: torch.nn.Module) -> dict:
    data, unmerged = bench.unmerged.data[task.name], bench.unmerged.accuracies[task.name]
    return {
        "val": evaluate(task, data.val, model),
        "test": None if data.test is None else evaluate(task, data.test, model),
        "unmerged_val": unmerged.val,
        "unmerged_test": unmerged.test,
        "target": task.target_acc,
    }
