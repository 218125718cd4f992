"""How much two models agree about the same images, from 0 to 1 per image; no labels are needed."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from gemel.forward.batches import run
from gemel.forward.modes import logits_of
from gemel.workload import DETECTION

MIN_SCORE = 0.5  # of a detection that counts
SAME_BOX = 0.5  # overlap (intersection over union) from which two boxes may be the same object


class Boxes(NamedTuple):
    """Detections of one image, those with the best scores first."""

    boxes: Tensor  # [n, 4], left, top, right, bottom
    labels: list[int]


def agreement_of(kind: str, one: Any, other: Any) -> float:
    """The agreement of two outputs for one image, in [0, 1].

    kind: of the task. Of classifiers (a row of logits [K]) 1 if the class is the same, else 0; with a single logit, if
    both are above 0 or neither is; of logits [K, ...] the share of places with the same class. Of detectors (a
    dictionary with boxes, scores, labels) the F1 of the one's detections with the other's as truth, of those with a
    score of at least MIN_SCORE (`f1_of`). An output that is not finite agrees with none.
    Raises ValueError for an output of another kind.
    """
    if kind == DETECTION:
        return f1_of(_detections(one), _detections(other))
    if not all(torch.is_tensor(output) and output.dim() for output in (one, other)) or one.shape != other.shape:
        raise ValueError(f"agreement: got {_kind(one)} and {_kind(other)}; allowed: two rows of logits of one length")
    if not all(bool(torch.isfinite(output).all()) for output in (one, other)):
        return 0.0
    same = (one > 0) == (other > 0) if len(one) == 1 else one.argmax(0) == other.argmax(0)
    return float(same.float().mean())


def f1_of(one: Boxes, other: Boxes) -> float:
    """The F1 of two sets of detections, where boxes of one label that overlap by SAME_BOX are the same object.

    Boxes are matched greedily in the order of `one`, each with the free box that overlaps most. 1 if both are empty.
    """
    if not one.labels and not other.labels:
        return 1.0
    if not one.labels or not other.labels:
        return 0.0
    overlap = box_iou(one.boxes.float(), other.boxes.float())
    free, same = set(range(len(other.labels))), 0
    for i, label in enumerate(one.labels):
        fits = [j for j in free if other.labels[j] == label and overlap[i, j] >= SAME_BOX]
        if fits:
            free.remove(max(fits, key=lambda j: float(overlap[i, j])))
            same += 1
    return 2 * same / (len(one.labels) + len(other.labels))


def mean_agreement(kind: str, loader: Iterable, one: nn.Module, other: nn.Module) -> float:
    """The mean agreement of two models over all images of a loader, whose batches are (images, whatever)."""
    found: list[float] = []
    for images, _ in loader:
        outputs = [logits_of(run(model, images)) for model in (one, other)]
        found += [agreement_of(kind, *pair) for pair in zip(*outputs, strict=True)]
    return sum(found) / len(found)


def have_equal_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models of one kind hold the same parameters and buffers, and so compute the same."""
    own, others = one.state_dict(), other.state_dict()
    return list(own) == list(others) and all(
        torch.is_tensor(value) and torch.equal(value, others[key].to(value.device)) for key, value in own.items()
    )


def _detections(output: Any) -> Boxes:
    if not isinstance(output, Mapping) or not {"boxes", "scores", "labels"} <= set(output):
        raise ValueError(f"agreement: got {_kind(output)}; allowed: a dictionary with boxes, scores, labels")
    boxes, scores, labels = (output[key].detach().cpu() for key in ("boxes", "scores", "labels"))
    chosen = [i for i in scores.argsort(descending=True).tolist() if scores[i] >= MIN_SCORE]
    return Boxes(boxes[chosen], labels[chosen].tolist())


def _kind(output: Any) -> str:
    return f"a tensor {list(output.shape)}" if torch.is_tensor(output) else f"a {type(output).__name__}"
