"""Merges the models of a workload so that identical layers share one set of weights: the script to run and edit.

    python merge_workloads.py                                   # the embedded default, minutes on two cores
    python merge_workloads.py --workload mine.py --datasets DIR # mine.py defines create_model_dict()
    python merge_workloads.py --workload mine.py --plan         # what could be saved; trains nothing
    python merge_workloads.py --workload mine.py --memory 2GiB  # stops as soon as the parameters fit

Put your own tasks into create_sample_model_dict(), or into a file of your own.
"""

import sys

from gemel.merging.flags import parse_arguments

if __name__ == "__main__":
    parse_arguments()  # before torch is imported, so that --help and a wrong flag answer at once

import contextlib
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

from gemel.datasets.folders import SampleError, find_datasets
from gemel.datasets.loaders import TaskData
from gemel.environment.clock import Clock
from gemel.environment.device import pick_device
from gemel.environment.imports import CHECKOUT, imported_from
from gemel.environment.interrupts import Interrupts
from gemel.environment.processes import raise_in_a_loader_process
from gemel.environment.threads import choose_num_threads, num_threads_set
from gemel.merging import console, earlier_merges
from gemel.merging.fingerprint import fingerprint
from gemel.merging.options import MergeOptions, read_options
from gemel.merging.plan import plan
from gemel.merging.resume import previous_manifest, set_aside
from gemel.results_store import files
from gemel.results_store.files import ResultsError, lock
from gemel.results_store.manifest import has_results, json_bytes
from gemel.results_store.points import points_of
from gemel.results_store.write import foreign_files
from gemel.sample_workload.prepare import prepare
from gemel.sample_workload.tasks import PLAN, SAMPLE_ROOT, Plan, dataset_roots, unmerged_acc, weights_path
from gemel.sample_workload.training import Methods
from gemel.workload import Problem, Task, WorkloadError, load_model_dict, read_workload
from model_architectures import build, load_weights

with imported_from(CHECKOUT):  # not a file of the same name beside the script that imports this one
    import dataset_manager
    from eval_methods import classification_eval, frcnn_eval
    from merger import Merger
    from transforms import classification_transforms, detection_transforms

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def create_sample_model_dict(root: Path = SAMPLE_ROOT, plan: Plan = PLAN) -> dict:
    """The tasks to merge: one entry per trained model. Replace these four by your own (README, "Your own models")."""
    prepare(sample_methods(), root, plan)  # draws these four's street scenes and trains their models, once
    model_dict = {}

    # Which vehicle is it? A classifier of crops from the camera at Main & 2nd.
    name = "main_2nd_vehicles_resnet10"
    model = build("slim_resnet", num_classes=3, layers=(1, 1, 1, 1), width=24)
    model_dict[name] = {
        "model": load_weights(model, weights_path(name, root)),
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": classification_transforms(size=40),
        "unmerged_acc": unmerged_acc(name, root),
    }

    # Who is on the street? A deeper classifier of crops from the camera at Elm & 1st, at nightfall.
    name = "elm_1st_street_resnet12"
    model = build("slim_resnet", num_classes=4, layers=(1, 1, 2, 1), width=24)
    model_dict[name] = {
        "model": load_weights(model, weights_path(name, root)),
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": classification_transforms(size=40),
        "unmerged_acc": unmerged_acc(name, root),
    }

    # Where is everybody? One detector per camera: four classes and the background.
    for name in ("main_2nd_traffic_fcos", "elm_1st_traffic_fcos"):
        kwargs = {"backbone": "slim_resnet", "layers": (1, 1, 1, 1), "width": 24, "head_convs": 1, "min_size": 128}
        model = build("fcos_model", 4 + 1, **kwargs)
        model_dict[name] = {
            "model": load_weights(model, weights_path(name, root)),
            "task": "object_detection",
            "eval_method": frcnn_eval,
            "transforms": detection_transforms(),
            "unmerged_acc": unmerged_acc(name, root),
        }
    return model_dict


def sample_methods() -> dict[str, Methods]:
    """How the models of the embedded default are measured when they are trained: as their entries above say."""
    return {
        "image_classification": Methods(classification_eval, classification_transforms(size=40)["val"]),
        "object_detection": Methods(frcnn_eval, detection_transforms()["val"]),
    }


def merge_workload(
    model_dict: dict, results_path: str | Path = "results", *, datasets: str | Path | None = None, **options: Any
) -> dict:
    """Merges a workload, in place, and writes the results folder; returns the manifest (docs/results.md).

    datasets: folder that holds the datasets (default: ../dataset_formation/datasets beside this file). options: any
    field of gemel.merging.options.MergeOptions, such as tolerance or time_budget, and any training option, that is,
    any field of gemel.training.options.TrainingOptions, such as learning_rate or max_epochs.
    Raises WorkloadError, before anything is written or trained, with every problem of the input.
    """
    raise_in_a_loader_process()
    chosen, problems = read_options(options)
    interrupts = Interrupts()
    clock = Clock(chosen.time_budget, interrupts)
    notes: dict[str, list[str]] = {}
    roots, results_path = _paths(model_dict, datasets, results_path)
    tasks = _checked_tasks(model_dict, chosen, roots, results_path, problems, notes)
    device = pick_device(chosen.device)
    data = _open_data(tasks, roots, device, chosen)
    mark = fingerprint(tasks, find_datasets(tasks, roots), chosen.deciding)
    with contextlib.ExitStack() as stack, interrupts.deferred():
        stack.enter_context(lock(results_path))
        previous = None if chosen.fresh else previous_manifest(results_path, mark)
        stack.enter_context(num_threads_set(_num_threads(chosen, previous)))
        models = {name: task.model for name, task in tasks.items()}
        earlier_merges.remember(models)
        stack.callback(earlier_merges.note_as_left, models)
        merger = Merger(tasks, data, chosen, device, results_path, clock, _started_with(chosen, device, datasets), mark)
        print(console.workload_table(tasks, merger.state.models, merger.record.groups), end="\n\n", flush=True)
        if said := console.dataset_notes(notes):
            print(said, end="\n\n", flush=True)
        if previous is not None:
            print("\n".join(merger.resume(previous)), flush=True)
        if previous is not None and merger.record.finished:
            manifest = merger.confirm() if chosen.per_class else previous
        else:
            merger.preflight()
            if chosen.fresh and has_results(results_path):
                print(f"the earlier result is kept in {set_aside(results_path)}")
                stack.enter_context(lock(results_path))
            if not merger.record.groups:
                print("nothing to merge: no two tasks have an identical layer; the models are stored as they are")
            manifest = merger.merge()
    if chosen.pareto is not None:
        files.write(Path(chosen.pareto), [json_bytes({"points": points_of(manifest)})])
    print("\n" + console.closing_report(manifest, chosen.per_class, chosen.memory), flush=True)
    return manifest


def _paths(model_dict: object, datasets: Any, results_path: Any) -> tuple[list[Path], Path]:
    """(where datasets are looked for, the results folder). Raises WorkloadError for what is no path."""
    wrong = [
        Problem("options", key, repr(value), "the path of a folder")
        for key, value in (("datasets", datasets or ""), ("results_path", results_path))
        if not isinstance(value, str | os.PathLike)
    ]
    if wrong:
        raise WorkloadError(wrong)
    found = Path(datasets).expanduser() if datasets else dataset_manager.DEFAULT_ROOT
    names = [name for name in model_dict if isinstance(name, str)] if isinstance(model_dict, Mapping) else []
    # "." as results would follow the folder that --fresh sets aside
    return dataset_roots(names, found), Path(os.path.abspath(os.path.expanduser(results_path)))


def _checked_tasks(
    model_dict: dict,
    options: MergeOptions,
    roots: list[Path],
    results_path: Path,
    problems: list[Problem],
    notes: dict[str, list[str]],
) -> dict[str, Task]:
    """The validated tasks. Raises WorkloadError with the problems given and all those of dictionary and datasets.

    notes: gets what is no problem of a dataset but should be known, by task.
    """
    if isinstance(model_dict, Mapping):
        earlier_merges.restore(entry.get("model") for entry in model_dict.values() if isinstance(entry, Mapping))
    tasks, found = read_workload(model_dict, options.tolerance)
    problems = found + problems + dataset_manager.check(tasks, roots, notes)
    for name in foreign_files(results_path, tasks):
        allowed = "a folder in which nothing of yours would be overwritten"
        problems.append(Problem("options", "results", f"{results_path}, which holds {name} of something else", allowed))
    if problems:
        if said := console.dataset_notes(notes):
            print(said, flush=True)
        raise WorkloadError(problems)
    return tasks


def _open_data(
    tasks: dict[str, Task], roots: list[Path], device: torch.device, options: MergeOptions
) -> dict[str, TaskData]:
    num_workers = options.num_workers
    if num_workers is None and device.type == "cuda":
        num_workers = max(1, min(8, os.cpu_count() or 1) // len(tasks))
    return {
        name: dataset_manager.open_task(
            task,
            roots,
            device=device,
            seed=options.seed,
            batch_size=options.training.batch_size(task),
            num_workers=num_workers,
            screening_images=options.training.screening_images,
            cache_bytes=options.memory_per_task(len(tasks)),
        )
        for name, task in tasks.items()
    }


def _num_threads(options: MergeOptions, previous: dict | None) -> int:
    """As asked for; else as in the run that is resumed, whose rounding depends on it; else by the idle cores."""
    recorded = previous["run"].get("flags", {}).get("num_threads") if previous else None
    return options.num_threads or recorded or choose_num_threads()


def _started_with(options: MergeOptions, device: torch.device, datasets: str | Path | None) -> dict:
    """What the manifest says of how this run was started."""
    flags = {"tolerance": options.tolerance, "device": device.type, "time_budget": options.time_budget}
    flags["memory"] = options.memory
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    flags |= {"datasets": str(datasets) if datasets else None, "num_threads": torch.get_num_threads()}
    return {
        "flags": {**flags, **vars(options.training)},
        "versions": {"python": sys.version.split()[0], **versions},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main(arguments: list[str] | None = None) -> int:
    """The script with these arguments (None: those of the shell); returns its exit code."""
    flags = parse_arguments(arguments)
    try:
        model_dict = load_model_dict(flags.workload) if flags.workload else create_sample_model_dict()
        if flags.plan:
            print(plan(model_dict, flags.tolerance)[0])
        else:
            chosen = {key: value for key, value in vars(flags).items() if key not in ("workload", "results", "plan")}
            manifest = merge_workload(model_dict, flags.results, **chosen)
            return EXIT_DONE if console.fits(manifest, flags.memory) else EXIT_FAILED
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_INPUT
    except (ResultsError, SampleError) as error:  # a disk that is full, a dataset that went away: no bug of ours
        print(f"{error}\nwhat was kept is stored, and the same command resumes there", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; what was kept is stored, and the same command resumes there", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
