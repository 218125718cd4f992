"""Losses of one batch of one task, as a dict of named scalars."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemel.forward.autocast import IN_FLOAT32, Autocast
from gemel.training.distillation import Teacher
from gemel.workload import CLASSIFICATION, Task

# Weights of the auxiliary classifiers, as in torchvision's references: Inception v3 0.4, GoogLeNet 0.3 each.
AUXILIARY_WEIGHTS = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3}


def task_losses(
    task: Task,
    batch: tuple[Any, Any],
    device: torch.device,
    teacher: Teacher | None = None,
    autocast: Autocast = IN_FLOAT32,
    is_part: bool = False,
) -> dict[str, Tensor]:
    """Losses of the task's model, in train mode, on one batch of its train loader; each entry a scalar with gradient.

    Classification: cross-entropy of (Tensor[N,3,H,W], Tensor[N]). Detection: what the detector itself returns for
    (list of Tensor[3,H,W], list of targets). With a teacher, its losses as well. A task without labels needs one: its
    losses are all there is for a classifier, and what it detects is the targets of a detector. autocast: in which the
    model and its teacher run; losses are computed in float32. is_part: whether the batch is this rank's part of one
    that several ranks compute: they call this together, and the mean of their losses, weighted by numbers of images, is
    that of the whole batch, except where a detector divides by numbers of objects. Raises ValueError if the model
    returns something else.
    """
    images, targets = batch
    if task.kind == CLASSIFICATION:
        images = images.to(device, non_blocking=True)
        with autocast.within(task.model):
            output = task.model(images)
        labels = targets.to(device, non_blocking=True)
        losses = _classification_losses(task, output, labels) if task.labels else {}
    else:
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{key: _moved(value, device) for key, value in target.items()} for target in targets]
        if not task.labels:
            assert teacher is not None, f"{task.name}: a task without labels needs a teacher"
            targets = teacher.detections(images, autocast)
        with autocast.within(task.model):
            output = task.model(images, targets)
        losses = _detection_losses(task, output)
    split_task = task.name if is_part else None
    return losses if teacher is None else {**losses, **teacher.losses(images, output, autocast, split_task)}


def _classification_losses(task: Task, output: Any, labels: Tensor) -> dict[str, Tensor]:
    if torch.is_tensor(output):
        return {"cross_entropy": F.cross_entropy(output.float(), labels)}
    if not hasattr(output, "logits"):
        got = type(output).__name__
        raise ValueError(f"{task.name}: model: got {got} from a classifier in training; allowed: Tensor[N, classes]")
    losses = {"cross_entropy": F.cross_entropy(output.logits.float(), labels)}
    for name, weight in AUXILIARY_WEIGHTS.items():
        if (logits := getattr(output, name, None)) is not None:
            losses[name] = weight * F.cross_entropy(logits.float(), labels)
    return losses


def _detection_losses(task: Task, output: Any) -> dict[str, Tensor]:
    if not isinstance(output, dict):
        got = type(output).__name__
        raise ValueError(f"{task.name}: model: got {got} from a detector in training; allowed: a dict of losses")
    return output


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value
