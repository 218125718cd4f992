"""results/examples.json: images of val with what the unmerged and the merged model say, the worst disagreements first.

Written when a merge ends, since the report has neither data nor models. Images are shown as the model gets them.
"""

import base64
import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gemel.datasets.loaders import TaskData
from gemel.environment import ranks
from gemel.environment.events import emit
from gemel.evaluation.agreement import MIN_SCORE, Boxes, f1_of
from gemel.forward.batches import run
from gemel.forward.modes import Models, logits_of
from gemel.results_store import files
from gemel.results_store.manifest import json_bytes
from gemel.workload import CLASSIFICATION, Task

log = logging.getLogger(__name__)

LOOKED_AT = 24  # images of val per task, evenly spread
MAX_SECONDS = 20.0  # of all tasks together; each looks at one image at least
SHOWN, SHOWN_IN_ALL = 3, 24  # per task, and of all tasks together (but at least one of each)
LONGEST_SIDE, SMALL_SIDE, MANY_TASKS = 128, 72, 8  # pixels of a thumbnail, and where there are many tasks
MAX_BOXES = 20  # detections that are shown, of those with a score of at least MIN_SCORE


def examples_of(tasks: Mapping[str, Task], data: Mapping[str, TaskData], unmerged: Models, merged: Models) -> dict:
    """Per task of this rank, {"looked_at": number of images, "shown": [{"image": JPEG in base64, "width", "height",
    "disagreement": 0 to 1, ...}]}.

    Of a classifier each also has `label`, and `unmerged` and `merged` as {"class", "probability"}; of a detector these
    are lists of {"box": x1, y1, x2, y2 relative to the image, "class", "score"}. The disagreement of classifiers is
    the total variation between their probabilities, of detectors 1 - F1 of the one's boxes as truth of the other's.
    """
    count = max(1, min(SHOWN, SHOWN_IN_ALL // len(tasks)))
    side = LONGEST_SIDE if len(tasks) <= MANY_TASKS else SMALL_SIDE
    found = {}
    for name in ranks.mine(tasks):
        task = tasks[name]
        emit("doing", what=f"comparing what the models say about images of val: {name}")
        looked_at = _compare(task, data[name], unmerged[name], merged[name], MAX_SECONDS / len(tasks))
        looked_at.sort(key=lambda example: -example["disagreement"])
        shown = [{**example, **thumbnail(example["image"], side)} for example in looked_at[:count]]
        found[name] = {"looked_at": len(looked_at), "shown": shown}
    return found


def write_examples(
    results_path: Path, tasks: Mapping[str, Task], data: Mapping[str, TaskData], unmerged: Models, merged: Models
) -> None:
    """Writes the file. Where the models give what cannot be shown, a warning: the result is complete without it.

    Every rank compares its own tasks' models; all ranks call it, and the first one writes.
    """
    found, failed = {}, None
    try:
        found = examples_of(tasks, data, unmerged, merged)
        json_bytes(found)  # what cannot be written fails here, before the others are told
    except Exception as error:  # a user's model may put out anything
        failed = f"{type(error).__name__}: {error}"
    parts = ranks.gathered([found, failed])
    failures = [why for _, why in parts if why is not None]
    if failures and ranks.is_first():
        log.warning("no examples for the report: %s", failures[0])
    elif ranks.is_first():
        _write(results_path, {name: example for part, _ in parts for name, example in part.items()}, list(tasks))


def _write(results_path: Path, found: Mapping[str, Any], order: Sequence[str]) -> None:
    try:
        files.write(results_path / files.EXAMPLES, [json_bytes({name: found[name] for name in order})])
    except Exception as error:  # of the disk
        log.warning("no examples for the report: %s: %s", type(error).__name__, error)


def _compare(
    task: Task, data: TaskData, unmerged: nn.Module, merged: nn.Module, seconds: float
) -> list[dict[str, Any]]:
    dataset: Any = data.val.dataset
    indices = torch.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).long().tolist()
    examples: list[dict[str, Any]] = []
    began = time.monotonic()
    for index in (*indices[::3], *indices[1::3], *indices[2::3]):  # spread as well where the time is over early
        if examples and time.monotonic() - began > seconds:
            break
        image, target = dataset[index]
        if task.kind == CLASSIFICATION:
            said = [logits_of(run(model, image[None])).float().softmax(-1)[0].cpu() for model in (unmerged, merged)]
            example = {"label": int(target), **_classified(*said)}
        else:
            first = int(task.background_class)
            before, after = (_detected(run(model, [image]), image.shape, first) for model in (unmerged, merged))
            example = {"unmerged": before, "merged": after, "disagreement": _detections_differ(before, after)}
        examples.append({"image": image, **example})
    return examples


def _classified(unmerged: Tensor, merged: Tensor) -> dict[str, Any]:
    said = {
        key: {"class": int(p.argmax()), "probability": round(float(p.max()), 4)}
        for key, p in (("unmerged", unmerged), ("merged", merged))
    }
    return {**said, "disagreement": round(float((unmerged - merged).abs().sum() / 2), 4)}


def _detected(output: Any, shape: Sequence[int], first: int) -> list[dict[str, Any]]:
    """The detections of one image with a score of at least MIN_SCORE, class ids as in the dataset."""
    found = {key: value.detach().cpu() for key, value in output[0].items() if key in ("boxes", "scores", "labels")}
    height, width = shape[-2:]
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    chosen = [i for i in found["scores"].argsort(descending=True).tolist() if found["scores"][i] >= MIN_SCORE]
    return [
        {
            "box": [round(v, 4) for v in (found["boxes"][i].float() / size).clamp(0, 1).tolist()],
            "class": int(found["labels"][i]) - first,
            "score": round(float(found["scores"][i]), 4),
        }
        for i in chosen[:MAX_BOXES]
    ]


def _detections_differ(first: list[dict], second: list[dict]) -> float:
    """1 - F1 (gemel/evaluation/agreement.py), the best scores first."""
    one, other = (
        Boxes(torch.tensor([d["box"] for d in found]).reshape(-1, 4), [d["class"] for d in found])
        for found in (first, second)
    )
    return round(1 - f1_of(one, other), 4)


def thumbnail(image: Tensor, side: int) -> dict[str, Any]:
    """A thumbnail, brightness stretched to the full range, since how the input was normalised is not known."""
    values = image.detach().float().cpu()[:3]
    values = values.expand(3, -1, -1) if values.shape[0] == 1 else values
    low, high = float(values.min()), float(values.max())
    scaled = ((values - low) / max(high - low, 1e-6) * 255).byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(scaled)
    picture.thumbnail((side, side))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=70)
    encoded = base64.b64encode(written.getvalue()).decode()
    return {"image": encoded, "width": picture.width, "height": picture.height}
