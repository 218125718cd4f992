"""What a detector predicts at every position, before boxes are decoded and suppressed, against its unmerged model.

Of torchvision's detectors and YOLOv3; a detector of another kind has nothing here, and is compared by its features.
Source: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017, for both
parts of a loss; Zhou et al., "Dense Teacher", ECCV 2022, for dense predictions in place of boxes and for their weights.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from gemel.forward.hooks import EndForward, hooked
from model_architectures.yolov3 import YOLOv3

TRANSFORM, PROPOSALS, REGIONS = "transform", "roi_heads.box_roi_pool", "roi_heads.box_predictor"


class Predicted(NamedTuple):
    """The outputs of one head at n positions (with anchors: n of them)."""

    scores: Tensor  # [n, classes], logits; [n, 1] where they only say whether there is an object
    boxes: Tensor  # [n, 4], or [n, classes, 4] where each class has its own; as the detector codes them
    others: Tensor | None = None  # [n, k], logits that count where there is an object: centredness (FCOS), class (YOLO)
    is_softmax: bool = False  # whether the scores are of one of all classes, of which 0 is the background


def _flat(values: Tensor) -> Tensor:
    return values.float().flatten(0, 1)


def _of_dense_head(output: Mapping[str, Tensor]) -> Predicted:
    others = output.get("bbox_ctrness")
    return Predicted(
        _flat(output["cls_logits"]), _flat(output["bbox_regression"]), None if others is None else _flat(others)
    )


def _of_ssd_head(output: Mapping[str, Tensor]) -> Predicted:
    return _of_dense_head(output)._replace(is_softmax=True)


def _of_proposal_head(output: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Predicted:
    scores = torch.cat([level.float().flatten() for level in output[0]])
    boxes = [level.float().unflatten(1, (-1, 4)).permute(0, 1, 3, 4, 2).flatten(0, 3) for level in output[1]]
    return Predicted(scores[:, None], torch.cat(boxes))


def _of_regions(output: tuple[Tensor, Tensor]) -> Predicted:
    return Predicted(output[0].float(), output[1].float().unflatten(1, (-1, 4)), is_softmax=True)


def _of_yolo(model: YOLOv3) -> Callable[[Sequence[Tensor]], Predicted]:
    num_anchors = [len(anchors) for anchors in model.settings.anchors]

    def predicted(levels: Sequence[Tensor]) -> Predicted:
        split = [v.float().unflatten(1, (n, -1)).movedim(2, -1) for v, n in zip(levels, num_anchors, strict=True)]
        values = torch.cat([level.flatten(0, 3) for level in split])
        return Predicted(values[:, 4:5], values[:, :4], values[:, 5:])

    return predicted


def heads_of(model: nn.Module) -> dict[str, Callable[[Any], Predicted]]:
    """The submodules that put out predictions, in the order of a pass -> how to read them; empty: none are known."""
    if isinstance(model, RetinaNet | FCOS):
        return {"head": _of_dense_head}
    if isinstance(model, SSD):
        return {"head": _of_ssd_head}
    if isinstance(model, FasterRCNN):  # Mask R-CNN and Keypoint R-CNN as well: their boxes
        return {"rpn.head": _of_proposal_head, REGIONS: _of_regions}
    if isinstance(model, YOLOv3):
        return {"network": _of_yolo(model)}
    return {}


def learns_by_imitation(model: nn.Module) -> bool:
    """Whether a detector is known to gain most where predictions are all that is compared, without labels.

    FCOS does; a YOLOv3-tiny lost by it what labels gained, and the others were not measured (benchmarks/LOG.md,
    2026-11-27 Imitation).
    """
    return isinstance(model, FCOS)


class PredictionTaps:
    """Keeps what a detector and its unmerged model predict in their last forward passes.

    The model runs first, the teacher after it, on the same batch: it is given the images as the model resized them,
    and in a detector with proposals the model's, so that each position stands beside its like. A pass of the teacher
    then ends behind the last head.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module):
        self.heads = heads_of(teacher) if type(model) is type(teacher) else {}
        self.own: dict[str, Any] = {}
        self.taught: dict[str, Any] = {}
        self.images: ImageList | None = None
        self.proposals: list[Tensor] | None = None
        self.runs_whole = False  # whether the teacher's pass is one of its own: as it would detect
        self.hooks = contextlib.ExitStack()
        if not self.heads:
            return
        last = list(self.heads)[-1]

        def keep_own(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
            self.own[name] = output

        def keep_taught(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
            if name != REGIONS or not self.runs_whole:
                self.taught[name] = output
            if name == last and not self.runs_whole:
                raise EndForward

        self._hook(model, list(self.heads), keep_own)
        self._hook(teacher, list(self.heads), keep_taught)
        self._share_images(model, teacher)
        if PROPOSALS in dict(teacher.named_modules()):
            self._share_proposals(model, teacher)

    def _hook(self, model: nn.Module, names: Sequence[str], hook: Callable, before: bool = False) -> None:
        self.hooks.enter_context(hooked(model, names, hook, before=before))

    def _share_images(self, model: nn.Module, teacher: nn.Module) -> None:
        if TRANSFORM not in dict(teacher.named_children()):
            return

        def keep(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
            self.images = output[0]

        def give(name: str, module: nn.Module, inputs: tuple, output: Any) -> Any:
            return None if self.runs_whole or self.images is None else (self.images, output[1])

        self._hook(model, [TRANSFORM], keep)
        self._hook(teacher, [TRANSFORM], give)

    def _share_proposals(self, model: nn.Module, teacher: nn.Module) -> None:
        def keep(name: str, module: nn.Module, inputs: tuple) -> None:
            self.proposals = inputs[1]

        def give(name: str, module: nn.Module, inputs: tuple) -> Any:
            replaced = not self.runs_whole and self.proposals is not None
            return (inputs[0], self.proposals, *inputs[2:]) if replaced else None

        self._hook(model, [PROPOSALS], keep, before=True)
        self._hook(teacher, [PROPOSALS], give, before=True)

    @contextlib.contextmanager
    def of_whole_pass(self) -> Iterator[None]:
        """Within, the teacher's pass does not end early, and has images and proposals of its own."""
        self.runs_whole = True
        try:
            yield
        finally:
            self.runs_whole = False

    @property
    def needs_a_pass(self) -> bool:
        """Whether what the teacher has put out on images of its own cannot stand beside the model's, as where images
        are resized at random."""
        return bool(self.heads) and self.loss() is None

    def loss(self) -> Tensor | None:
        """The sum of the heads' differences, of those that both have put out alike; None if there is none."""
        parts = []
        for name, read in self.heads.items():
            if name in self.own and name in self.taught:
                own, taught = read(self.own[name]), read(self.taught[name])
                if own.scores.shape == taught.scores.shape and own.boxes.shape == taught.boxes.shape:
                    parts.append(difference(own, taught))
        return torch.stack(parts).sum() if parts else None

    def clear(self) -> None:
        self.own, self.taught, self.images, self.proposals = {}, {}, None, None

    def remove(self) -> None:
        self.hooks.close()


def difference(own: Predicted, taught: Predicted) -> Tensor:
    """Divergence of class probabilities plus absolute difference of boxes, per object that the teacher sees; 0-dim.

    Scores are compared everywhere, boxes and the rest in proportion to how certain the teacher is of an object there;
    all is divided by the sum of these certainties, the expected number of positions with an object (at least 1).
    """
    boxes, taught_boxes = own.boxes, taught.boxes
    if taught.is_softmax:
        ours, theirs = own.scores.log_softmax(1), taught.scores.log_softmax(1)
        of_scores = (theirs.exp() * (theirs - ours)).sum()
        probabilities = theirs.exp()[:, 1:]
        first = 1  # the background has boxes of its own, which mean nothing
    else:
        of_scores, probabilities, first = (
            _binary_divergence(own.scores, taught.scores).sum(),
            taught.scores.sigmoid(),
            0,
        )
    certainty, likeliest = probabilities.max(1)
    if boxes.dim() == 3:
        rows = torch.arange(len(boxes), device=boxes.device)
        boxes, taught_boxes = boxes[rows, first + likeliest], taught_boxes[rows, first + likeliest]
    of_each = (boxes - taught_boxes).abs().mean(1)
    if own.others is not None and taught.others is not None and own.others.numel():
        of_each = of_each + _binary_divergence(own.others, taught.others).sum(1)
    return (of_scores + (certainty * of_each).sum()) / certainty.sum().clamp_min(1)


def _binary_divergence(own: Tensor, taught: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the probabilities of each logit from the teacher's."""
    probability = taught.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(taught, probability, reduction="none")
    return F.binary_cross_entropy_with_logits(own, probability, reduction="none") - entropy
