"""Merges the models of a workload so that identical layers share one set of weights: the script to run and edit.

    python merge_workloads.py                                   # the embedded default, ten minutes on two cores
    python merge_workloads.py --workload mine.py --datasets DIR # mine.py defines create_model_dict()
    python merge_workloads.py --workload mine.py --plan         # what could be saved; trains nothing

Put your own tasks into create_sample_model_dict(), or into a file of your own.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import torchvision

import dataset_manager
import merger
from eval_methods import classification_eval, frcnn_eval
from gemel.datasets.folders import SampleError
from gemel.environment.device import pick_device
from gemel.environment.interrupts import Interrupts
from gemel.environment.seeds import seeded
from gemel.merging import console as tables
from gemel.merging.fingerprint import differences, fingerprint, task_changes
from gemel.merging.flags import parse_arguments
from gemel.merging.options import option_problems, with_defaults
from gemel.results_store.files import ResultsError, lock
from gemel.results_store.manifest import has_results, read_manifest
from gemel.results_store.write import foreign_files, repair
from gemel.sample_workload.prepare import prepare
from gemel.sample_workload.tasks import DATASETS_ROOT, PLAN, SAMPLE_ROOT, Plan, unmerged_acc, weights_path
from gemel.sample_workload.training import Methods
from gemel.sharing.groups import find_groups
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.training.options import TRAINING_OF, TrainingOptions
from gemel.workload import Problem, Task, WorkloadError, load_model_dict, read_workload
from model_architectures import build, load_weights
from transforms import classification_transforms, detection_transforms

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def sample_methods() -> dict[str, Methods]:
    """How the models of the embedded default are measured when they are trained: as their entries below say."""
    return {
        "image_classification": Methods(classification_eval, classification_transforms(size=48)["val"]),
        "object_detection": Methods(frcnn_eval, detection_transforms()["val"]),
    }


def create_sample_model_dict(root: Path = SAMPLE_ROOT, plan: Plan = PLAN) -> dict:
    """The tasks to merge: one entry per trained model. Replace these four by your own (README, "Your own tasks")."""
    # Draws the street scenes of these four and trains their models, once; yours are there already.
    prepare(sample_methods(), root, plan)
    model_dict = {}

    # Which vehicle is it? A classifier of crops from the camera at Main & 2nd.
    name = "main_2nd_vehicles_resnet10"
    model = build("slim_resnet", num_classes=3, layers=(1, 1, 1, 1), width=32)
    model_dict[name] = {
        "model": load_weights(model, weights_path(name, root)),
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": classification_transforms(size=48),
        "unmerged_acc": unmerged_acc(name, root),
    }

    # Who is on the street? A deeper classifier of crops from the camera at Elm & 1st, at nightfall.
    name = "elm_1st_street_resnet18"
    model = build("slim_resnet", num_classes=4, layers=(2, 2, 2, 2), width=32)
    model_dict[name] = {
        "model": load_weights(model, weights_path(name, root)),
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": classification_transforms(size=48),
        "unmerged_acc": unmerged_acc(name, root),
    }

    # Where is everybody? One detector per camera: four classes and the background.
    for name in ("main_2nd_traffic_fcos", "elm_1st_traffic_fcos"):
        model = build(
            "fcos_model", 4 + 1, backbone="slim_resnet", layers=(1, 1, 1, 1), width=32, out_channels=64, min_size=128
        )
        model_dict[name] = {
            "model": load_weights(model, weights_path(name, root)),
            "task": "object_detection",
            "eval_method": frcnn_eval,
            "transforms": detection_transforms(),
            "unmerged_acc": unmerged_acc(name, root),
        }
    return model_dict


def merge_workload(
    model_dict: dict,
    results_path: str | Path = "results",
    *,
    datasets: str | Path | None = None,
    tolerance: float | None = None,
    strategy: str = "adaptive",
    device: str = "auto",
    time_budget: float | None = None,
    fresh: bool = False,
    per_class: bool = False,
    seed: int = 0,
    initial_weights: str | None = None,
    alignment: str | None = None,
    matching: str | None = None,
    adapter_budget: float | None = None,
    num_workers: int | None = None,
    cache_bytes: int = 1 << 30,
    **training,
) -> dict:
    """Merges a workload, in place, and writes the results folder; returns the manifest (README, "Results").

    datasets: folder that holds the datasets (default: ../dataset_formation/datasets beside this file).
    tolerance: a task's target is tolerance x unmerged_acc (default 0.95; a task's own entry wins).
    strategy: "adaptive", "gemel", "all" or "stem". device: "auto", "cpu" or "cuda". time_budget: seconds after which no
    new round begins and the one in flight is put off. fresh: start anew although the folder holds a result, which is
    kept aside. per_class: every task is also judged class by class. initial_weights: of a tied layer, "least_squares",
    "mean", "similar" or "first" (default: what is best for the strategy, here and below). alignment: how channels are
    lined up first, by "weights", "activations" or "none". matching: which layer pairs with which, by "order", or the
    most alike by "weights" or "activations". adapter_budget: what a task may pay for a low-rank residual of its own
    beside a shared layer that alone does not serve it, as a share of the layer's bytes; 0: no residuals (only
    "adaptive" has them). num_workers: loader processes per task (default: none on a CPU, with CUDA eight or the number
    of cores among all tasks). cache_bytes: of the memory in which images stay as the models get them, those of val
    and those that weights are fitted on, of all tasks together (0: none); with freeze_prefix, half of it is
    for what the frozen layers put out.
    training: any field of trainer.TrainingOptions, such as learning_rate or max_epochs.
    Raises WorkloadError, before anything is written or trained, with every problem of the input.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    results_path = Path(os.path.abspath(results_path))  # "." would follow the folder that --fresh sets aside
    roots = [Path(datasets) if datasets else dataset_manager.DEFAULT_ROOT, DATASETS_ROOT]
    how = {
        "strategy": strategy,
        "initial_weights": initial_weights,
        "alignment": alignment,
        "matching": matching,
        "adapter_budget": adapter_budget,
    }
    problems = option_problems(how, device, time_budget, seed, num_workers, cache_bytes, training)
    tasks = _read_tasks(model_dict, tolerance, roots, results_path, problems)
    options = TrainingOptions(**{**TRAINING_OF.get(strategy, {}), **training})
    how = with_defaults(how)
    folders = {name: dataset_manager.find_dataset(task, roots) for name, task in tasks.items()}
    mark = fingerprint(tasks, folders, {**how, "seed": seed, **asdict(options)})
    target_device = pick_device(device)
    of_a_task = cache_bytes // len(tasks) // (2 if options.freeze_prefix else 1)  # the other half is the prefix's
    data = _open_data(tasks, roots, target_device, seed, options, num_workers, of_a_task)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(results_path))
        interrupts = Interrupts()
        stack.enter_context(interrupts.deferred())
        previous = None if fresh else _previous_manifest(results_path, mark)
        run = merger.start(
            tasks,
            data,
            results_path,
            strategy_name=strategy,
            training=options,
            initial_weights=how["initial_weights"],
            alignment=how["alignment"],
            matching=how["matching"],
            adapter_budget=how["adapter_budget"],
            prefix_bytes=of_a_task,
            per_class=per_class,
            seed=seed,
            device=target_device,
            deadline=began + time_budget if time_budget else math.inf,
            started=began,
            cpu_started=cpu_began,
            flags=_flags(tolerance, target_device, time_budget, datasets, options),
            fingerprint=mark,
            stop_asked=interrupts.asked,
        )
        print(tables.workload_table(tasks, run.models, run.groups), end="\n\n", flush=True)
        manifest = _run(run, previous, fresh, stack)
    print("\n" + tables.closing_table(manifest), flush=True)
    if per_class:
        print("\n" + tables.per_class_table(manifest), flush=True)
    if not manifest["run"]["finished"]:
        print("the time is over before everything was tried: the same command goes on from here", flush=True)
    return manifest


def _read_tasks(model_dict, tolerance, roots, results_path: Path, problems: list[Problem]) -> dict[str, Task]:
    """The validated tasks. Raises WorkloadError with the problems given and all those of dictionary and datasets."""
    tasks, found = read_workload(model_dict, tolerance)
    problems = found + problems + dataset_manager.check(tasks, roots)
    for name in foreign_files(results_path, tasks):
        allowed = "a folder in which nothing of yours would be overwritten"
        problems.append(Problem("options", "results", f"{results_path}, which holds {name} of something else", allowed))
    if problems:
        raise WorkloadError(problems)
    return tasks


def _open_data(tasks, roots, device: torch.device, seed: int, options: TrainingOptions, num_workers, cache_bytes):
    if num_workers is None and device.type == "cuda":
        num_workers = max(1, min(8, os.cpu_count() or 1) // len(tasks))
    return {
        name: dataset_manager.open_task(
            task,
            roots,
            device=device,
            seed=seed,
            batch_size=options.batch_size(task),
            num_workers=num_workers,
            screening_images=options.screening_images,
            cache_bytes=cache_bytes,
        )
        for name, task in tasks.items()
    }


def _run(run: merger.Run, previous: dict | None, fresh: bool, stack: contextlib.ExitStack) -> dict:
    """The manifest at the end of a run that goes on from `previous`, or begins; `stack` holds the locks."""
    if previous is not None:
        _go_on(run, previous)
        if run.finished:
            print(f"{run.results_path} holds the finished result of this workload (--fresh starts anew)")
            return merger.confirm(run) if run.per_class else previous
    if run.is_new and (problems := _training_problems(run)):
        raise WorkloadError(problems)
    merger.preflight(run)
    if fresh and has_results(run.results_path):
        print(f"the earlier result is kept in {_set_aside(run.results_path)}")
        stack.enter_context(lock(run.results_path))
    if not run.groups:
        print("nothing to merge: no two tasks have an identical layer; the models are stored as they are")
    return merger.merge(run)


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


def _go_on(run: merger.Run, previous: dict) -> None:
    """Puts the run where the earlier one in its folder ended, or on top of it where tasks came or went."""
    changes = task_changes(previous["run"]["fingerprint"], run.fingerprint)
    if not changes:
        merger.resume(run, previous)
        if not run.finished:
            print(f"{run.results_path} holds {len(run.rounds)} rounds of this workload: going on from there")
        return
    merger.extend(run, previous)
    for line in changes:
        print(line)
    print("the other tasks keep what they share")


def _training_problems(run: merger.Run) -> list[Problem]:
    """What makes the losses of a task impossible to compute on the first images of train; models stay as they are."""
    problems = []
    allowed = "a model that is trained as torchvision's are: logits, or a dict of losses from (images, targets)"
    for name, task in run.tasks.items():
        train = run.data[name].train
        snapshot = take_snapshot(task.model)
        teacher = None if task.labels else Teacher(task.model, run.unmerged[name], [])
        try:
            with torch.no_grad(), seeded(run.seed, "trial", name):
                batch = train.collate_fn([train.dataset[i] for i in range(min(train.batch_size, len(train.dataset)))])
                task.model.train()
                task_losses(task, batch, run.device, teacher)
        except Exception as error:  # a user's model may raise anything
            got = f"{type(error).__name__} in training: {' '.join(str(error).split())[:300]}"
            problems.append(Problem(name, "model", got, allowed))
        finally:
            restore_snapshot(snapshot)
            if teacher is not None:
                teacher.close()
    return problems


def _previous_manifest(results_path: str | Path, mark: dict) -> dict | None:
    """The manifest to go on from, its files repaired; None if the folder holds none.

    Raises WorkloadError if it is of another workload; tasks that were added or taken away make none.
    """
    if not has_results(results_path):
        return None
    allowed = "the same as before, or --fresh to start anew (the old result is kept aside), or another --results"
    try:
        stored = read_manifest(results_path)["run"]["fingerprint"]
    except ResultsError as error:
        raise WorkloadError([Problem(str(results_path), "results", str(error), allowed)]) from None
    changed = differences(stored, mark)
    if not set(stored["tasks"]) & set(mark["tasks"]):
        changed.append(f"tasks: were {', '.join(stored['tasks'])}, are {', '.join(mark['tasks'])}")
    if changed:
        raise WorkloadError([Problem(str(results_path), "results", line, allowed) for line in changed])
    for line in repair(results_path):
        print(line)
    return read_manifest(results_path)


def _set_aside(results_path: Path) -> Path:
    for number in range(1, 10_000):
        aside = results_path.with_name(f"{results_path.name}-previous-{number}")
        if not aside.exists():
            return results_path.rename(aside)
    raise RuntimeError(f"{results_path}: there are too many earlier results beside it")


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


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    try:
        model_dict = load_model_dict(flags.workload) if flags.workload else create_sample_model_dict()
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
                per_class=flags.per_class,
                seed=flags.seed,
            )
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_INPUT
    except (ResultsError, SampleError) as error:  # a disk that is full, a dataset that went away: no bug of ours
        print(f"{error}\nwhat was kept is stored, and the same command goes on from there", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; what was kept is stored, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
