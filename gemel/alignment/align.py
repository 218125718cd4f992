"""Permutes the channels of independently trained models so that the layers to be tied agree channel by channel.

A permutation of a channel space does not change what a model computes, so it costs nothing at run time; it only makes
the weights of different models comparable. Models that are aligned already (same ancestor) are left as they are.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import scipy  # which imports scipy.optimize, half a second, when it is first used
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from gemel.alignment.activations import INPUT, OUTPUT, Moments, compare
from gemel.alignment.permutation import (
    ChannelSpaces,
    Space,
    channels_of,
    find_channel_spaces,
    inverse,
    permute,
    tensor_at,
)
from gemel.environment.seeds import generator
from gemel.forward.batches import Batch, run
from gemel.forward.modes import Models
from gemel.sharing.groups import Configuration
from gemel.sharing.memory import distinct_bytes

# Set by hand; benchmarks/LOG.md has no measurement of other values.
MARGIN = 0.1  # a space is permuted only if that raises its score by at least this share of the score it then has
MAX_SWEEPS = 50
LIKE = 0.5  # cosine of weights: layers of one ancestor had .37 to 1, others -.06 to .01 (2026-11-27 Fewer seconds)
TOLERANCE = 1e-3  # of the output's scale, when a permuted model is checked on its own images

log = logging.getLogger(__name__)


class SpaceAlignment(NamedTuple):
    """The permutation of one space, and its similarity to the models aligned earlier, before and after.

    Similarity, in [-1, 1]: mean correlation of the channels' activations, or cosine of the weights where the weights
    decided.
    """

    task: str
    space: str
    size: int
    before: float
    after: float
    permutation: tuple[int, ...]  # channel permutation[i] is now channel i

    @property
    def num_moved(self) -> int:
        return sum(i != j for i, j in enumerate(self.permutation))


@dataclass(frozen=True)
class Alignment:
    """What `align` did; the model of the first task of `order` was not permuted."""

    order: tuple[str, ...]
    spaces: tuple[SpaceAlignment, ...]
    unaligned: tuple[tuple[str, str, str], ...]  # (task, layer, reason)
    found: Mapping[str, ChannelSpaces] = field(default_factory=dict)  # task -> the spaces of its model


class Site(NamedTuple):
    """A layer to be tied, and a layer that it is to be tied to, in a model that is aligned already."""

    layer: str
    other_task: str
    other_layer: str


def align(
    models: Models,
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]] | None = None,
    *,
    method: str = "activations",
    seed: int = 0,
    fixed: Collection[str] = (),
) -> Alignment:
    """Permutes channels in place so that the layers of `groups` agree channel by channel; no model's function changes.

    Models are aligned one by one, those of `fixed` first, then the largest first, each to all those before it. The
    first one and those of `fixed` stay as they are, and so do those whose layers are all alike already, as after
    fine-tuning of one ancestor. images: per task, batches of images without labels as its loader
    gives them; needed by "activations", and used by both methods to check that each model still computes the same (else
    its permutations are undone and it is listed as unaligned). seed: of the order in which "weights" visits the spaces.
    Models must not share parameters yet. Raises ValueError.

    "activations": pairs channels by the correlation of their activations on the images of both tasks (Li et al.,
    "Convergent Learning", 2015; ZipIt, ICLR 2024, section 4), in spaces whose weights are not aligned already.
    "weights": coordinate descent on the inner product of the layers' weights (Ainsworth et al., "Git Re-Basin", ICLR
    2023, algorithm 1), summed over the layers to be tied only.
    """
    _check(models, groups, images, method)
    involved = [task for task in models if any(task in group.tasks for group in groups)]
    order = sorted(involved, key=lambda task: (task not in fixed, -distinct_bytes({task: models[task]})))  # stable
    spaces, unaligned, found = [], [], {}
    for position, task in enumerate(order):
        if position == 0 or task in fixed:
            continue
        sites = find_sites(groups, task, order[:position])
        if _are_alike(models[task], _targets(models, sites)):
            continue
        own = (images or {}).get(task) or ()
        found[task] = find_channel_spaces(models[task], own[0][:2] if own and torch.is_tensor(own[0]) else None)
        done, left = _align_one(models, task, found[task], sites, images, method, seed)
        spaces += done
        unaligned += [(task, layer, reason) for layer, reason in left]
    return Alignment(tuple(order), tuple(spaces), tuple(unaligned), found)


def are_alike(models: Models, groups: Configuration) -> bool:
    """Whether the models' layers are alike already, as after fine-tuning of one ancestor."""
    tasks = [task for task in models if any(task in group.tasks for group in groups)]
    return all(
        _are_alike(models[task], _targets(models, find_sites(groups, task, tasks[:position])))
        for position, task in enumerate(tasks)
    )


def permutations_of(alignment: Alignment) -> dict[str, dict[str, list[int]]]:
    """What `align` permuted, as JSON values: task -> {space: permutation}; without the spaces that stayed the same."""
    found: dict[str, dict[str, list[int]]] = {}
    for space in alignment.spaces:
        if space.num_moved:
            found.setdefault(space.task, {})[space.space] = list(space.permutation)
    return found


def apply_permutations(
    model: nn.Module, permutations: Mapping[str, Sequence[int]], found: ChannelSpaces | None = None
) -> None:
    """Permutes a model by {space: permutation}, as `permutations_of` gives it for its task.

    found: the spaces of the model, where they are known. Raises ValueError for a space that the model does not have.
    """
    if not permutations:
        return
    spaces = {space.name: space for space in (found or find_channel_spaces(model)).spaces}
    if unknown := sorted(set(permutations) - set(spaces)):
        raise ValueError(f"permutations: got {', '.join(unknown)}; allowed: the channel spaces of the model")
    for name, permutation in permutations.items():
        permute(model, spaces[name], permutation)


def find_sites(groups: Configuration, task: str, others: Sequence[str]) -> list[Site]:
    """The layers of a task that are to be tied to layers of `others`."""
    found = []
    for group in groups:
        layers = dict(group.occurrences)
        found += [Site(layers[task], other, layers[other]) for other in others if task in layers and other in layers]
    return found


def _check(models: Models, groups: Configuration, images: Mapping | None, method: str) -> None:
    problems = []
    if method not in METHODS:
        problems.append(f"method: got {method!r}; allowed: {', '.join(METHODS)}")
    tasks = sorted({task for group in groups for task in group.tasks})
    problems += [f"{task}: in a group, but no model is given" for task in tasks if task not in models]
    if method == "activations":
        missing = [task for task in tasks if not (images or {}).get(task)]
        problems += [f"{task}: images: got none; method 'activations' compares models on images" for task in missing]
    owner: dict[int, str] = {}
    for task, model in models.items():
        if others := {owner.setdefault(id(p), task) for p in model.parameters()} - {task}:
            problems.append(f"{task}: holds parameters of {', '.join(sorted(others))}; align before tying")
    if problems:
        raise ValueError("\n".join(problems))


def _align_one(models, task: str, found: ChannelSpaces, sites: list[Site], images, method: str, seed: int):
    """(SpaceAlignment of each space, (layer, reason) of each layer that is not aligned) of one task."""
    model, own = models[task], (images or {}).get(task) or ()
    tied = {site.layer for site in sites}
    touched = [s for s in found.spaces if any(m.key.rpartition(".")[0] in tied for m in s.members)]
    done = METHODS[method](models, task, touched, sites, images, seed) if touched else []
    unaligned = [(layer, reason) for layer, reason in found.unaligned if layer in tied]
    moved = [(space, result.permutation) for space, result in zip(touched, done, strict=True) if result.num_moved]
    if moved:
        after = _outputs(model, own)
        for space, permutation in moved:
            permute(model, space, inverse(permutation))
        if not _are_close(_outputs(model, own), after):
            log.warning("%s: its output changed when its channels were permuted; the permutations are undone", task)
            return [], [*unaligned, ("", "the model's output changed when its channels were permuted")]
        for space, permutation in moved:
            permute(model, space, permutation)
    return done, unaligned


# ---- methods -----------------------------------------------------------------------------------------------


def _by_activations(models, task: str, spaces: list[Space], sites: list[Site], images, seed: int):
    """The best order of each space by itself, if its weights are not aligned already.

    Activations of models that were fine-tuned from the same ancestor differ so much on each other's images that
    correlation alone would permute channels that are aligned. Their weights show that they are.
    """
    model, targets = models[task], _targets(models, sites)
    by_weights = {space.name: _weight_similarity(model, space, targets) for space in spaces}
    unaligned = [space for space in spaces if best_order(by_weights[space.name]) != list(range(space.size))]
    by_activations = _correlations(models, task, unaligned, sites, images)
    results = []
    for space in spaces:
        scores = by_activations.get(space.name, by_weights[space.name])
        permutation = best_order(scores) if space.name in by_activations else list(range(space.size))
        permute(model, space, permutation)
        values = float(scores.trace()), float(scores[range(space.size), permutation].sum())
        results.append(SpaceAlignment(task, space.name, space.size, *values, tuple(permutation)))
    return results


def _correlations(models, task: str, spaces: list[Space], sites: list[Site], images) -> dict[str, Tensor]:
    """Space -> correlations [channels of the models before, channels of the model], averaged over layers and models.

    Divided by the number of channels, so that the trace is the mean over channels.
    """
    layers = {member.key.rpartition(".")[0] for space in spaces for member in space.members}
    correlations: dict[str, list[Tensor]] = {}
    for other in dict.fromkeys(site.other_task for site in sites):
        pairs = [(site.other_layer, site.layer) for site in sites if site.other_task == other and site.layer in layers]
        moments = compare((models[other], models[task]), pairs, (images[other], images[task])) if pairs else {}
        for space in spaces:
            if found := _channel_correlations(models[task], space, moments):
                correlations.setdefault(space.name, []).extend(found)
    return {name: torch.stack(found).mean(0) / len(found[0]) for name, found in correlations.items()}


def _channel_correlations(model: nn.Module, space: Space, moments: Mapping[tuple, Moments]) -> list[Tensor]:
    """One matrix [channels, channels] for each input or output of a tied layer that lies in the space."""
    found = []
    for (_, layer, side), moment in moments.items():
        correlation = moment.correlation()
        for member in space.members:
            if side not in _sides(model, layer, member.key, member.axis):
                continue
            length = space.size * member.inner
            if correlation.shape[0] != correlation.shape[1] or member.offset + length > len(correlation):
                continue
            block = correlation.narrow(0, member.offset, length).narrow(1, member.offset, length)
            blocks = block.unflatten(1, (space.size, member.inner)).unflatten(0, (space.size, member.inner))
            found.append(blocks.diagonal(dim1=1, dim2=3).mean(-1).cpu())
    return found


def _sides(model: nn.Module, layer: str, key: str, axis: int) -> tuple[str, ...]:
    """INPUT or OUTPUT, whichever channels an axis of a parameter runs along; both in a depthwise convolution."""
    if key != (f"{layer}.weight" if layer else "weight"):
        return ()
    module = model.get_submodule(layer)
    if getattr(module, "groups", 1) > 1:
        return (INPUT, OUTPUT) if module.in_channels == module.out_channels else (OUTPUT,)
    return (INPUT,) if (axis == 0) == bool(getattr(module, "transposed", False)) else (OUTPUT,)


def _by_weights(models, task: str, spaces: list[Space], sites: list[Site], images, seed: int):
    """Coordinate descent: the best order of one space while the others stay, until no space is permuted any more."""
    model = models[task]
    targets = _targets(models, sites)
    orders = [list(range(space.size)) for space in spaces]
    first = [_weight_similarity(model, space, targets) for space in spaces]
    random = generator(seed, "alignment", task)
    for _ in range(MAX_SWEEPS):
        permuted = False
        for i in torch.randperm(len(spaces), generator=random).tolist():
            permutation = best_order(_weight_similarity(model, spaces[i], targets))
            if permutation != list(range(spaces[i].size)):
                permute(model, spaces[i], permutation)
                orders[i] = [orders[i][j] for j in permutation]
                permuted = True
        if not permuted:
            break
    last = [_weight_similarity(model, space, targets) for space in spaces]
    values = [(float(a.trace()), float(b.trace())) for a, b in zip(first, last, strict=True)]
    return [
        SpaceAlignment(task, space.name, space.size, *value, tuple(order))
        for space, value, order in zip(spaces, values, orders, strict=True)
    ]


def _targets(models: Models, sites: list[Site]) -> dict[str, Tensor]:
    """Key of a parameter to be tied -> the mean of the parameters that it is to be tied to."""
    found: dict[str, list[Tensor]] = {}
    for site in sites:
        for key, parameter in models[site.other_task].get_submodule(site.other_layer).named_parameters(recurse=False):
            found.setdefault(f"{site.layer}.{key}" if site.layer else key, []).append(parameter.detach())
    return {key: torch.stack([value.to(values[0]) for value in values]).mean(0) for key, values in found.items()}


def _are_alike(model: nn.Module, targets: Mapping[str, Tensor]) -> bool:
    """Whether every layer to be tied has weights much like those that it is to be tied to, channel by channel."""
    pairs = [(tensor_at(model, key).detach().to(target), target) for key, target in targets.items() if target.ndim > 1]
    return all(F.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0) >= LIKE for a, b in pairs)


def _weight_similarity(model: nn.Module, space: Space, targets: Mapping[str, Tensor]) -> Tensor:
    """[channels of the target, channels of the model]: inner products, so that the trace is the mean cosine."""
    members = [member for member in space.members if member.key in targets]
    matrices = [member for member in members if targets[member.key].ndim > 1]
    total = torch.zeros(space.size, space.size)
    for member in matrices or members:
        one, other = (
            channels_of(t.detach(), space, member).movedim(member.axis, 0).flatten(1).float()
            for t in (targets[member.key], tensor_at(model, member.key))
        )
        total += (one @ other.T / (one.norm() * other.norm()).clamp_min(1e-12)).cpu()
    return total / len(matrices or members)


METHODS = {"activations": _by_activations, "weights": _by_weights}


def best_order(scores: Tensor) -> list[int]:
    """permutation[i]: the column assigned to row i, for the largest sum; the identity unless that is MARGIN better."""
    permutation = scipy.optimize.linear_sum_assignment(scores.double().numpy(), maximize=True)[1].tolist()
    best, now = float(scores[range(len(scores)), permutation].sum()), float(scores.trace())
    return permutation if best - now > MARGIN * abs(best) else list(range(len(scores)))


# ---- does the model still compute the same? ----------------------------------------------------------------


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The model's outputs for its first batch; of detections the scores, since the order of near ties may change."""
    if not batches:
        return []
    output = run(model, batches[0])
    if isinstance(output, list) and all(isinstance(item, dict) and "scores" in item for item in output):
        return [item["scores"].sort(descending=True).values for item in output]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _are_close(before: list[Tensor], after: list[Tensor]) -> bool:
    for one, other in zip(before, after, strict=True):
        length = min(len(one), len(other))  # a detection near the score threshold may appear or vanish
        one, other = one[:length].float(), other[:length].float()
        if one.numel() and float((one - other).abs().max()) > TOLERANCE * max(float(one.abs().max()), 1e-6):
            return False
    return True
