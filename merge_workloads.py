"""Merges the models of a workload so that identical layers share one set of weights: the script to run and edit.

    python merge_workloads.py                                   # the embedded default, ten minutes on two cores
    python merge_workloads.py --workload mine.py --datasets DIR # mine.py defines create_model_dict()
    python merge_workloads.py --workload mine.py --plan         # what could be saved; trains nothing

Put your own tasks into create_sample_model_dict(), or into a file of your own.
"""

import argparse
import importlib.util
import math
import os
import re
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import torchvision

import dataset_manager
import merger
import sample_workload
import tables
from environment import DEVICES, pick_device
from eval_methods import classification_eval, frcnn_eval
from fingerprint import differences, fingerprint
from model_architectures import build, load_weights
from results_store import foreign_files, has_results, read_manifest
from sharing.groups import find_groups
from sharing.memory import distinct_bytes
from sharing.strategies import STRATEGIES
from sharing.tying import INITIAL_WEIGHTS
from trainer import TrainingOptions
from transforms import classification_transforms, detection_transforms
from workload import Problem, WorkloadError, read_workload

EXIT_DONE, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 2, 130  # anything else ends in a traceback, which is 1


def create_sample_model_dict() -> dict:
    """The tasks to merge: one entry per trained model. Replace these four by your own (README, "Your own tasks")."""
    sample_workload.prepare()  # draws these four's street scenes and trains their models, once; yours are there already
    model_dict = {}

    # Which vehicle is it? A classifier of crops from the camera at Main & 2nd.
    name = "main_2nd_vehicles_resnet10"
    model = build("slim_resnet", num_classes=3, layers=(1, 1, 1, 1), width=32)
    model_dict[name] = {
        "model": load_weights(model, sample_workload.weights_path(name)),
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": classification_transforms(size=48),
        "unmerged_acc": sample_workload.unmerged_acc(name),
    }

    # Who is on the street? A deeper classifier of crops from the camera at Elm & 1st, at nightfall.
    name = "elm_1st_street_resnet18"
    model = build("slim_resnet", num_classes=4, layers=(2, 2, 2, 2), width=32)
    model_dict[name] = {
        "model": load_weights(model, sample_workload.weights_path(name)),
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": classification_transforms(size=48),
        "unmerged_acc": sample_workload.unmerged_acc(name),
    }

    # Where is everybody? One detector per camera: four classes and the background.
    for name in ("main_2nd_traffic_fcos", "elm_1st_traffic_fcos"):
        model = build(
            "fcos_model", 4 + 1, backbone="slim_resnet", layers=(1, 1, 1, 1), width=32, out_channels=64, min_size=128
        )
        model_dict[name] = {
            "model": load_weights(model, sample_workload.weights_path(name)),
            "task": "object_detection",
            "eval_method": frcnn_eval,
            "transforms": detection_transforms(),
            "unmerged_acc": sample_workload.unmerged_acc(name),
        }
    return model_dict


def merge_workload(
    model_dict: dict,
    results_path: str | Path = "results",
    *,
    datasets: str | Path | None = None,
    tolerance: float | None = None,
    strategy: str = "gemel",
    device: str = "auto",
    time_budget: float | None = None,
    fresh: bool = False,
    seed: int = 0,
    initial_weights: str = "mean",
    num_workers: int | None = None,
    **training,
) -> dict:
    """Merges a workload, in place, and writes the results folder; returns the manifest (README, "Results").

    datasets: folder that holds the datasets (default: ../dataset_formation/datasets beside this file).
    tolerance: a task's target is tolerance x unmerged_acc (default 0.95; a task's own entry wins).
    strategy: "gemel", "all" or "stem". device: "auto", "cpu" or "cuda". time_budget: seconds after which no new round
    begins and the one in flight is undone. fresh: start anew although the folder holds a result, which is kept aside.
    initial_weights: of a tied layer, "mean" or "first". num_workers: loader processes per task (default: none on a CPU,
    with CUDA eight or the number of cores among all tasks).
    training: any field of trainer.TrainingOptions, such as learning_rate or max_epochs.
    Raises WorkloadError, before anything is written or trained, with every problem of the input.
    """
    began = time.monotonic()
    tasks, problems = read_workload(model_dict, tolerance)
    problems += _option_problems(strategy, device, time_budget, seed, initial_weights, training)
    roots = [Path(datasets) if datasets else dataset_manager.DEFAULT_ROOT, sample_workload.DATASETS_ROOT]
    problems += dataset_manager.check(tasks, roots)
    for name in foreign_files(results_path, tasks):
        allowed = "a folder in which nothing of yours would be overwritten"
        problems.append(Problem("options", "results", f"{results_path}, which holds {name} of something else", allowed))
    if problems:
        raise WorkloadError(problems)
    options = TrainingOptions(**training)
    target_device = pick_device(device)
    decisive = {"strategy": strategy, "seed": seed, "initial_weights": initial_weights, **asdict(options)}
    folders = {name: dataset_manager.find_dataset(task, roots) for name, task in tasks.items()}
    mark = fingerprint(tasks, folders, decisive)
    if num_workers is None and target_device.type == "cuda":
        num_workers = max(1, min(8, os.cpu_count() or 1) // len(tasks))
    previous = None if fresh else _previous_manifest(results_path, mark)
    data = {
        name: dataset_manager.open_task(
            task, roots, device=target_device, seed=seed, batch_size=options.batch_size(task), num_workers=num_workers
        )
        for name, task in tasks.items()
    }
    run = merger.start(
        tasks,
        data,
        results_path,
        strategy_name=strategy,
        training=options,
        initial_weights=initial_weights,
        seed=seed,
        device=target_device,
        deadline=began + time_budget if time_budget else math.inf,
        started=began,
        flags=_flags(tolerance, target_device, time_budget, datasets, options),
        fingerprint=mark,
    )
    print(tables.workload_table(tasks, run.models, run.groups), end="\n\n", flush=True)
    manifest = _run(run, previous, fresh)
    print("\n" + tables.closing_table(manifest), flush=True)
    if not manifest["run"]["finished"]:
        print("the time is over before everything was tried: the same command goes on from here", flush=True)
    return manifest


def plan(model_dict: dict, tolerance: float | None = None) -> int:
    """Prints what could be saved, and returns the bytes; reads no dataset and trains nothing."""
    tasks, problems = read_workload(model_dict, tolerance)
    if problems:
        raise WorkloadError(problems)
    models = {name: task.model for name, task in tasks.items()}
    groups = find_groups(models)
    print(tables.workload_table(tasks, models, groups), end="\n\n")
    print(tables.plan_table(groups, distinct_bytes(models)))
    return sum(group.saved_bytes for group in groups)


def _run(run: merger.Run, previous: dict | None, fresh: bool) -> dict:
    if previous is not None:
        merger.resume(run, previous)
        if run.finished:
            print(f"{run.results_path} holds the finished result of this workload (--fresh starts anew)")
            return previous
        print(f"{run.results_path} holds {len(run.rounds)} rounds of this workload: going on from there")
    else:
        merger.preflight(run)
        if fresh and has_results(run.results_path):
            print(f"the earlier result is kept in {_set_aside(Path(run.results_path))}")
    if not run.groups:
        print("nothing to merge: no two tasks have an identical layer; the models are stored as they are")
    return merger.merge(run)


def _previous_manifest(results_path: str | Path, mark: dict) -> dict | None:
    """The manifest to go on from; None if the folder holds none. Raises WorkloadError if it is of another workload."""
    if not has_results(results_path):
        return None
    manifest = read_manifest(results_path)
    changed = differences(manifest["run"]["fingerprint"], mark)
    allowed = "the same as before, or --fresh to start anew (the old result is kept aside), or another --results"
    if changed:
        raise WorkloadError([Problem(str(results_path), "results", line, allowed) for line in changed])
    return manifest


def _set_aside(results_path: Path) -> Path:
    for number in range(1, 10_000):
        aside = results_path.with_name(f"{results_path.name}-previous-{number}")
        if not aside.exists():
            return results_path.rename(aside)
    raise RuntimeError(f"{results_path}: there are too many earlier results beside it")


def _option_problems(strategy, device, time_budget, seed, initial_weights, training) -> list[Problem]:
    problems = []

    def check(ok: bool, key: str, got: object, allowed: str) -> None:
        if not ok:
            problems.append(Problem("options", key, repr(got), allowed))

    check(strategy in STRATEGIES, "strategy", strategy, ", ".join(STRATEGIES))
    check(initial_weights in INITIAL_WEIGHTS, "initial_weights", initial_weights, ", ".join(INITIAL_WEIGHTS))
    check(isinstance(seed, int) and seed >= 0, "seed", seed, "a whole number from 0 on")
    check(time_budget is None or time_budget > 0, "time_budget", time_budget, "seconds, more than 0")
    check(device in DEVICES, "device", device, ", ".join(DEVICES))
    if device == "cuda" and not torch.cuda.is_available():
        check(False, "device", device, "auto or cpu: torch sees no CUDA device")
    fields = TrainingOptions.__dataclass_fields__
    for key, value in training.items():
        if key not in fields:
            check(False, key, value, f"one of {', '.join(fields)}")
        elif isinstance(fields[key].default, int):
            check(isinstance(value, int) and value >= 2, key, value, "a whole number of at least 2")
        else:
            check(isinstance(value, (int, float)) and value > 0, key, value, "a number greater than 0")
    return problems


def _flags(tolerance, device: torch.device, time_budget, datasets, options: TrainingOptions) -> dict:
    return {
        "flags": {
            "tolerance": tolerance,
            "device": device.type,
            "time_budget": time_budget,
            "datasets": str(datasets) if datasets else None,
            **asdict(options),
        },
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# ---- the command line -----------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge vision models so that a workload fits one box.")
    parser.add_argument("--workload", metavar="FILE.py", help="a file with create_model_dict(); default: this script's")
    parser.add_argument("--datasets", metavar="DIR", help="default: ../dataset_formation/datasets beside the script")
    parser.add_argument("--results", metavar="DIR", default="results", help="results folder (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, help="target accuracy as a share of the unmerged (default: 0.95)")
    parser.add_argument("--strategy", choices=sorted(STRATEGIES), default="gemel", help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    parser.add_argument("--time-budget", type=parse_duration, metavar="TIME", help="such as 90s, 30m or 2h")
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier result is kept aside")
    parser.add_argument("--plan", action="store_true", help="print what could be saved; train nothing")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 30m, 1.5h or 45 (seconds)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a duration such as 90s, 30m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def load_model_dict(workload_file: str | None) -> dict:
    """The task dictionary of a workload file, or the one of this script. Raises WorkloadError if there is none."""
    if workload_file is None:
        return create_sample_model_dict()
    file = Path(workload_file)
    allowed = "a Python file that defines create_model_dict()"
    if not file.is_file():
        raise WorkloadError([Problem("workload", "--workload", f"{workload_file}, which is no file", allowed)])
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(file):
        got = f"{workload_file}, whose name is that of a module in use here"
        raise WorkloadError([Problem("workload", "--workload", got, "another file name")])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # loader processes import what the file defines by this name, from this folder
    sys.path.append(str(file.parent.resolve()))
    spec.loader.exec_module(module)
    if not callable(getattr(module, "create_model_dict", None)):
        raise WorkloadError([Problem("workload", "--workload", f"{workload_file} without it", allowed)])
    return module.create_model_dict()


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    try:
        model_dict = load_model_dict(flags.workload)
        if flags.plan:
            plan(model_dict, flags.tolerance)
        else:
            merge_workload(
                model_dict,
                flags.results,
                datasets=flags.datasets,
                tolerance=flags.tolerance,
                strategy=flags.strategy,
                device=flags.device,
                time_budget=flags.time_budget,
                fresh=flags.fresh,
                seed=flags.seed,
            )
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; what was kept is stored, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
