"""Which groups will hurt whom: scores of every group and task, without training and without labels.

Each compares a tied layer with the one that the task had: the larger, the more tying this group hurts this task.
benchmarks/sensitivity.py measures how well they rank groups by the harm that is then seen.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gemel.fitting.batch_norm import averaged_statistics
from gemel.fitting.least_squares import RIDGE, quotas
from gemel.fitting.ridge import solve_ridge
from gemel.fitting.rows import Rows, collect_rows, is_linear_map, is_normalised, matrix_of
from gemel.forward.batches import Batch, run, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import device_of, logits_of
from gemel.sharing.groups import Configuration, Group
from gemel.sharing.signatures import find_layers

Sensitivity = dict[tuple[Group, str], float]

LAST_LAYERS = 0.1  # share of a detector's layers that stand for its output in "response"


@torch.no_grad()
def predict_sensitivity(
    models: nn.ModuleDict,
    teachers: Mapping[str, nn.Module],
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    method: str = "response",
    generator: torch.Generator,
    positions: int = 1024,
) -> Sensitivity:
    """(group, task) -> harm, by one of METHODS; scores of one method compare with each other only.

    models: tied as they would be, with the weights that would be shared (after tie, or after a fit). Groups are judged
    one by one: all other layers are the teachers'. images: batches per task. Nothing is changed. A layer that a method
    cannot judge (no linear map, or never called) is judged by its weight distance. Raises ValueError for a method
    that does not exist.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed: {', '.join(METHODS)}")
    harm = weight_distance(models, teachers, groups, images, generator, positions)
    return harm | METHODS[method](models, teachers, groups, images, generator, positions)


def weight_distance(models, teachers, groups, images=None, generator=None, positions=0) -> Sensitivity:
    """||W - W_t||^2 / ||W_t||^2 over all parameters of the layer; needs no data."""
    harm = {}
    for group in groups:
        for o in group.occurrences:
            own = dict(teachers[o.task].get_submodule(o.layer).named_parameters(recurse=False))
            shared = dict(models[o.task].get_submodule(o.layer).named_parameters(recurse=False))
            moved = sum((shared[key] - own[key]).square().sum() for key in own)
            harm[group, o.task] = float(moved / sum(p.square().sum() for p in own.values()).clamp_min(1e-12))
    return harm


def output_error(models, teachers, groups, images, generator, positions) -> Sensitivity:
    """||X_t W - X_t W_t||^2 / ||X_t W_t||^2 on the task's own inputs of the layer, means aside where it normalises."""
    harm = {}
    for task, rows in _rows_of_tasks(teachers, groups, images, generator, positions).items():
        for name, (group, sampled) in rows.items():
            shared = matrix_of(models[task].get_submodule(name))
            harm[group, task] = _relative(sampled.y - sampled.x @ shared, sampled.y)
    return harm


def fitted_error(models, teachers, groups, images, generator, positions) -> Sensitivity:
    """The output error that is left with the least-squares weights of the group (sharing/least_squares.py).

    Fitted on one half of the rows and judged on the other: wide layers can fit the rows they see without any error.
    """
    gathered: dict[Group, dict[str, Rows]] = {}
    for task, rows in _rows_of_tasks(teachers, groups, images, generator, positions).items():
        for group, sampled in rows.values():
            gathered.setdefault(group, {})[task] = sampled
    harm = {}
    for group, rows in gathered.items():
        first = group.occurrences[0]
        start = matrix_of(models[first.task].get_submodule(first.layer))
        scales = {task: r.y.square().sum().clamp_min(1e-12).rsqrt() for task, r in rows.items()}
        x = torch.cat([scales[task] * r.x[:, ::2] for task, r in rows.items()], 1)
        residual = torch.cat([scales[task] * (r.y - r.x @ start)[:, ::2] for task, r in rows.items()], 1)
        fitted = start + solve_ridge(x, residual, RIDGE)[0]
        harm |= {(group, task): _relative((r.y - r.x @ fitted)[:, 1::2], r.y[:, 1::2]) for task, r in rows.items()}
    return harm


def response(models, teachers, groups, images, generator, positions) -> Sensitivity:
    """How much the task's output changes, relative to how much it varies, with this group alone tied and statistics
    re-estimated; costs a forward pass per group and task. Of a detector, the outputs of its last layers.
    """
    harm = {}
    for task in dict.fromkeys(task for group in groups for task in group.tasks):
        model = copy.deepcopy(teachers[task])
        names = _output_layers(model, images[task][0])
        expected = _responses(model, images[task], names)
        for group in groups:
            for layer in (o.layer for o in group.occurrences if o.task == task):
                with _parameters_of(models[task], model, layer):
                    got = _responses(model, images[task], names)
                errors = [_relative(a - b, b - b.mean()) for a, b in zip(got, expected, strict=True)]
                harm[group, task] = sum(errors) / len(errors)
    return harm


METHODS: dict[str, Callable[..., Sensitivity]] = {
    "weight_distance": weight_distance,
    "output_error": output_error,
    "fitted_error": fitted_error,
    "response": response,
}


def _rows_of_tasks(teachers, groups, images, generator, positions) -> dict[str, dict[str, tuple[Group, Rows]]]:
    """Task -> layer -> (its group, rows of the teacher), for layers that are linear maps and called; one pass."""
    found = {}
    for task in dict.fromkeys(task for group in groups for task in group.tasks):
        group_of = {o.layer: group for group in groups for o in group.occurrences if o.task == task}
        group_of = {n: group for n, group in group_of.items() if is_linear_map(teachers[task].get_submodule(n))}
        wanted = quotas(teachers, list(group_of.values()), task, positions)
        rows = collect_rows(teachers[task], wanted, images[task], generator)
        found[task] = {
            name: (group_of[name], sampled.centred() if is_normalised(teachers[task], name) else sampled)
            for name, sampled in rows.items()
        }
    return found


def _relative(error: Tensor, reference: Tensor) -> float:
    return float(error.square().sum() / reference.square().sum().clamp_min(1e-12))


@contextlib.contextmanager
def _parameters_of(source: nn.Module, model: nn.Module, name: str) -> Iterator[None]:
    """One layer of the model has the values that it has in the source."""
    own = dict(model.get_submodule(name).named_parameters(recurse=False))
    values = {key: parameter.clone() for key, parameter in own.items()}
    for key, parameter in source.get_submodule(name).named_parameters(recurse=False):
        own[key].copy_(parameter)
    yield
    for key, parameter in own.items():
        parameter.copy_(values[key])


def _responses(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> list[Tensor]:
    """All that the named layers put out, while batch normalisation takes the statistics of the batch."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs[name].append(output.flatten().clone())

    with hooked(model, names, record), averaged_statistics(model):
        for batch in batches:
            model(to_device(batch, device_of(model)))
    return [torch.cat(outputs[name]) for name in names]


def _output_layers(model: nn.Module, batch: Batch) -> list[str]:
    """The layer that stands for a classifier's output, the last that is called; of a detector the last tenth of those
    that see whole images, not regions."""
    called: dict[str, None] = {}

    def record(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if len(output) == len(batch):
            called.pop(name, None)
            called[name] = None

    names = [layer.name for layer in find_layers(model) if is_linear_map(model.get_submodule(layer.name))]
    with hooked(model, names, record):
        output = run(model, batch)
    is_classifier = torch.is_tensor(logits_of(output))
    return list(called)[-1 if is_classifier else -max(1, round(LAST_LAYERS * len(called))) :]
