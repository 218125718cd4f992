"""The losses of a YOLOv3: assignment of anchors to objects, and losses of boxes, objectness and classes.

Redmon and Farhadi, "YOLOv3", 2018, section 2: an object is assigned to the cell that holds its centre and to the anchor
of the most similar shape; the objectness of other anchors is trained towards 0, except where the predicted box overlaps
an object by more than half; objectness and classes have binary cross-entropy losses. Two well-known changes make
training faster: an object is assigned to further anchors of a similar shape (Bochkovskiy et al., "YOLOv4", 2020,
section 3.4; the threshold is that of its cfg file), and the loss of a box is its complete IoU loss (Zheng et al.,
"Distance-IoU Loss", AAAI 2020) instead of squared differences of coordinates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, complete_box_iou_loss

from model_architectures.yolo_boxes import Level

MATCH_IOU = 0.213  # of the shapes of an object and an anchor, above which they are assigned
IGNORE_IOU = 0.5  # of a predicted box and an object, above which its objectness has no loss
BOX_WEIGHT = 2.0


def yolo_losses(levels: Sequence[Level], boxes: Sequence[Tensor], classes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Named scalar losses with gradient: sums over the batch, divided by the number of (object, anchor) assignments.

    levels: of a batch of images. boxes, classes: per image XYXY [n, 4] in pixels of the network's input, and int64 [n]
    from 0; n may be 0. The divisor is at least the number of images, which bounds the loss of a batch without objects.
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
    """Indices (object, anchor) of every assignment: the anchor of the most similar shape, and all above MATCH_IOU.

    boxes: XYXY [n, 4]; anchors: width and height [k, 2] of all levels. IoU of shapes: as if their centres were equal.
    """
    shapes = boxes[:, 2:] - boxes[:, :2]
    common = torch.minimum(shapes[:, None], anchors).prod(-1)
    iou = common / (shapes.prod(-1)[:, None] + anchors.prod(-1) - common)
    assigned = iou > MATCH_IOU
    assigned[torch.arange(len(boxes), device=boxes.device), iou.argmax(1)] = True
    objects, indices = assigned.nonzero(as_tuple=True)
    return objects, indices


def _cells(boxes: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Row and column of the cell that holds the centre of each box."""
    rows, columns = level.objectness.shape[2:]
    centre = ((boxes[:, :2] + boxes[:, 2:]) / (2 * level.stride)).long()
    return centre[:, 1].clamp(0, rows - 1), centre[:, 0].clamp(0, columns - 1)


def _level_losses(
    level: Level, places: tuple[Tensor, ...], boxes: Tensor, labels: Tensor, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed losses of boxes, objectness and classes; places: index tensors of the anchors assigned to `boxes`."""
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
