"""Why a model may be less accurate here than its `unmerged_acc` says: what commonly causes it, measured on val.

Everything is measured with the images as the task's own loader gives them, so that what differs from the user's own
evaluation shows: the numbering of classes, the orientation of images, inputs that are not normalised, the eval method.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import scipy  # which imports scipy.optimize, half a second, when it is first used
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from gemel.datasets.loaders import batch_size_of
from gemel.datasets.records import is_turned
from gemel.forward.modes import device_of, evaluation_mode, logits_of
from gemel.workload import CLASSIFICATION, Task

MAX_IMAGES = 256
MIN_GAIN = 0.05  # of the share that is right: less is no explanation
MIN_OVERLAP, MIN_SCORE = 0.5, 0.05  # of a detection that counts as having found an object
MAX_CLASSES = 6  # that are named
NOTHING = -1  # what a detector says of an object that it does not find


class Answers(NamedTuple):
    """What the model says of a sample of val. pairs: (label, what the model says) of every image or object."""

    pairs: list[tuple[int, int]]
    low: float  # the lowest and the highest value of the inputs
    high: float

    @property
    def share_right(self) -> float:
        return sum(label == said for label, said in self.pairs) / max(1, len(self.pairs))


def explanations(task: Task, val: DataLoader, measured: float) -> list[str]:
    """What was found, a clause each; measured: what the eval method returned. Raises nothing."""
    try:
        return list(_explanations(task, val, measured))
    except Exception as error:  # the model or the loader may raise anything; the accuracy alone is reported then
        return [f"looking for the cause failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]


def _explanations(task: Task, val: DataLoader, measured: float) -> Iterator[str]:
    dataset: Any = val.dataset
    count = min(MAX_IMAGES, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    answers = _answers(task, val, dataset, chosen)
    right = answers.share_right
    what = "images" if task.kind == CLASSIFICATION else "objects"
    yield f"on {len(answers.pairs)} {what} of val {right:.3f} get the right class"
    if task.kind == CLASSIFICATION and count == len(dataset) and abs(right - measured) > MIN_GAIN:
        yield f"the eval method, which returns {measured:.3f}, counts otherwise or changes the images"
    yield _shares(answers.pairs, task.kind)
    yield from _other_numbering(answers)
    yield _looks_of(answers.low, answers.high)
    if any(is_turned(dataset.samples[index][0]) for index in chosen):
        other = copy.copy(dataset)
        other.cache, other.turned = None, not dataset.turned
        there = _answers(task, val, other, chosen).share_right
        yield f"with exif_orientation {other.turned} it would be {there:.3f}"


def _answers(task: Task, val: DataLoader, dataset: Any, chosen: Sequence[int]) -> Answers:
    """Runs the task's model over some samples, an image at a time for detectors."""
    pairs: list[tuple[int, int]] = []
    low, high = float("inf"), float("-inf")
    size = batch_size_of(val) if task.kind == CLASSIFICATION else 1
    device = device_of(task.model)
    with evaluation_mode(task.model):
        for start in range(0, len(chosen), size):
            samples = [dataset[index] for index in chosen[start : start + size]]
            images = [image.to(device) for image, _ in samples]
            low, high = min(low, *(float(i.min()) for i in images)), max(high, *(float(i.max()) for i in images))
            if task.kind == CLASSIFICATION:
                said = logits_of(task.model(torch.stack(images))).argmax(1).tolist()
                pairs += zip((int(label) for _, label in samples), said, strict=True)
            else:
                pairs += _of_objects(task.model, images, samples[0][1])
    return Answers(pairs, low, high)


def _of_objects(model: nn.Module, images: list[Tensor], target: dict) -> Iterator[tuple[int, int]]:
    """(label, label of the best detection that overlaps it, else NOTHING) of every object of one image."""
    found = {key: value.cpu() for key, value in model(images)[0].items() if key in ("boxes", "labels", "scores")}
    sure = found["scores"] >= MIN_SCORE
    boxes, labels, scores = found["boxes"][sure], found["labels"][sure], found["scores"][sure]
    for box, label in zip(target["boxes"].as_subclass(Tensor), target["labels"].tolist(), strict=True):
        overlaps = box_iou(box[None], boxes)[0] >= MIN_OVERLAP if len(boxes) else torch.zeros(0, dtype=torch.bool)
        best = int(labels[overlaps][scores[overlaps].argmax()]) if overlaps.any() else NOTHING
        yield label, best


# ---- what it looks like -------------------------------------------------------------------------------------


def _shares(pairs: Sequence[tuple[int, int]], kind: str) -> str:
    """How often each class stands in the dataset, and how often the model says it."""
    labels, said = Counter(label for label, _ in pairs), Counter(answer for _, answer in pairs)
    missed = said.pop(NOTHING, 0)
    text = f"the dataset has the classes {_listed(labels)}, and the model says {_listed(said)}"
    if kind == CLASSIFICATION:
        return text
    return f"{text}; over {missed / max(1, len(pairs)):.0%} of the objects it finds nothing"


def _listed(counts: Counter) -> str:
    total = max(1, counts.total())
    named = [f"{label} ({count / total:.0%})" for label, count in counts.most_common(MAX_CLASSES)]
    return ", ".join([*named, *(["..."] if len(counts) > MAX_CLASSES else [])]) or "none"


def _other_numbering(answers: Answers) -> Iterator[str]:
    """Whether the model is right with its classes numbered otherwise than the dataset's."""
    pairs = [pair for pair in answers.pairs if pair[1] != NOTHING]
    labels, said = sorted({label for label, _ in pairs}), sorted({answer for _, answer in pairs})
    if not pairs:
        return
    counts = Counter(pairs)
    table = [[counts[label, answer] for answer in said] for label in labels]
    rows, columns = scipy.optimize.linear_sum_assignment(table, maximize=True)
    gained = sum(table[row][column] for row, column in zip(rows, columns, strict=True)) / len(answers.pairs)
    changed = [(labels[r], said[c]) for r, c in zip(rows, columns, strict=True) if labels[r] != said[c]]
    if gained < answers.share_right + MIN_GAIN or not changed:
        return
    named = ", ".join(f"{label} as {answer}" for label, answer in itertools.islice(changed, MAX_CLASSES))
    yield (
        f"with its classes in another order it would be {gained:.3f} (it says class {named}): see class_ids, "
        "background_class and the names of the class folders"
    )


def _looks_of(low: float, high: float) -> str:
    """What the range of the inputs tells of how they were normalised."""
    values = f"inputs lie between {low:.3g} and {high:.3g}"
    if low >= 0 and high <= 1:
        return f"{values}: not normalised by mean and standard deviation (right for detectors that do so themselves)"
    if low >= 0 and high > 20:
        return f"{values}: as pixels of 8 bits, neither divided by 255 nor normalised"
    return f"{values}: as normalised images do"
