"""The models of the suite: built, trained, measured, and read back as entries of a task dictionary.

DIR/models/<task>.pt is the state dict of a trained model, <task>.json says what it is, its accuracy on val among it;
the workload files of the suite need nothing else.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dataset_manager
from benchmarks.one_run import write_json
from benchmarks.suite_datasets import Sources, dataset_digest, kind_of
from benchmarks.suite_workloads import MOBILENET, Suite
from eval_methods import classification_eval, frcnn_eval
from gemel.environment.seeds import seeded
from gemel.evaluation.eval_method import evaluate
from gemel.forward.modes import to_channels_last
from gemel.sample_workload.artifacts import replacement_of
from gemel.training.losses import task_losses
from gemel.workload import CLASSIFICATION, DETECTION, Task, read_workload
from model_architectures import build, load_weights
from transforms import classification_transforms, detection_transforms

RECIPE, SEED = 1, 0  # increase RECIPE when what is trained for equal entries of the suite changes
BATCH_SIZES = {CLASSIFICATION: 16, DETECTION: 4}
MAX_GRADIENT = 5.0  # norm
LIGHT: dict[str, Any] = {"scale": (0.8, 1.0), "jitter": 0.1}  # augmentation; with more, seconds of training teach less


class PlainCNN(nn.Module):
    """A classifier without normalisation layers, as VGG: six convolutions, two linear layers. Images of 48 px."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
            if index in (0, 1, 3, 5):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3))
        self.hidden = nn.Linear(8 * width * 9, 8 * width)
        self.output = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        return self.output(torch.relu(self.hidden(torch.flatten(self.features(images), 1))))


OWN_BUILDERS = {"plain_cnn": PlainCNN}  # not in the registry: a user's own class


# ---- what is on disk ------------------------------------------------------------------------------------


def weights_file(root: Path, name: str) -> Path:
    """The state dict of a trained model."""
    return root / "models" / f"{name}.pt"


def record_file(root: Path, name: str) -> Path:
    """What the model is; written after the weights."""
    return root / "models" / f"{name}.json"


def model_digest(suite: Suite, name: str) -> str:
    """A digest of everything in the suite that the trained model depends on, its ancestors among it."""
    model = suite.models[name]
    parent = model_digest(suite, model.parent) if model.parent and model.parent in suite.models else model.parent
    said = (RECIPE, SEED, name, model, dataset_digest(suite, model.dataset), parent)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def is_trained(root: Path, suite: Suite, name: str) -> bool:
    """Whether the model is complete and of this suite."""
    record = record_file(root, name)
    return record.is_file() and json.loads(record.read_text())["recipe"] == model_digest(suite, name)


def entry(root: Path, name: str, tolerance: float) -> dict[str, Any]:
    """The entry of a trained model in a task dictionary."""
    record = json.loads(record_file(root, name).read_text())
    model = load_weights(new_model(record), weights_file(root, name))
    return {**_entry(record, model, record["unmerged_acc"]), "tolerance": tolerance}


def new_model(record: dict[str, Any]) -> nn.Module:
    """The model of a record (`_record`), with random weights."""
    builder, kwargs = record["builder"], record["kwargs"]
    num_classes = len(record["classes"]) + (record["task"] != CLASSIFICATION)  # a detector counts the background
    if builder in OWN_BUILDERS:
        return OWN_BUILDERS[builder](num_classes, **kwargs)
    return build(builder, num_classes, **kwargs)


def _entry(record: dict[str, Any], model: nn.Module, accuracy: float) -> dict[str, Any]:
    of_classes = record["task"] == CLASSIFICATION
    size = record["size"]
    transforms = classification_transforms(size, **LIGHT) if of_classes else detection_transforms(size)
    return {
        "model": model,
        "task": record["task"],
        "eval_method": classification_eval if of_classes else frcnn_eval,
        "transforms": transforms,
        "unmerged_acc": accuracy,
    }


def _record(suite: Suite, name: str) -> dict[str, Any]:
    """What the file beside the weights says, but for what was measured."""
    model = suite.models[name]
    said = {key: getattr(model, key) for key in ("builder", "kwargs", "size", "dataset", "parent")}
    classes = list(suite.datasets[model.dataset].classes)
    return {**said, "task": kind_of(suite, model.dataset), "classes": classes, "recipe": model_digest(suite, name)}


# ---- training -------------------------------------------------------------------------------------------


def train(root: Path, suite: Suite, name: str, sources: Sources) -> dict[str, Any]:
    """Trains a model from its trained ancestor, measures it on val, writes it; returns its record.

    Adds `unmerged_acc` and the `cpu_seconds` of training to the record.
    """
    model_of, record, began = suite.models[name], _record(suite, name), time.process_time()
    with seeded(SEED, "suite", name):
        model = new_model(record)
        if model_of.parent is not None:
            _inherit(model, _ancestor(root, model_of.parent, sources))
        tasks, problems = read_workload({name: _entry(record, model, 1.0)})
        assert not problems, problems
        roots, cpu, size = [root / "datasets"], torch.device("cpu"), BATCH_SIZES[tasks[name].kind]
        to_channels_last(model, cpu)
        data = dataset_manager.open_task(tasks[name], roots, device=cpu, seed=SEED, batch_size=size)
        _fit(tasks[name], data.train, model_of.epochs, model_of.learning_rate)
        record["unmerged_acc"] = evaluate(tasks[name], data.val)
    record["cpu_seconds"] = time.process_time() - began
    with replacement_of(weights_file(root, name)) as unfinished, unfinished.open("wb") as file:
        torch.save({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    write_json(record_file(root, name), record)
    return record


def _ancestor(root: Path, parent: str, sources: Sources) -> dict[str, Tensor]:
    path = sources[MOBILENET] if parent == MOBILENET else weights_file(root, parent)
    assert path is not None, "suite_prepare leaves out what has no source"
    return torch.load(path, weights_only=True)


def _inherit(model: nn.Module, ancestor: dict[str, Tensor]) -> None:
    """Copies the ancestor's tensors of equal name and shape; into a detector's backbone those of a classifier."""
    own, found = model.state_dict(), 0
    for key, value in ancestor.items():
        for name in (key, f"backbone.body.{key}"):
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
                found += 1
    assert found, "an ancestor without a tensor in common"


def _fit(task: Task, loader: DataLoader, epochs: int, learning_rate: float) -> None:
    """Trains with AdamW and a one-cycle schedule of the learning rate; a last batch of one image is left out."""
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(task.model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    task.model.train()
    for images, targets in _batches(loader, epochs):
        optimizer.zero_grad()
        losses = task_losses(task, (images, targets), torch.device("cpu"))
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), MAX_GRADIENT)
        optimizer.step()
        schedule.step()


def _batches(loader: DataLoader, epochs: int) -> Iterator[Any]:
    for _ in range(epochs):
        yield from (batch for batch in loader if len(batch[1]) > 1)
