"""Ways to give tied layers their weights, without labels and without training: ours and published ones.

Every method ties all groups of a case in place. The published ones are written here as in their papers, and short; they
fit on as many rows of each layer as ours does, and get their batch normalisation statistics re-estimated on the same
images (Jordan et al., "REPAIR", ICLR 2023). Normalisation and what only one task has stay private to each task.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemel.alignment.align import align
from gemel.alignment.matching import match_groups
from gemel.environment.seeds import generator
from gemel.fitting.batch_norm import averaged_statistics, reestimate_statistics
from gemel.fitting.coroutines import current, run_coroutines, wait
from gemel.fitting.least_squares import FitSettings, fit_least_squares, quotas, why_unfit, with_affine
from gemel.fitting.rows import (
    Samples,
    collect_rows,
    input_rows,
    linear_map_at,
    matrix_of,
    sample_inputs,
    sample_outputs,
    set_matrix,
)
from gemel.fitting.sensitivity import predict_sensitivity
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.fitting.teacher_samples import sample_teachers
from gemel.forward.batches import Batch, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import Models
from gemel.sharing.adapters import LinearMap
from gemel.sharing.groups import Configuration, Group, find_groups
from gemel.sharing.tying import retie, tie
from gemel.strategies.adaptive import Adaptive
from gemel.thresholds import THRESHOLDS
from gemel.trials.initialisation import donate_weights

POSITIONS = THRESHOLDS.fit.positions  # rows per layer and task
ONE_IN = round(THRESHOLDS.fit.pixels / THRESHOLDS.sensitivity.pixels)  # of the images: misfit is predicted on these
KEPT = 0.9  # of what is off the diagonal of x'x: alpha of RegMean, section 3.2, as chosen there for most models
FLOOR = 1e-6  # of the mean of the diagonal of x'x, so that inputs that are always 0 get the mean of the weights


@dataclass(frozen=True)
class Case:
    """What a method is given. `models`: untied, each with its channels as it came; they are changed in place."""

    models: nn.ModuleDict
    images: Mapping[str, Sequence[Batch]]  # per task, without labels
    device: torch.device
    seed: int

    def reestimate(self) -> None:
        """Re-estimates the batch normalisation statistics of every model over its images."""
        for task, model in self.models.items():
            reestimate_statistics(model, [(batch, None) for batch in self.images[task]], self.device)


Method = Callable[[Case], None]
Inputs = dict[tuple[str, str], Tensor]  # (task, layer) -> x [groups, n, d]


# ---- ours --------------------------------------------------------------------------------------------------


@torch.no_grad()
def ours(case: Case) -> None:
    """The first fit of `adaptive`, all tasks counting alike: layers matched and channels aligned by weights, first
    layers that no one set of weights serves taken from one task, then the sequential fit, with a private scale and bias
    of each task where no normalisation is behind a layer.
    """
    groups, teachers = _prepared(case)
    groups, plain = tuple(with_affine(case.models, group) for group in groups), groups
    retie(case.models, plain, groups, teachers)
    strategy = Adaptive(dict(case.models.items()), groups)
    some = {task: batches[: max(1, len(batches) // ONE_IN)] for task, batches in case.images.items()}
    method, drawn = THRESHOLDS.sensitivity.method, generator(case.seed, "misfit")
    misfit = predict_sensitivity(case.models, teachers, groups, some, method=method, generator=drawn)
    strategy.set_sensitivity({}, misfit)
    fitted = donate_weights(case.models, teachers, groups, strategy.donor_of)
    asked = sample_teachers(teachers, fitted, case.images, generator=generator(case.seed, "fit"), positions=POSITIONS)
    fit_sequentially(case.models, teachers, fitted, case.images, teacher_samples=asked)


def ours_on_unmerged_inputs(case: Case) -> None:
    """The same least squares, but every layer on the inputs that it has in the unmerged models, and no donors."""
    groups, teachers = _prepared(case)
    settings = FitSettings(positions=POSITIONS, teacher_inputs=True)
    drawn = generator(case.seed, "fit")
    fit_least_squares(case.models, teachers, groups, case.images, generator=drawn, settings=settings)
    case.reestimate()


def _prepared(case: Case) -> tuple[Configuration, Models]:
    """The groups, tied to the mean of aligned models, and the unmerged models with their channels in the same order."""
    groups = match_groups(case.models, "weights")
    align(case.models, groups, case.images, method="weights", seed=case.seed)
    teachers = copy.deepcopy(case.models).eval()
    tie(case.models, groups)
    return groups, teachers


# ---- published ---------------------------------------------------------------------------------------------


def averaged(rule: str, alignment: str | None = None) -> Method:
    """One model's weights ("first": Padmanabhan et al., "Gemel", NSDI 2023) or their mean (Wortsman et al., "Model
    soups", ICML 2022); alignment: with channels permuted first (Ainsworth et al., "Git Re-Basin", ICLR 2023: weight
    matching in section 3.2, activation matching in 3.1).
    """

    def method(case: Case) -> None:
        tie(case.models, _aligned(case, alignment), rule)
        case.reestimate()

    return method


def regmean(alignment: str | None = None) -> Method:
    """Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, section 3: each linear
    layer in closed form from the inputs that it has in the unmerged models; convolutions as products over windows.
    """

    @torch.no_grad()
    def method(case: Case) -> None:
        groups = _aligned(case, alignment)
        teachers = copy.deepcopy(case.models).eval()
        tie(case.models, groups)
        linear = [group for group in groups if not why_unfit(case.models, group)]
        inputs: Inputs = {}
        for task, batches in case.images.items():
            wanted, drawn = quotas(teachers, linear, task, POSITIONS), generator(case.seed, "regmean", task)
            rows = collect_rows(teachers[task], wanted, batches, drawn)
            inputs |= {(task, name): found.x for name, found in rows.items()}
        for group in linear:
            _set_regmean(case.models, teachers, group, inputs)
        case.reestimate()

    return method


def regmean_plus_plus(alignment: str | None = None) -> Method:
    """Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
    2025: as RegMean, each layer on the inputs that it has in the merged model, behind the layers merged before it.
    """

    @torch.no_grad()
    def method(case: Case) -> None:
        groups = _aligned(case, alignment)
        teachers = copy.deepcopy(case.models).eval()
        tie(case.models, groups)
        _LayerByLayer(case, teachers, [group for group in groups if not why_unfit(case.models, group)]).run()
        case.reestimate()

    return method


def solve_regmean(inputs: Sequence[Tensor], matrices: Sequence[Tensor], kept: float = KEPT) -> Tensor:
    """(sum_t G_t)^-1 sum_t G_t W_t [groups, d, o], where G_t is x_t'x_t with all but its diagonal multiplied by `kept`.

    inputs: x_t [groups, n, d] of each task; matrices: W_t [groups, d, o].
    """
    system, target = torch.zeros(()), torch.zeros(())
    for x, matrix in zip(inputs, matrices, strict=True):
        gram = kept * (x.mT @ x)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal.div_(kept)
        diagonal.add_(FLOOR * diagonal.mean().clamp_min(torch.finfo(x.dtype).tiny))
        system, target = system + gram, target + gram @ matrix
    return torch.cholesky_solve(target, torch.linalg.cholesky(system))


def _aligned(case: Case, alignment: str | None) -> Configuration:
    """The groups by order, after the channels of their layers were aligned by a method of gemel.alignment."""
    groups = find_groups(case.models)
    if alignment is not None:
        align(case.models, groups, case.images, method=alignment, seed=case.seed)
    return groups


def _set_regmean(models: Models, teachers: Models, group: Group, inputs: Inputs) -> None:
    found = [o for o in group.occurrences if o in inputs]
    if found:  # a layer that is never called as a module has no inputs, and keeps the mean
        matrices = [matrix_of(linear_map_at(teachers[o.task], o.layer)) for o in found]
        shared = linear_map_at(models[found[0].task], found[0].layer)
        set_matrix(shared, solve_regmean([inputs[o] for o in found], matrices))


class _LayerByLayer:
    """RegMean++ in one forward pass of each model on all its images: the passes wait for each other at every layer.

    Batch normalisation uses the statistics of the pass. Where a layer is called several times, its first call is taken
    with its inputs in the merged model, the later ones with those in the unmerged model, as in the sequential fit.
    """

    def __init__(self, case: Case, teachers: Models, groups: Sequence[Group]):
        self.models, self.teachers, self.device = case.models, teachers, case.device
        self.images = {task: _joined(batches) for task, batches in case.images.items()}
        self.group_of = {(o.task, o.layer): group for group in groups for o in group.occurrences}
        self.samples: dict[str, Samples] = {}  # of the teachers
        self.inputs: Inputs = {}  # first those in the teachers
        for task, images in self.images.items():
            wanted, drawn = quotas(teachers, groups, task, POSITIONS), generator(case.seed, "regmean", task)
            self.samples[task] = sample_outputs(teachers[task], wanted, images, drawn)
            x = sample_inputs(teachers[task], self.samples[task], images)
            self.inputs |= {(task, name): rows for name, rows in x.items()}
        self.seen: set[tuple[str, str]] = set()
        self.merged: set[Group] = set()

    def run(self) -> None:
        programs = {task: lambda task=task: self.forward(task) for task in self.images}
        members = {group: list(dict.fromkeys(group.tasks)) for group in self.group_of.values()}
        run_coroutines(programs, members, self.merge)

    def forward(self, task: str) -> None:
        layers = list(self.samples[task])
        with averaged_statistics(self.models[task]), hooked(self.models[task], layers, self.wait, before=True):
            self.models[task](to_device(self.images[task], self.device))

    def wait(self, name: str, layer: LinearMap, inputs: tuple) -> None:
        task = current()
        group = self.group_of[task, name]
        if group in self.merged:
            return
        if (task, name) not in self.seen:
            first = self.samples[task][name][0]
            x = input_rows(layer, inputs[0], first.output_shape, first.picked)
            self.inputs[task, name] = torch.cat([x, self.inputs[task, name][:, x.shape[1] :]], 1)
            self.seen.add((task, name))
        wait(group)

    def merge(self, group: Group, present: list[str]) -> None:
        _set_regmean(self.models, self.teachers, group, self.inputs)
        self.merged.add(group)


def _joined(batches: Sequence[Batch]) -> Batch:
    """All images of a task as one batch."""
    tensors = [batch for batch in batches if torch.is_tensor(batch)]
    return torch.cat(tensors) if len(tensors) == len(batches) else list(itertools.chain.from_iterable(batches))


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours, inputs of the unmerged models": ours_on_unmerged_inputs,
    "RegMean++": regmean_plus_plus(),
    "RegMean++, channels aligned by activations": regmean_plus_plus("activations"),
    "RegMean": regmean(),
    "RegMean, channels aligned by activations": regmean("activations"),
    "Git Re-Basin by activations, mean": averaged("mean", "activations"),
    "Git Re-Basin by weights, mean": averaged("mean", "weights"),
    "mean": averaged("mean"),
    "first": averaged("first"),
}
