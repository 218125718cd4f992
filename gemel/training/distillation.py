"""The unmerged model as teacher of the merged one: the losses between the two on the same images, without labels.

Features behind the tied layers are compared layer by layer, which works alike for classifiers and detectors; the class
probabilities of a classifier are compared as well; what a detector finds can stand for labels. Sources: Hinton et al.,
"Distilling the Knowledge in a Neural Network", 2015 (section 2); Romero et al., "FitNets", ICLR 2015, for features.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemel.forward.modes import logits_of

SURE = 0.4  # score from which a detection of the teacher counts as an object
EPSILON = 1e-6  # of the variance that a feature loss is divided by


class _Enough(Exception):
    """Ends a forward pass from which nothing more is needed."""


class Taps:
    """Keeps what the named layers put out in the last forward pass: an output for every time that a layer is called."""

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.num_calls, self.enough = 0, None  # enough: calls after which the rest of the pass is not needed
        self.handles = [model.register_forward_pre_hook(self._begin(model))]
        for layer in layers:
            module = model.get_submodule(layer)
            self.handles.append(module.register_forward_hook(self._keep(layer, module)))

    # Hooks are closures: copying a model copies its hooks, and would copy the object that a method is bound to. A copy,
    # such as the average of weights, is told apart from the model itself.

    def _begin(self, own: nn.Module):
        def hook(module: nn.Module, inputs: tuple) -> None:
            if module is own:
                self.clear()

        return hook

    def _keep(self, layer: str, own: nn.Module):
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if module is not own:
                return
            if torch.is_tensor(output):
                self.outputs[layer].append(output)
            self.num_calls += 1
            if self.num_calls == self.enough:
                raise _Enough

        return hook

    def clear(self) -> None:
        self.outputs, self.num_calls = defaultdict(list), 0

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Teacher:
    """One task's unmerged model beside its merged one, for the time of a round (`close` removes the hooks)."""

    def __init__(self, model: nn.Module, teacher: nn.Module, layers: Sequence[str]):
        self.model, self.teacher = model, teacher
        self.own, self.taught = Taps(model, layers), Taps(teacher, layers)

    def losses(self, images: Tensor | list[Tensor], output: Any) -> dict[str, Tensor]:
        """Named scalars with gradient, after the model's forward pass on `images` gave `output`.

        features: mean squared difference of the tapped outputs, each divided by the variance of the teacher's, mean
        over the layers (outputs that differ in shape, as behind a detector's own proposals, are left out).
        probabilities (classifiers): Kullback-Leibler divergence from the teacher's class probabilities.
        """
        taught = self._teach(images)
        losses = {"features": feature_loss(self.own.outputs, self.taught.outputs)}
        logits = logits_of(output)
        if torch.is_tensor(logits) and torch.is_tensor(taught):
            ours, theirs = logits.log_softmax(1), taught.log_softmax(1)
            losses["probabilities"] = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        self.own.clear()
        self.taught.clear()
        return losses

    @torch.no_grad()
    def detections(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Targets {boxes, labels} for images without labels: what the teacher, a detector, is sure enough of.

        Source: pseudo-labels, Sohn et al., "A Simple Semi-Supervised Learning Framework for Object Detection" (STAC),
        2020, section 3.2; the threshold is lower here, as one-stage detectors give low scores.
        """
        enough, self.taught.enough = self.taught.enough, None  # the whole pass is needed
        found = self.teacher(images)
        self.taught.enough = enough
        self.taught.clear()
        sure = [output["scores"] >= SURE for output in found]
        return [{key: o[key][keep] for key in ("boxes", "labels")} for o, keep in zip(found, sure, strict=True)]

    def close(self) -> None:
        self.own.remove()
        self.taught.remove()

    @torch.no_grad()
    def _teach(self, images: Tensor | list[Tensor]) -> Tensor | None:
        """The teacher's logits, or None for a detector: its pass ends at the last layer that is compared."""
        try:
            output = self.teacher(images)
        except _Enough:
            return None
        if torch.is_tensor(logits_of(output)):
            return logits_of(output)
        self.taught.enough = self.taught.num_calls
        return None


def feature_loss(own: Mapping[str, list[Tensor]], taught: Mapping[str, list[Tensor]]) -> Tensor:
    """Mean over layers of the squared difference over the variance of what is to be learnt; 0-dim."""
    losses = []
    for layer, targets in taught.items():
        pairs = [(o, t) for o, t in zip(own[layer], targets, strict=False) if o.shape == t.shape and t.numel() > 1]
        if len(own[layer]) == len(targets) and len(pairs) == len(targets):
            difference = sum((o - t).square().sum() for o, t in pairs)
            spread = sum((t - t.mean()).square().sum() for _, t in pairs)
            count = sum(t.numel() for _, t in pairs)
            losses.append(difference / (spread + EPSILON * count))
    return torch.stack(losses).mean() if losses else torch.zeros(())
