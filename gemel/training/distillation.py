"""The unmerged model as teacher of the merged one: losses between the two on the same images, without labels.

Outputs of the tied layers are compared layer by layer, for classifiers and detectors in the same way; for a classifier
its class probabilities as well, for a detector what it predicts at every position (predictions.py). Detections of a
teacher can serve as labels. Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (section 2);
Romero et al., "FitNets", ICLR 2015, for features.
"""

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemel.environment import ranks
from gemel.forward.autocast import IN_FLOAT32, Autocast
from gemel.forward.hooks import EndForward, hooked, run_until_end
from gemel.forward.modes import logits_of
from gemel.training.predictions import PredictionTaps

MIN_SCORE = 0.4  # of a teacher's detection that counts as an object (benchmarks/LOG.md, 2026-11-25 Detectors)
MAX_CALLS = 8  # of a layer in a pass, whose moments ranks exchange: one a pyramid level; others are not compared there
EPSILON = 1e-6  # of the variance that a feature loss is divided by


class Taps:
    """Keeps the outputs of the named layers in the last forward pass of a model, one for each call of a layer.

    Calls of a copy of the model, such as the average of its weights, are not recorded.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.num_calls = 0  # of the named layers, in this pass
        self.max_calls: int | None = None  # calls after which the rest of the pass is not needed; None: all is
        self.hooks = contextlib.ExitStack()
        self.hooks.enter_context(hooked(model, [""], self._begin, before=True))
        self.hooks.enter_context(hooked(model, layers, self._record))

    def _begin(self, name: str, model: nn.Module, inputs: tuple) -> None:
        self.clear()

    def _record(self, name: str, layer: nn.Module, inputs: tuple, output: Any) -> None:
        if torch.is_tensor(output):
            self.outputs[name].append(output)
        self.num_calls += 1
        if self.num_calls == self.max_calls:
            raise EndForward

    def clear(self) -> None:
        self.outputs, self.num_calls = defaultdict(list), 0

    def remove(self) -> None:
        self.hooks.close()


class Teacher:
    """One task's unmerged model beside its merged one, for the duration of a round (`close` removes the hooks)."""

    def __init__(self, model: nn.Module, teacher: nn.Module, layers: Sequence[str]):
        self.model, self.teacher, self.layers = model, teacher, list(layers)
        self.own, self.taught = Taps(model, layers), Taps(teacher, layers)
        self.predictions = PredictionTaps(model, teacher)
        self.has_seen = False  # whether a whole pass over the images of this batch is recorded

    def losses(
        self,
        images: Tensor | list[Tensor],
        output: Any,
        autocast: Autocast = IN_FLOAT32,
        split_task: str | None = None,
    ) -> dict[str, Tensor]:
        """Named scalars with gradient, after the model's forward pass on `images` returned `output`.

        features: mean squared difference of the recorded outputs, each divided by the variance of the teacher's, mean
        over the layers (outputs that differ in shape, as behind a detector's own proposals, are left out).
        probabilities (classifiers): Kullback-Leibler divergence from the teacher's class probabilities. predictions
        (detectors that predictions.py knows): the difference from what the teacher predicts at every position. Where
        the teacher's `detections` on these images were asked for and can be compared, it does not run again.
        split_task: the task, if the images are this rank's part of a batch, so that the variance is that of the whole
        batch; all its ranks call this together.
        """
        runs = not self.has_seen or self.predictions.needs_a_pass
        taught = self._teacher_logits(images, autocast) if runs else None
        own, outputs = self.own.outputs, self.taught.outputs
        if split_task is None:
            losses = {"features": feature_loss(own, outputs)}
        else:
            losses = {"features": part_of_feature_loss(own, outputs, self.layers, split_task, images)}
        logits = logits_of(output)
        if torch.is_tensor(logits) and torch.is_tensor(taught):
            ours, theirs = logits.float().log_softmax(1), taught.float().log_softmax(1)
            losses["probabilities"] = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        if (predicted := self.predictions.loss()) is not None:
            losses["predictions"] = predicted
        self.clear()
        return losses

    @torch.no_grad()
    def detections(self, images: list[Tensor], autocast: Autocast = IN_FLOAT32) -> list[dict[str, Tensor]]:
        """Pseudo-labels {boxes, labels} for images without labels: the teacher's detections with a score of MIN_SCORE.

        Source: Sohn et al., "A Simple Semi-Supervised Learning Framework for Object Detection" (STAC), 2020, section
        3.2; the threshold is lower here, as one-stage detectors give low scores.
        """
        max_calls, self.taught.max_calls = self.taught.max_calls, None  # the whole pass is needed
        with self.predictions.of_whole_pass(), autocast.within(self.teacher):
            found = self.teacher(images)
        self.taught.max_calls, self.has_seen = max_calls, True
        certain = [output["scores"] >= MIN_SCORE for output in found]
        return [{key: o[key][keep] for key in ("boxes", "labels")} for o, keep in zip(found, certain, strict=True)]

    def clear(self) -> None:
        """Forgets what was recorded in a pass whose losses are not computed."""
        self.own.clear()
        self.taught.clear()
        self.predictions.clear()
        self.has_seen = False

    def close(self) -> None:
        self.own.remove()
        self.taught.remove()
        self.predictions.remove()

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor | list[Tensor], autocast: Autocast) -> Tensor | None:
        """The teacher's logits; None for a detector, whose pass ends at the last layer that is compared.

        Which call is the last one is known after the first whole pass; where predictions are compared, it is the last
        head.
        """
        with autocast.within(self.teacher):
            output = run_until_end(self.teacher, images)
        if torch.is_tensor(logits_of(output)):
            return logits_of(output)
        if output is not None:
            self.taught.max_calls = self.taught.num_calls
        return None


def feature_loss(own: Mapping[str, list[Tensor]], taught: Mapping[str, list[Tensor]]) -> Tensor:
    """Mean over layers of the squared difference from the teacher's output over the variance of that output; 0-dim."""
    losses: list[Tensor] = []
    for layer in taught:
        if pairs := _pairs(own[layer], taught[layer]):
            spread = sum((t - t.mean()).square().sum() for _, t in pairs)
            count = sum(t.numel() for _, t in pairs)
            losses.append(_difference(pairs) / (spread + EPSILON * count))
    return torch.stack(losses).mean() if losses else torch.zeros(())


def part_of_feature_loss(
    own: Mapping[str, list[Tensor]],
    taught: Mapping[str, list[Tensor]],
    layers: Sequence[str],
    task: str,
    images: Tensor | list[Tensor],
) -> Tensor:
    """This rank's part of the feature loss of a batch that several ranks compute; 0-dim.

    The mean of the parts, each weighted by its number of images, is `feature_loss` of the whole batch, of the layers
    that can be compared on all ranks. Mean and variance of the teacher's outputs come from the moments of all parts.
    """
    pairs = {layer: _pairs(own[layer], taught[layer], MAX_CALLS) for layer in layers}
    zero = torch.zeros((), device=images[0].device)
    parts = ranks.gathered_tensors(_moments(list(pairs.values()), zero, len(images)), ranks.parts_of(task))
    counts, means, squares = parts[:, :-1].unbind(-1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp(min=1)
    spread = (squares + counts * (means - mean).square()).sum((0, -1)) + EPSILON * total.sum(-1)
    is_everywhere = ((counts > 0) == (counts[:1] > 0)).all(0).all(-1) & (total > 0).any(-1)
    differences = [_difference(found) if found else zero for found in pairs.values()]
    if not differences:
        return torch.zeros(())
    losses = torch.stack(differences) / spread.clamp(min=EPSILON) * is_everywhere
    return losses.sum() / is_everywhere.sum().clamp(min=1) * (parts[:, -1, 0, 0].sum() / len(images))


def _moments(pairs: Sequence[Sequence[tuple[Tensor, Tensor]]], zero: Tensor, num_images: int) -> Tensor:
    """Of each layer and call the number of the teacher's values, their mean and squared deviations; then the
    number of images."""
    found = zero.new_zeros(len(pairs) + 1, MAX_CALLS, 3)
    for i, calls in enumerate(pairs):
        for j, (_, t) in enumerate(calls):
            mean = t.mean()
            found[i, j] = torch.stack([mean.new_tensor(t.numel()), mean, (t - mean).square().sum()])
    found[-1] = num_images
    return found


def _pairs(own: Sequence[Tensor], taught: Sequence[Tensor], most: float = math.inf) -> list[tuple[Tensor, Tensor]]:
    """The outputs of the calls of one layer here and in the teacher; empty where they cannot be compared, or are more
    than so many."""
    both = zip(own, taught, strict=False)
    pairs = [(o.float(), t.float()) for o, t in both if o.shape == t.shape and t.numel() > 1]
    return pairs if len(own) == len(taught) == len(pairs) <= most else []


def _difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return functools.reduce(torch.add, ((o - t).square().sum() for o, t in pairs))
