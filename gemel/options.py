"""Every option of a merge, what is best for a strategy where nothing was given, and what is allowed."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from gemel.alignment.align import METHODS as ALIGNMENTS
from gemel.alignment.matching import BY_ORDER, BY_WEIGHTS, MATCHINGS
from gemel.console.tensorboard import is_installed
from gemel.environment import DEVICES, ranks
from gemel.environment.device import has_device
from gemel.forward import FLOAT32, STEP_PRECISIONS, STORE_TYPES
from gemel.sharing.initial_weights import INITIAL_WEIGHTS
from gemel.strategies import STEM, STRATEGIES
from gemel.training.options import TrainingOptions
from gemel.workload import Problem, WorkloadError

LEAST_SQUARES = "least_squares"
NO_ALIGNMENT = "none"
LEAST_FIT_MEMORY = 16 << 20
MAX_ADAPTER_BUDGET = 0.45  # from a half on, two tasks would save nothing by sharing
MAY_BE_NONE = ("warmup_steps", "statistics_batches", "screening_images")  # training options that 0 turns off

# What an option that is None becomes, by strategy. Adaptive: benchmarks/LOG.md, "2026-11-24 Initial weights",
# "2026-11-24 Lining up channels", "2026-11-26 Which layers pair", "2026-11-25 Low-rank", "2026-11-26 What each part".
DEFAULTS = {
    "initial_weights": "mean",
    "alignment": NO_ALIGNMENT,
    "matching": BY_ORDER,
    "adapter_budget": 0.0,
}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "adaptive": {
        "initial_weights": LEAST_SQUARES,
        "alignment": "weights",
        "matching": BY_WEIGHTS,
        "adapter_budget": 0.1875,
    }
}
TRAINING_OF: dict[str, dict[str, Any]] = {
    "adaptive": {"feature_weight": 1.0, "probability_weight": 1.0, "private_epochs": 0.5}
}


@dataclass(frozen=True)
class MergeOptions:
    """How a workload is merged. An option that is None becomes what is best for the strategy.

    strategy: a name of gemel.strategies.STRATEGIES.
    tolerance: a task's target is tolerance x unmerged_acc (default 0.95; a task's own entry wins).
    device: a name of gemel.environment.DEVICES; auto takes CUDA where there is one.
    time_budget: seconds after which no new round begins and the one in flight is put off.
    memory: bytes of the merged workload's parameters at which the search is over; without it everything is tried.
    pareto: a .json file that the points of memory against accuracy are written to.
    fresh: start anew although the folder holds a result, which is kept aside.
    retry: a task of the results that is merged again, with the dataset folder `data`; the others keep what they share.
    keep_unmerged: the unmerged models are stored as well, in the folder `unmerged` of the results.
    tensorboard: a folder for what is measured, for TensorBoard.
    quiet: only the closing tables are printed.
    per_class: every task is also judged class by class.
    initial_weights: of a tied layer: "least_squares", "mean", "similar" or "first".
    alignment: how channels of models trained apart are aligned first: by "weights", "activations" or "none".
    matching: which layer pairs with which: by "order", or the most alike by "weights" or "activations".
    adapter_budget: what a task's low-rank adapters beside shared layers may take together, as a share of these layers'
    bytes; 0: no adapters (only "adaptive" has them).
    num_threads: that torch computes with on a CPU (default: as many as there are idle cores when the merge begins, or
    as in the run that is resumed).
    num_workers: loader processes per task (default: none on a CPU; with CUDA eight, or the usable cores, in all).
    cache_bytes: of the memory in which decoded images stay, of all tasks together (0: none); with
    freeze_prefix, half of it is for what the frozen layers put out.
    store_dtype: the type in which the weights are stored, and in which every task is judged: "float32", "float16",
    "bfloat16" or "int8" (docs/results.md, "Half precision", "Eight bits").
    share_norm: once the search is over, normalisation is shared as well in the first layers of tasks that may see the
    same frames, as deep as they stay at their targets (docs/strategies.md, "Shared normalisation"); in one process.
    fit_memory: bytes that a fit of weights may take beside the models (default: 2 GiB on a CPU, with CUDA a quarter of
    the device's memory); it decides how many images are in flight at a time.
    training: how a round is trained.
    Raises WorkloadError with every problem.
    """

    strategy: str = "adaptive"
    tolerance: float | None = None
    device: str = "auto"
    time_budget: float | None = None
    memory: int | None = None
    pareto: str | Path | None = None
    fresh: bool = False
    keep_unmerged: bool = False
    retry: str | None = None
    data: str | Path | None = None
    per_class: bool = False
    tensorboard: str | Path | None = None
    quiet: bool = False
    seed: int = 0
    # None in, and then what is best for the strategy.
    initial_weights: str = None  # type: ignore[assignment]
    alignment: str = None  # type: ignore[assignment]
    matching: str = None  # type: ignore[assignment]
    adapter_budget: float = None  # type: ignore[assignment]
    num_threads: int | None = None
    num_workers: int | None = None
    cache_bytes: int = 1 << 30
    store_dtype: str = "float32"
    share_norm: bool = False
    fit_memory: int | None = None
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if problems := [*_problems(vars(self)), *_training_problems(dataclasses.asdict(self.training))]:
            raise WorkloadError(problems)
        for key, value in {**DEFAULTS, **DEFAULTS_OF.get(self.strategy, {})}.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)

    @property
    def deciding(self) -> dict:
        """The options that decide what comes out of a merge: a run resumes only one in which they are the same."""
        keys = ("strategy", "initial_weights", "alignment", "matching", "adapter_budget", "seed", "fit_memory")
        own = {key: getattr(self, key) for key in keys}
        if self.store_dtype != "float32":  # results of earlier versions do not name it
            own["store_dtype"] = self.store_dtype
        if self.share_norm:  # nor this
            own["share_norm"] = True
        training = dataclasses.asdict(self.training)
        if self.training.precision == FLOAT32:  # nor this
            del training["precision"]
        if not self.training.compile:  # nor this
            del training["compile"]
        return {**own, **training}

    def memory_per_task(self, num_tasks: int) -> int:
        """Bytes of memory per task for samples, and as many again for outputs of frozen prefixes, if there are any."""
        return self.cache_bytes // num_tasks // (2 if self.training.freeze_prefix else 1)


def read_options(given: Mapping[str, Any]) -> tuple[MergeOptions, list[Problem]]:
    """The options of merge_workload, training options among them, and every problem.

    An option with a problem is left at its default, so that the caller can look for problems of the workload, too.
    """
    own = {f.name for f in dataclasses.fields(MergeOptions)} - {"training"}
    strategy = given.get("strategy", "adaptive")
    training = {key: value for key, value in given.items() if key not in own}
    problems = [*_problems(given), *_training_problems(training)]
    wrong = {problem.key for problem in problems}
    usable = {key: value for key, value in given.items() if key not in wrong}
    best = TRAINING_OF.get(strategy, {}) if isinstance(strategy, str) else {}
    options = TrainingOptions(**{**best, **{key: value for key, value in usable.items() if key not in own}})
    return MergeOptions(**{key: value for key, value in usable.items() if key in own}, training=options), problems


def _problems(given: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with options that are given by name; those that are not given are at their defaults."""
    options = {**{f.name: f.default for f in dataclasses.fields(MergeOptions)}, **given}
    strategy = options["strategy"]
    allowed: dict[str, list[str | None]] = {
        "strategy": [*STRATEGIES],
        "initial_weights": [None, *INITIAL_WEIGHTS, LEAST_SQUARES],
        "alignment": [None, NO_ALIGNMENT, *ALIGNMENTS],
        "matching": [None, *([BY_ORDER] if strategy == STEM else MATCHINGS)],
        "device": [*DEVICES],
        "store_dtype": [*STORE_TYPES],
    }
    values = {key: options[key] for key in allowed}
    problems = [
        _problem(key, values[key], ", ".join(filter(None, choices)))
        for key, choices in allowed.items()
        if values[key] not in choices
    ]
    if values["device"] in DEVICES and not has_device(values["device"]):
        problems.append(_problem("device", values["device"], "auto or cpu: torch sees no CUDA device"))
    adapted = isinstance(strategy, str) and "adapter_budget" in DEFAULTS_OF.get(strategy, {})
    most = MAX_ADAPTER_BUDGET if adapted else 0.0
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "adapter_budget": (
            lambda v: v is None or (_is_number(v) and 0 <= v <= most),
            f"None or a number in [0, {most:g}] with strategy {strategy}",
        ),
        "seed": (lambda v: isinstance(v, int) and v >= 0, "a whole number from 0 on"),
        "time_budget": (lambda v: v is None or (_is_number(v) and v > 0), "seconds, more than 0"),
        "memory": (lambda v: v is None or (type(v) is int and v > 0), "None or bytes, a whole number from 1 on"),
        "pareto": (_can_be_written, "None or the name of a .json file in a folder that exists"),
        "cache_bytes": (lambda v: type(v) is int and v >= 0, "a whole number from 0 on"),
        "fit_memory": (
            lambda v: v is None or (type(v) is int and v >= LEAST_FIT_MEMORY),
            f"None or bytes, a whole number from {LEAST_FIT_MEMORY} (16 MiB) on",
        ),
        "num_threads": (lambda v: v is None or (type(v) is int and v >= 1), "None or a whole number from 1 on"),
        "num_workers": (lambda v: v is None or (isinstance(v, int) and v >= 0), "None or a whole number from 0 on"),
        "tolerance": (lambda v: v is None or (_is_number(v) and 0 < v <= 1), "a number in (0, 1]"),
        "fresh": (lambda v: isinstance(v, bool), "True or False"),
        "retry": (lambda v: v is None or isinstance(v, str), "None or the name of a task"),
        "data": (lambda v: v is None or isinstance(v, str | Path), "None or the path of a dataset folder"),
        "keep_unmerged": (lambda v: isinstance(v, bool), "True or False"),
        "per_class": (lambda v: isinstance(v, bool), "True or False"),
        "tensorboard": (
            lambda v: v is None or (isinstance(v, str | Path) and is_installed()),
            "None or a folder, with the package tensorboard installed (pip install tensorboard)",
        ),
        "quiet": (lambda v: isinstance(v, bool), "True or False"),
        "share_norm": (
            lambda v: isinstance(v, bool) and not (v and ranks.size() > 1),
            "True or False; False in several processes",
        ),
    }
    for key, (is_right, what) in checks.items():
        if not is_right(options[key]):
            problems.append(_problem(key, options[key], what))
    return problems


def _training_problems(given: Mapping[str, Any]) -> list[Problem]:
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingOptions)}
    problems = []
    for key, value in given.items():
        if key not in defaults:
            own = (f.name for f in dataclasses.fields(MergeOptions) if f.name != "training")
            problems.append(_problem(key, value, f"one of {', '.join([*defaults, *own])}"))
            continue
        is_right, what = _training_rule(key, defaults[key])
        if not is_right(value):
            problems.append(_problem(key, value, what))
    return problems


def _training_rule(key: str, default: object) -> tuple[Callable[[Any], bool], str]:
    """(check, what is allowed) of one training option."""
    if isinstance(default, bool):
        return lambda v: isinstance(v, bool), "True or False"
    if isinstance(default, str):
        return lambda v: v in STEP_PRECISIONS, ", ".join(STEP_PRECISIONS)
    if isinstance(default, int):
        least = 0 if key in MAY_BE_NONE else 2
        none = " (none)" * (least == 0)
        return lambda v: type(v) is int and v >= least, f"a whole number of at least {least}{none}"
    if key.endswith("average_decay"):
        return lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 (no average), below 1"
    if key.endswith("_weight") or key == "private_epochs":
        return lambda v: _is_number(v) and v >= 0, "a number of at least 0"
    return lambda v: _is_number(v) and v > 0, "a number greater than 0"


def _can_be_written(file: object) -> bool:
    if file is None:
        return True
    return isinstance(file, str | Path) and Path(file).suffix == ".json" and Path(file).absolute().parent.is_dir()


def _problem(key: str, got: object, allowed: str) -> Problem:
    return Problem("options", key, repr(got), allowed)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
