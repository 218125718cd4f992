"""Predicted sensitivity of every task to every group, without training and without labels.

Each method compares a tied layer with the task's own: the larger the score, the more tying the group is predicted to
lower the task's accuracy. benchmarks/sensitivity.py measures how well the scores rank groups by the loss that is then
measured (benchmarks/LOG.md, 2026-11-24 Holding back a little).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gemel.fitting.batch_norm import averaged_statistics
from gemel.fitting.least_squares import RIDGE, parts_of, quotas
from gemel.fitting.ridge import solve_ridge
from gemel.fitting.rows import Rows, collect_rows, is_linear_map, is_normalised, linear_map_at, matrix_of
from gemel.forward.batches import Batch, run, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import Models, deep_copy, device_of, logits_of
from gemel.sharing.groups import Configuration, Group
from gemel.sharing.signatures import find_layers

Sensitivity = dict[tuple[Group, str], float]
Images = Mapping[str, Sequence[Batch]]  # task -> its batches

LAST_LAYERS = 0.1  # share of a detector's layers whose outputs are compared in "response"; set by hand


@torch.no_grad()
def predict_sensitivity(
    models: Models,
    teachers: Models,
    groups: Configuration,
    images: Images,
    *,
    method: str = "response",
    generator: torch.Generator,
    positions: int = 1024,
) -> Sensitivity:
    """(group, task) -> score, by one of METHODS; only scores of the same method can be compared with each other.

    models: tied, with the weights that would be shared (after `tie`, or after a fit); they are not changed. A group is
    scored by itself: all other layers are the teachers'. images: batches per task. A layer that a method cannot score
    (not a linear map, or never called) gets its weight distance. Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed: {', '.join(METHODS)}")
    scores = weight_distance(models, teachers, groups, images, generator, positions)
    return scores | METHODS[method](models, teachers, groups, images, generator, positions)


def weight_distance(
    models: Models,
    teachers: Models,
    groups: Configuration,
    images: Images | None = None,
    generator: torch.Generator | None = None,
    positions: int = 0,
) -> Sensitivity:
    """||W - W_t||^2 / ||W_t||^2 over all parameters of the layer; needs no data."""
    scores: Sensitivity = {}
    for group in groups:
        for o in group.occurrences:
            own = dict(teachers[o.task].get_submodule(o.layer).named_parameters(recurse=False))
            shared = dict(models[o.task].get_submodule(o.layer).named_parameters(recurse=False))
            moved = sum((shared[key] - own[key]).square().sum() for key in own)
            energy = functools.reduce(torch.add, (p.square().sum() for p in own.values()))
            scores[group, o.task] = float(moved / energy.clamp_min(1e-12))
    return scores


def output_error(
    models: Models,
    teachers: Models,
    groups: Configuration,
    images: Images,
    generator: torch.Generator,
    positions: int,
) -> Sensitivity:
    """||X_t W - X_t W_t||^2 / ||X_t W_t||^2 on the task's own inputs of the layer; centred where it is normalised."""
    scores: Sensitivity = {}
    for part in _parts(teachers, groups, positions):
        for task, rows in _rows_of_tasks(teachers, part, images, generator, positions).items():
            for name, (group, sampled) in rows.items():
                shared = matrix_of(linear_map_at(models[task], name))
                scores[group, task] = _relative(sampled.y - sampled.x @ shared, sampled.y)
    return scores


def fitted_error(
    models: Models,
    teachers: Models,
    groups: Configuration,
    images: Images,
    generator: torch.Generator,
    positions: int,
) -> Sensitivity:
    """The output error with the least-squares weights of the group (least_squares.py).

    Fitted on one half of the rows and measured on the other, since wide layers can fit the rows without any error
    (benchmarks/LOG.md, 2026-11-25 Detectors).
    """
    scores: Sensitivity = {}
    for part in _parts(teachers, groups, positions):
        scores |= _fitted_errors(models, _rows_of_tasks(teachers, part, images, generator, positions))
    return scores


def _fitted_errors(models: Models, found: dict[str, dict[str, tuple[Group, Rows]]]) -> Sensitivity:
    gathered: dict[Group, dict[str, Rows]] = {}
    for task, layers in found.items():
        for group, sampled in layers.values():
            gathered.setdefault(group, {})[task] = sampled
    scores: Sensitivity = {}
    for group, rows in gathered.items():
        first = group.occurrences[0]
        start = matrix_of(linear_map_at(models[first.task], first.layer))
        scales = {task: r.y.square().sum().clamp_min(1e-12).rsqrt() for task, r in rows.items()}
        x = torch.cat([scales[task] * r.x[:, ::2] for task, r in rows.items()], 1)
        residual = torch.cat([scales[task] * (r.y - r.x @ start)[:, ::2] for task, r in rows.items()], 1)
        fitted = start + solve_ridge(x, residual, RIDGE)[0]
        scores |= {(group, task): _relative((r.y - r.x @ fitted)[:, 1::2], r.y[:, 1::2]) for task, r in rows.items()}
    return scores


def response(
    models: Models,
    teachers: Models,
    groups: Configuration,
    images: Images,
    generator: torch.Generator,
    positions: int,
) -> Sensitivity:
    """The change of the task's output, relative to its variance, with this group alone tied.

    Statistics are re-estimated. Costs a forward pass per group and task. For a detector: its last layers.
    """
    scores: Sensitivity = {}
    for task in dict.fromkeys(task for group in groups for task in group.tasks):
        model = deep_copy(teachers[task])
        names = _output_layers(model, images[task][0])
        expected = _responses(model, images[task], names)
        for group in groups:
            for layer in (o.layer for o in group.occurrences if o.task == task):
                with _parameters_of(models[task], model, layer):
                    got = _responses(model, images[task], names)
                errors = [_relative(a - b, b - b.mean()) for a, b in zip(got, expected, strict=True)]
                scores[group, task] = sum(errors) / len(errors)
    return scores


METHODS: dict[str, Callable[..., Sensitivity]] = {
    "weight_distance": weight_distance,
    "output_error": output_error,
    "fitted_error": fitted_error,
    "response": response,
}


def _parts(teachers: Models, groups: Configuration, positions: int) -> list[list[Group]]:
    """The groups of linear maps in parts whose rows can be held at a time."""
    firsts = ((group, group.occurrences[0]) for group in groups)
    return parts_of(
        teachers, [g for g, o in firsts if is_linear_map(teachers[o.task].get_submodule(o.layer))], positions
    )


def _rows_of_tasks(
    teachers: Models, groups: Sequence[Group], images: Images, generator: torch.Generator, positions: int
) -> dict[str, dict[str, tuple[Group, Rows]]]:
    """Task -> layer -> (its group, rows of the teacher), for layers that are called, all linear maps; one pass."""
    found: dict[str, dict[str, tuple[Group, Rows]]] = {}
    for task in dict.fromkeys(task for group in groups for task in group.tasks):
        group_of = {o.layer: group for group in groups for o in group.occurrences if o.task == task}
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
    """Within, one layer of the model has the values that it has in the source."""
    own = dict(model.get_submodule(name).named_parameters(recurse=False))
    values = {key: parameter.clone() for key, parameter in own.items()}
    for key, parameter in source.get_submodule(name).named_parameters(recurse=False):
        own[key].copy_(parameter)
    yield
    for key, parameter in own.items():
        parameter.copy_(values[key])


def _responses(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> list[Tensor]:
    """All outputs of the named layers, while batch normalisation uses the statistics of each batch."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs[name].append(output.flatten().clone())

    with hooked(model, names, record), averaged_statistics(model):
        for batch in batches:
            model(to_device(batch, device_of(model)))
    return [torch.cat(outputs[name]) for name in names]


def _output_layers(model: nn.Module, batch: Batch) -> list[str]:
    """Of a classifier the layer that is called last; of a detector the last tenth of those on whole images."""
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
