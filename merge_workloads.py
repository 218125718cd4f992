"""Merges the models of a workload so that identical layers share one set of weights: the script to run and edit.

    python merge_workloads.py                                   # the embedded default, minutes on two cores
    python merge_workloads.py --workload mine.py --datasets DIR # mine.py defines create_model_dict()
    python merge_workloads.py --workload mine.py --plan         # what could be saved; trains nothing
    python merge_workloads.py --workload mine.py --check        # tries what a merge needs; trains nothing
    python merge_workloads.py --workload mine.py --memory 2GiB  # stops as soon as the parameters fit

Put your own tasks into create_sample_model_dict(), or into a file of your own.
"""

import sys

from gemel.console.flags import parse_arguments

if __name__ == "__main__":
    parse_arguments()  # before torch is imported, so that --help and a wrong flag answer at once

import argparse
import contextlib
import logging
import os
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

from gemel.console import tables
from gemel.console.progress import Progress
from gemel.console.run_log import RunLog
from gemel.console.tensorboard import TensorBoardLog
from gemel.datasets.folders import SampleError, find_datasets
from gemel.datasets.loaders import TaskData
from gemel.environment import ranks
from gemel.environment.alive import leave_it_to_the_first, say_once, watched
from gemel.environment.clock import Clock
from gemel.environment.cores import loader_processes
from gemel.environment.device import pick_device
from gemel.environment.events import Listener, emit, listening, warnings_as_events
from gemel.environment.imports import CHECKOUT, imported_from
from gemel.environment.interrupts import Interrupts
from gemel.environment.memory import keep_some_unused
from gemel.environment.processes import raise_in_a_loader_process
from gemel.environment.threads import choose_num_threads, num_threads_set
from gemel.merging import earlier_merges
from gemel.merging.fingerprint import fingerprint
from gemel.merging.memory_need import memory_text
from gemel.merging.plan import tables_and_plan
from gemel.merging.rehearsal import rehearsal_text, rehearse
from gemel.merging.resume import previous_manifest, set_aside
from gemel.merging.retry import measured_anew, retry_text, with_new_data
from gemel.merging.unmerged_store import unmerged_problems, write_unmerged
from gemel.options import MergeOptions, read_options
from gemel.report.check_page import check_page
from gemel.report.plan_page import writable_problems, write_plan
from gemel.results_store import files
from gemel.results_store.files import ResultsError, lock
from gemel.results_store.manifest import has_results, json_bytes
from gemel.results_store.points import points_of
from gemel.results_store.write import foreign_files
from gemel.sample_workload.prepare import prepare
from gemel.sample_workload.tasks import PLAN, SAMPLE_ROOT, Plan, dataset_roots, unmerged_acc, weights_path
from gemel.sample_workload.training import Methods
from gemel.trials.judged_as_stored import type_problems
from gemel.workload import Problem, Task, WorkloadError, load_model_dict, read_workload
from model_architectures import build, load_weights

with imported_from(CHECKOUT):  # not a file of the same name beside the script that imports this one
    import dataset_manager
    from eval_methods import classification_eval, frcnn_eval
    from merger import Merger
    from transforms import classification_transforms, detection_transforms

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


NOT_OPTIONS = (
    "workload",
    "results",
    "plan",
    "check",
    "html",
    "json",
    "debug",
)  # flags that merge_workload does not take


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
    field of gemel.options.MergeOptions, such as tolerance or time_budget, and any training option, that is,
    any field of gemel.training.options.TrainingOptions, such as learning_rate or max_epochs.
    Raises WorkloadError, before anything is written or trained, with every problem of the input. In several processes
    with a process group of torch.distributed, all of which call it alike, they work on one merge (docs/multi_gpu.md).
    """
    raise_in_a_loader_process()
    chosen, problems = read_options(options)
    interrupts = Interrupts()
    clock = Clock(chosen.time_budget, interrupts)
    roots, results_path = _paths(model_dict, datasets, results_path)
    progress = Progress(clock, chosen.quiet)
    listeners: list[Listener] = [progress, RunLog(results_path, clock)] if ranks.is_first() else []
    if listeners and chosen.tensorboard is not None:
        listeners.append(TensorBoardLog(chosen.tensorboard))
    with _first_prints(), progress, listening(*listeners), warnings_as_events():
        manifest = _merge(model_dict, results_path, roots, datasets, chosen, problems, clock, progress.say)
    if not ranks.is_first():
        return manifest
    if chosen.pareto is not None:
        files.write(Path(chosen.pareto), [json_bytes({"points": points_of(manifest)})])
    _write_report(results_path)
    print("\n" + tables.closing_report(manifest, chosen.per_class, chosen.memory))
    print(tables.memory_use(manifest["run"].get("memory_use", [])), flush=True)
    return manifest


def _merge(
    model_dict: dict,
    results_path: Path,
    roots: list[Path],
    datasets: str | Path | None,
    chosen: MergeOptions,
    problems: list[Problem],
    clock: Clock,
    say: Callable[[str], None],
) -> dict:
    """`merge_workload` with its options read; say: prints lines. Returns the manifest."""
    emit("doing", what="checking the dictionary and the datasets")
    notes: dict[str, list[str]] = {}
    tasks = _checked_tasks(model_dict, chosen, roots, results_path, problems, notes)
    device = pick_device(chosen.device)
    data = _open_data(tasks, roots, device, chosen)
    if chosen.retry is not None:
        tasks = measured_anew(tasks, data, chosen, results_path)
        say(retry_text(tasks[chosen.retry]) + "\n")
    mark = fingerprint(tasks, find_datasets(tasks, roots), chosen.deciding)
    with contextlib.ExitStack() as stack, clock.interrupts.deferred():
        ranks.of_first(lambda: _locked(stack, results_path))
        previous = None if chosen.fresh else ranks.of_first(lambda: previous_manifest(results_path, mark, chosen.retry))
        stack.enter_context(num_threads_set(_num_threads(chosen, previous)))
        models = {name: task.model for name, task in tasks.items()}
        earlier_merges.remember(models)
        stack.callback(earlier_merges.note_as_left, models)
        merger = Merger(tasks, data, chosen, device, results_path, clock, _started_with(chosen, device, datasets), mark)
        stack.callback(merger.state.hand_back)  # also where it is interrupted before it merges
        say(tables.workload_table(tasks, merger.state.models, merger.record.groups, chosen.store_dtype) + "\n")
        if said := tables.dataset_notes(notes):
            say(said + "\n")
        if previous is not None:
            say("\n".join(merger.resume(previous)))
        if previous is not None and merger.record.finished:
            manifest = merger.confirm() if chosen.per_class else previous
        else:
            merger.preflight()
            say(memory_text(merger.record.memory_needs) + "\n")
            if chosen.fresh:
                ranks.of_first(lambda: _set_aside(stack, results_path, say))
            if not merger.record.groups:
                say("nothing to merge: no two tasks have an identical layer; the models are stored as they are")
            manifest = merger.merge()
        if chosen.keep_unmerged:
            write_unmerged(results_path, manifest, merger.state, merger.evaluator)
    return manifest


def _locked(stack: contextlib.ExitStack, results_path: Path) -> None:
    stack.enter_context(lock(results_path))


def _set_aside(stack: contextlib.ExitStack, results_path: Path, say: Callable[[str], None]) -> None:
    """Keeps an earlier result aside, and locks the new folder."""
    if has_results(results_path):
        say(f"the earlier result is kept in {set_aside(results_path)}")
        _locked(stack, results_path)


@contextlib.contextmanager
def _first_prints() -> Iterator[None]:
    """Within, only the first rank prints."""
    if ranks.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


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


def _write_report(results_path: Path) -> None:
    """results/report.html. A report that cannot be made is a warning: the result is complete without it."""
    try:
        from gemel.report.page import write_report  # with matplotlib, half a second that the first saving need not wait

        write_report(results_path)
    except Exception as error:
        log.warning("no report: %s: %s (python -m gemel report makes it later)", type(error).__name__, error)


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
    tasks, more = with_new_data(tasks, options, results_path)
    problems = found + problems + more + type_problems(tasks, options.store_dtype)
    problems += (
        Problem(*p) for p in ranks.of_first(lambda: [[*p] for p in dataset_manager.check(tasks, roots, notes)])
    )
    for name in foreign_files(results_path, tasks):
        allowed = "a folder in which nothing of yours would be overwritten"
        problems.append(Problem("options", "results", f"{results_path}, which holds {name} of something else", allowed))
    problems += unmerged_problems(results_path, tasks) if options.keep_unmerged else []
    if problems:
        if said := tables.dataset_notes(notes):
            print(said, flush=True)
        raise WorkloadError(problems)
    return tasks


def _open_data(
    tasks: dict[str, Task], roots: list[Path], device: torch.device, options: MergeOptions
) -> dict[str, TaskData]:
    num_workers = options.num_workers
    if num_workers is None and device.type == "cuda":
        num_workers = loader_processes(len(tasks))
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
    recorded = previous["run"].get("flags", {}).get("num_threads") if previous and ranks.size() == 1 else None
    return options.num_threads or recorded or choose_num_threads()


def _started_with(options: MergeOptions, device: torch.device, datasets: str | Path | None) -> dict:
    """What the manifest says of how this run was started."""
    flags = {"tolerance": options.tolerance, "device": device.type, "time_budget": options.time_budget}
    flags |= {"memory": options.memory, "store_dtype": options.store_dtype}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    flags |= {"datasets": str(datasets) if datasets else None, "num_threads": torch.get_num_threads()}
    return {
        "flags": {**flags, **vars(options.training)},
        "versions": {"python": sys.version.split()[0], **versions},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def check_workload(
    model_dict: dict,
    results_path: str | Path = "results",
    html: str | Path | None = None,
    datasets: str | Path | None = None,
    **options: Any,
) -> int:
    """Tries on a sample what merge_workload does, prints what was found, and returns the number of problems.

    html: a file for the same as a page, with images of train as the models get them. Nothing else is written. Raises
    WorkloadError as merge_workload does.
    """
    chosen, problems = read_options(options)
    problems += writable_problems(None, None if html is None else str(html))
    roots, results = _paths(model_dict, datasets, results_path)
    notes: dict[str, list[str]] = {}
    progress = Progress(Clock(), chosen.quiet)
    with progress, listening(progress), warnings_as_events():
        emit("doing", what="checking the dictionary and the datasets")
        tasks = _checked_tasks(model_dict, chosen, roots, results, problems, notes)
        device = pick_device(chosen.device)
        data = _open_data(tasks, roots, device, chosen)
        found = rehearse(tasks, data, chosen, device, results)
    if said := tables.dataset_notes(notes):
        print(said, end="\n\n")
    print(rehearsal_text(found))
    if html is not None:
        page = check_page(found, {name: data[name].class_names for name in tasks})
        files.write(Path(html), [page.encode()])
    return found.num_problems


def main(arguments: list[str] | None = None) -> int:
    """The script with these arguments (None: those of the shell); returns its exit code."""
    flags = parse_arguments(arguments)
    keep_some_unused()
    with ranks.joined(), watched():
        try:
            code = _run(flags)
            ranks.wait_for_all()
            return code
        except WorkloadError as error:
            leave_it_to_the_first()
            return _say(error, str(error), EXIT_WRONG_INPUT, flags.debug)
        except (ResultsError, SampleError) as error:  # a disk that is full, a dataset that went away: no bug of ours
            return _say(error, f"{error}\n{_how_to_go_on(flags)}", EXIT_FAILED, flags.debug)
        except ranks.FirstRankFailed:
            leave_it_to_the_first()
            return EXIT_FAILED
        except KeyboardInterrupt as error:
            leave_it_to_the_first()
            return _say(error, f"\ninterrupted; {_how_to_go_on(flags)}", EXIT_INTERRUPTED, flags.debug)


def _how_to_go_on(flags: argparse.Namespace) -> str:
    if has_results(Path(flags.results).expanduser()):
        return "what was kept is stored, and the same command resumes there"
    return "nothing was stored yet, and the same command starts again"


def _say(error: BaseException, text: str, code: int, debug: bool) -> int:
    """Prints what went wrong, after where in the code if that is asked for; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    say_once(text)
    return code


def _run(flags: argparse.Namespace) -> int:
    """Does what the flags ask for."""
    if problems := writable_problems(flags.json, flags.html):
        raise WorkloadError(problems)
    model_dict = _loaded(flags.workload)
    if flags.plan or flags.check:
        return _look(flags, model_dict) if ranks.is_first() else EXIT_DONE
    chosen = {key: value for key, value in vars(flags).items() if key not in NOT_OPTIONS}
    with earlier_merges.not_remembered():
        manifest = merge_workload(model_dict, flags.results, **chosen)
    return EXIT_DONE if tables.fits(manifest, flags.memory) else EXIT_FAILED


def _look(flags: argparse.Namespace, model_dict: dict) -> int:
    """--plan and --check; alone, without the other ranks."""
    if flags.plan:
        text, planned = tables_and_plan(model_dict, flags.tolerance, flags.memory)
        print(text)
        write_plan(planned, flags.memory, flags.json, flags.html)
        return EXIT_DONE
    chosen = {key: value for key, value in vars(flags).items() if key not in NOT_OPTIONS}
    return EXIT_WRONG_INPUT if check_workload(model_dict, flags.results, flags.html, **chosen) else EXIT_DONE


def _loaded(workload: str | None) -> dict:
    """The dictionary of a workload file, or of the script; on the first rank first, as it may draw and train."""

    def load() -> None:
        loaded.append(load_model_dict(workload) if workload else create_sample_model_dict())

    loaded: list[dict] = []
    ranks.of_first(load)
    if not ranks.is_first():
        load()
    return loaded[0]


if __name__ == "__main__":
    sys.exit(main())
