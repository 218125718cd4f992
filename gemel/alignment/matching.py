"""Which occurrence of a signature is paired with which: the k-th with the k-th, or those that are most similar.

Layers are compared before their channels are aligned (trying every order of channels for every pair would cost too
much), by descriptors that do not depend on the order of channels: norms and spectra of weights, or similarities between
images. Every pairing saves the same number of bytes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import scipy  # which imports scipy.optimize, half a second, when it is first used
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemel.alignment.activations import INPUT, OUTPUT, adapt_images, record_activations
from gemel.forward.batches import Batch
from gemel.forward.modes import Models
from gemel.sharing.groups import Configuration, Group, Occurrence, find_groups, ordered, saved_bytes
from gemel.sharing.signatures import Layer, find_layers

BY_ORDER, BY_WEIGHTS, BY_ACTIVATIONS = MATCHINGS = ("order", "weights", "activations")
# Set by hand; benchmarks/LOG.md has no measurement of other values.
MARGIN = 0.1  # another pairing replaces that of the k-th with the k-th only if it costs less by at least this share
MAX_SPECTRUM = 1024  # singular values are computed of matrices whose smaller side is at most this
DEPTH_WEIGHT = 0.2  # of relative depth, which decides between layers that are otherwise about equally similar
MAX_POSITIONS = 3  # feature maps are averaged down to at most 3 x 3 positions

Candidates = dict[str, list[tuple[float, Layer]]]  # task -> (relative depth in [0, 1], layer); all of one signature


def match_groups(
    models: Models, by: str = "order", images: Mapping[str, Sequence[Batch]] | None = None
) -> Configuration:
    """Every group of a workload, largest saving first; per signature, layers are paired with those of the task that
    has most of them.

    by: "order" (`find_groups`); "weights" (sorted norms of the channels, singular values, relative depth);
    "activations" (linear CKA on the images of all tasks, Kornblith et al., ICML 2019, and relative depth), which needs
    images: task -> batches of images without labels. Raises ValueError.
    """
    _check(models, by, images)
    by_order = find_groups(models)
    if by == BY_ORDER:
        return by_order
    depths = {task: _depths(model) for task, model in models.items()}
    signatures = [candidates for candidates in _by_signature(depths).values() if len(candidates) > 1]
    distances = _Distances(models, images if by == BY_ACTIVATIONS else None, signatures)
    groups = ordered(chain.from_iterable(_match(candidates, list(models), distances) for candidates in signatures))
    assert saved_bytes(groups) == saved_bytes(by_order)
    return groups


def _check(models: Models, by: str, images: Mapping | None) -> None:
    problems = [] if by in MATCHINGS else [f"by: got {by!r}; allowed: {', '.join(MATCHINGS)}"]
    if by == BY_ACTIVATIONS:
        missing = [task for task in models if not (images or {}).get(task)]
        problems += [f"{task}: images: got none; 'activations' compares layers on images" for task in missing]
    if problems:
        raise ValueError("\n".join(problems))


def _depths(model: nn.Module) -> list[tuple[float, Layer]]:
    layers = find_layers(model)
    return [(i / max(1, len(layers) - 1), layer) for i, layer in enumerate(layers)]


def _by_signature(depths: Mapping[str, list[tuple[float, Layer]]]) -> dict[str, Candidates]:
    found: dict[str, Candidates] = defaultdict(lambda: defaultdict(list))
    for task, layers in depths.items():
        for depth, layer in layers:
            found[layer.signature][task].append((depth, layer))
    return found


def _match(candidates: Candidates, tasks: list[str], distances: "_Distances") -> list[Group]:
    """The groups of one signature: every task's occurrences are assigned to those of the task that has most."""
    anchor = max(candidates, key=lambda task: len(candidates[task]))
    members = [[Occurrence(anchor, layer.name)] for _, layer in candidates[anchor]]
    for task in candidates:
        if task != anchor:
            assigned = _assign(candidates, anchor, task, distances)
            for slot, (_, layer) in zip(assigned, candidates[task], strict=True):
                members[slot].append(Occurrence(task, layer.name))
    layer = candidates[anchor][0][1]
    found = (tuple(sorted(slot, key=lambda o: tasks.index(o.task))) for slot in members if len(slot) > 1)
    return [Group(layer.signature, layer.bytes, occurrences) for occurrences in found]


def _assign(candidates: Candidates, anchor: str, task: str, distances: "_Distances") -> list[int]:
    """For each layer of the task, the index of the anchor's layer that it is paired with."""
    own, others = candidates[task], candidates[anchor]
    in_order = list(range(len(own)))
    if len(others) == 1:
        return in_order
    cost = np.array([[distances.cost((task, a), (anchor, b)) for b in others] for a in own])
    best = scipy.optimize.linear_sum_assignment(cost)[1].tolist()
    gain = cost[in_order, in_order].sum() - cost[in_order, best].sum()
    return best if gain > MARGIN * cost[in_order, in_order].sum() else in_order


class _Distances:
    """Distances between layers; the descriptors of a layer are computed once."""

    def __init__(self, models: Models, images: Mapping | None, signatures: Sequence[Candidates]):
        self.models, self.by_images = models, images is not None
        self.known: dict[tuple[str, str], list[Tensor]] = {}
        if images is not None:
            ambiguous = [candidates for candidates in signatures if max(map(len, candidates.values())) > 1]
            for task in models:
                layers = [layer.name for candidates in ambiguous for _, layer in candidates.get(task, ())]
                self.known |= _grams(models[task], task, layers, images)

    def cost(self, one: tuple[str, tuple[float, Layer]], other: tuple[str, tuple[float, Layer]]) -> float:
        """Mean distance of the descriptors, each scaled to length 1, plus the weighted distance in relative depth."""
        (task, (depth, layer)), (other_task, (other_depth, other_layer)) = one, other
        pairs = zip(self._of(task, layer.name), self._of(other_task, other_layer.name), strict=False)
        distances = [float((a - b).norm()) for a, b in pairs if a.shape == b.shape]
        mean = sum(distances) / len(distances) if distances else 0.0
        return mean + DEPTH_WEIGHT * abs(depth - other_depth)

    def _of(self, task: str, layer: str) -> list[Tensor]:
        if (task, layer) not in self.known:
            module = self.models[task].get_submodule(layer)
            found = [] if self.by_images else _weight_descriptors(module)
            self.known[task, layer] = [F.normalize(descriptor, dim=0) for descriptor in found]
        return self.known[task, layer]


@torch.no_grad()
def _weight_descriptors(module: nn.Module) -> list[Tensor]:
    """Sorted norms along each of the first two axes and the singular values of the layer's largest parameter."""
    weight = max(module.parameters(recurse=False), key=Tensor.numel).float().cpu()
    if weight.ndim < 2:
        return [weight.flatten().sort().values]
    matrix = weight.flatten(1)
    found = [weight.transpose(0, axis).flatten(1).norm(dim=1).sort().values for axis in (0, 1)]
    if min(matrix.shape) <= MAX_SPECTRUM:
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        found.append(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())
    return found


def _grams(model: nn.Module, task: str, layers: Sequence[str], images: Mapping) -> dict[tuple[str, str], list[Tensor]]:
    """Per layer, the centred Gram matrices of its inputs and of its outputs over all images, scaled to length 1.

    The cosine of two such matrices is the linear CKA of the layers. A layer that does not run once per image (the box
    heads of a detector) has none.
    """
    recorded: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    num_images = 0
    for batch in chain.from_iterable(images.values()):
        adapted = adapt_images(batch, images[task][0])
        num_images += len(adapted)
        for key, calls in record_activations(model, layers, adapted).items():
            height, width = (min(MAX_POSITIONS, length) for length in calls[0].shape[2:])
            pooled = F.adaptive_avg_pool2d(calls[0].float(), (height, width))
            recorded[key].append(pooled.movedim(1, 0).flatten(1).cpu())
    found = {}
    for layer in layers:
        parts = [recorded[layer, side] for side in (INPUT, OUTPUT)]
        if all(part and len({rows.shape[1] for rows in part}) == 1 for part in parts):
            features = [torch.cat(part) for part in parts]
            found[task, layer] = [_centred_gram(rows) for rows in features if len(rows) == num_images]
    return found


def _centred_gram(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(0)
    return F.normalize((rows @ rows.T).flatten(), dim=0)
