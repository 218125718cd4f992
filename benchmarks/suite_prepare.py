"""Prepares the workloads of the suite: what is missing of datasets and models is made, then each has a workload file.

Below DIR: datasets/, models/, workloads/<name>.py. Everything is made once, and again when its entry in
benchmarks/suite_workloads.py changes. A workload whose source of images or weights is not there is left out, which is
reported.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.suite_datasets import Sources, is_written, missing_source, write_dataset
from benchmarks.suite_models import is_trained, train
from benchmarks.suite_workloads import MOBILENET, Suite, Workload
from gemel.sample_workload.artifacts import remove_leftovers

FILE = '''"""{about} (tolerance {tolerance:g}): the workload {name} of the suite, written by benchmarks.suite."""

from pathlib import Path

from benchmarks.suite_models import entry

ROOT = Path(__file__).resolve().parent.parent


def create_model_dict():
    return {{
{entries}
    }}
'''


class Prepared(NamedTuple):
    """What can be run, and why the rest cannot."""

    files: dict[str, Path]  # workload -> its file
    left_out: dict[str, str]  # workload -> the reason


def datasets_root(root: Path) -> Path:
    """The folder that a run gets as --datasets."""
    return root / "datasets"


def lineage(suite: Suite, name: str) -> list[str]:
    """The model and its ancestors in the suite, the oldest first."""
    parent = suite.models[name].parent
    return [*(lineage(suite, parent) if parent and parent in suite.models else []), name]


def prepare(
    root: Path, suite: Suite, names: Iterable[str], sources: Sources, report: Callable[[str], None] = print
) -> Prepared:
    """Makes what is missing of the named workloads; calls `report` with a line for each model that was trained.

    May be interrupted: what is complete is not made again.
    """
    for folder in ("datasets", "models", "workloads"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    prepared = Prepared({}, {})
    for name in names:
        workload = suite.workloads[name]
        models = list(dict.fromkeys(m for model in workload.models for m in lineage(suite, model)))
        missing = [model for model in models if not is_trained(root, suite, model)]
        reasons = dict.fromkeys(filter(None, (_obstacle(root, suite, model, sources) for model in models)))
        if reasons:
            prepared.left_out[name] = "; ".join(reasons)
            continue
        for dataset in dict.fromkeys(suite.models[model].dataset for model in models):
            if not is_written(root, suite, dataset):
                write_dataset(root, suite, dataset, sources)
        for model in missing:
            record = train(root, suite, model, sources)
            report(f"{model}: accuracy {record['unmerged_acc']:.3f} after {record['cpu_seconds']:.1f} CPU s")
        prepared.files[name] = _write_file(root, name, workload)
    return prepared


def _obstacle(root: Path, suite: Suite, name: str, sources: Sources) -> str | None:
    """Why a model cannot be made, if it is not there; None: it can."""
    model = suite.models[name]
    if not is_written(root, suite, model.dataset) and (reason := missing_source(suite, model.dataset, sources)):
        return reason
    if model.parent == MOBILENET and not is_trained(root, suite, name):
        path = sources.get(MOBILENET)
        if path is None:
            return f"{MOBILENET} is not given"
        if not path.is_file():
            return f"{MOBILENET}: there is no {path}"
    return None


def _write_file(root: Path, name: str, workload: Workload) -> Path:
    path = root / "workloads" / f"{name}.py"
    entries = [f'        "{model}": entry(ROOT, "{model}", {workload.tolerance!r}),' for model in workload.models]
    about = workload.about[0].upper() + workload.about[1:]
    path.write_text(FILE.format(about=about, tolerance=workload.tolerance, name=name, entries="\n".join(entries)))
    return path
