"""The losses of a YOLOv3: which anchor answers for which object, and how far off the outputs are.

Redmon and Farhadi, "YOLOv3", 2018, section 2: the cell that holds an object's centre answers for it, with the anchor
whose shape fits best; other anchors learn that there is no object, but for those whose box overlaps one by more than
half; objects and classes are judged by binary cross-entropy. Two well-known changes, since both train quicker:
further anchors answer as well if their shape fits (Bochkovskiy et al., "YOLOv4", 2020, section 3.4: several anchors for
one object; the threshold is that of its cfg file), and boxes are judged by their complete IoU (Zheng et al.,
"Distance-IoU Loss", AAAI 2020) instead of squared differences of coordinates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, complete_box_iou_loss

from model_architectures.yolo_boxes import Level

MATCH_IOU = 0.213  # of an object's and an anchor's shape, from which on the anchor answers for the object
IGNORE_IOU = 0.5  # of a predicted box and an object, above which it is no mistake to see an object
BOX_WEIGHT = 2.0


def yolo_losses(levels: Sequence[Level], boxes: Sequence[Tensor], classes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Named scalars with gradient, each a sum over the batch divided by the number of anchors that answer for objects.

    levels: of a batch of images. boxes, classes: per image XYXY [n, 4] in pixels of the network's input, and int64 [n]
    from 0; n may be 0. Divided by the number of images if that is larger: a batch without objects stays mild.
    """
    image = torch.cat([torch.full((len(own),), i, device=own.device) for i, own in enumerate(boxes)])
    objects, labels = torch.cat(list(boxes)), torch.cat(list(classes))
    owner, anchor = match(objects, torch.cat([level.anchors for level in levels]))
    sums = []
    first = 0
    for level in levels:
        here = (anchor >= first) & (anchor < first + len(level.anchors))
        which = owner[here]
        places = (image[which], anchor[here] - first, *_cells(objects[which], level))
        sums.append(_level_losses(level, places, objects[which], labels[which], _near_objects(level, boxes)))
        first += len(level.anchors)
    box_loss, object_loss, class_loss = (torch.stack(losses).sum() for losses in zip(*sums, strict=True))
    count = max(len(owner), len(boxes))
    return {
        "loss_box_reg": BOX_WEIGHT * box_loss / count,
        "loss_objectness": object_loss / count,
        "loss_classifier": class_loss / count,
    }


def match(boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """(object, anchor) of every pair where the anchor answers for the object: the best by shape, and good ones.

    boxes: XYXY [n, 4]; anchors: width and height [k, 2] of all levels. Shapes are compared as if their centres met.
    """
    shapes = boxes[:, 2:] - boxes[:, :2]
    common = torch.minimum(shapes[:, None], anchors).prod(-1)
    iou = common / (shapes.prod(-1)[:, None] + anchors.prod(-1) - common)
    answers = iou > MATCH_IOU
    answers[torch.arange(len(boxes), device=boxes.device), iou.argmax(1)] = True
    return answers.nonzero(as_tuple=True)


def _cells(boxes: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Row and column of the cell that holds the centre of each box."""
    rows, columns = level.objectness.shape[2:]
    centre = ((boxes[:, :2] + boxes[:, 2:]) / (2 * level.stride)).long()
    return centre[:, 1].clamp(0, rows - 1), centre[:, 0].clamp(0, columns - 1)


def _level_losses(
    level: Level, places: tuple[Tensor, ...], boxes: Tensor, labels: Tensor, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over boxes, objectness and classes; places: index tensors of the anchors that answer for `boxes`."""
    wanted, weight = torch.zeros_like(level.objectness), (~near).to(level.objectness)
    wanted[places], weight[places] = 1.0, 1.0
    named = F.one_hot(labels, level.classes.shape[-1]).to(level.classes)
    return (
        complete_box_iou_loss(level.boxes[places].float(), boxes, reduction="sum"),
        F.binary_cross_entropy_with_logits(level.objectness, wanted, weight, reduction="sum"),
        F.binary_cross_entropy_with_logits(level.classes[places], named, reduction="sum"),
    )


@torch.no_grad()
def _near_objects(level: Level, boxes: Sequence[Tensor]) -> Tensor:
    """[N, anchors, rows, columns]: whether a predicted box overlaps an object by more than IGNORE_IOU."""
    near = torch.zeros_like(level.objectness, dtype=torch.bool)
    for found, own, image in zip(level.boxes.float(), boxes, near, strict=True):
        if len(own):
            image.copy_((box_iou(found.flatten(0, 2), own).amax(1) > IGNORE_IOU).view_as(image))
    return near
