"""What is checked of a workload before anything is trained or written, beside the dictionary and the datasets."""

import itertools
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.utils.data import DataLoader

from gemel.datasets.folders import SampleError
from gemel.datasets.loaders import TaskData, batch_size_of, num_samples
from gemel.datasets.records import header_size
from gemel.environment import ranks
from gemel.environment.failures import is_out_of_memory
from gemel.environment.seeds import seeded
from gemel.forward import BFLOAT16
from gemel.forward.autocast import IN_FLOAT32, Autocast
from gemel.options import MergeOptions
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.training.precision import parts_of
from gemel.trials.state import MergeState
from gemel.workload import DETECTION, Problem, Task
from model_architectures import num_classes_of

FEWEST = 2  # images in a pass: batch normalisation needs several
MAX_SIZES = 256  # headers that are read of a split, to find the extreme sizes
log = logging.getLogger(__name__)

ALLOWED = "a model that is trained as torchvision's are: logits, or a dict of losses from (images, targets)"


def training_problems(
    tasks: Mapping[str, Task], data: Mapping[str, TaskData], state: MergeState, options: MergeOptions
) -> list[Problem]:
    """What keeps a task from being trained: losses and gradients are computed as a step of training computes them.

    On images of train that cover its sizes and its classes (`telling_samples`), in float32, and in bfloat16 where steps
    shall compute in that. Models stay as they are, but for the layout of their weights: it becomes the usual one where
    a model cannot be trained channels-last (layout.py). Every rank tries its own tasks; all get all problems.
    """
    problems = _problems_of_all(tasks, data, state, options)
    if problems and state.channels_last:
        state.use_layout(False)
        problems = _problems_of_all(tasks, data, state, options)
        if not problems:
            log.info("models cannot be trained channels-last; all keep the usual layout")
    return problems


def _problems_of_all(
    tasks: Mapping[str, Task], data: Mapping[str, TaskData], state: MergeState, options: MergeOptions
) -> list[Problem]:
    own = {name: tasks[name] for name in ranks.mine(tasks)}
    found = ranks.gathered([list(problem) for problem in _problems_of(own, data, state, options)])
    return [Problem(*problem) for part in found for problem in part]


def _problems_of(
    tasks: Mapping[str, Task], data: Mapping[str, TaskData], state: MergeState, options: MergeOptions
) -> list[Problem]:
    problems = []
    for name, task in tasks.items():
        error = training_error(task, data[name], state.unmerged[name], options.seed)
        if error is not None and is_out_of_memory(error):  # a round comes down to single images, or is undone
            log.warning("%s: out of memory in a training pass on a few images: training may not be possible", name)
        elif error is not None:
            got = f"{type(error).__name__} in training: {' '.join(str(error).split())[:300]}"
            if isinstance(error, IndexError):
                got += _highest_label(task, data[name].train)
            problems.append(Problem(name, "model", got, ALLOWED))
        elif options.training.precision == BFLOAT16:
            autocast = Autocast(torch.bfloat16, parts_of(task))
            error = training_error(task, data[name], state.unmerged[name], options.seed, autocast=autocast)
            if error is not None and not is_out_of_memory(error):
                got = f"bfloat16, in which training fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                problems.append(Problem(name, "precision", got, "float32 or auto, which train this model in float32"))
    return problems


def training_error(
    task: Task, data: TaskData, unmerged: nn.Module, seed: int, autocast: Autocast = IN_FLOAT32
) -> Exception | None:
    """What a training pass over the task's telling samples raises; None if it works. The model stays as it is.

    autocast: in what the pass computes.
    """
    train = data.train
    snapshot = take_snapshot(task.model)
    teacher = None if task.labels else Teacher(task.model, unmerged, [])
    try:
        with seeded(seed, "trial", task.name):
            indices = telling_samples(task, train)
            size = min(batch_size_of(train), num_samples(train))
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                others = (i for i in range(num_samples(train)) if i not in part)
                part += itertools.islice(others, max(0, min(size, FEWEST) - len(part)))
                _backward(task, train, part, teacher, autocast)
    except SampleError:
        raise
    except Exception as error:  # a user's model may raise anything
        return error
    finally:
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.close()
    return None


def _backward(task: Task, train: DataLoader, indices: list[int], teacher: Teacher | None, autocast: Autocast) -> None:
    """Losses and gradients on some samples of train, in smaller batches where memory runs out."""
    task.model.train().zero_grad()  # gradients that the user left may have another memory layout
    device = next(task.model.parameters()).device
    try:
        batch = train.collate_fn([train.dataset[i] for i in indices])
        losses = task_losses(task, batch, device, teacher, autocast)
        total = sum(losses.values(), torch.zeros((), device=device))
        if not total.requires_grad:
            raise ValueError(f"the loss ({', '.join(losses) or 'no entries'}) depends on no parameter that is trained")
        total.backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(indices) < 4:  # batch normalisation needs two images
            raise
        for half in (indices[: len(indices) // 2], indices[len(indices) // 2 :]):
            _backward(task, train, half, teacher, autocast)


def telling_samples(task: Task, train: DataLoader) -> list[int]:
    """Indices of samples of train that cover what differs: the lowest and the highest class, extreme sizes, the last.

    Where the number of a detector's outputs cannot be seen, all annotations are read for that.
    """
    samples = train.dataset.samples  # type: ignore[attr-defined]
    step = -(-len(samples) // MAX_SIZES)
    sizes = {index: size for index in range(0, len(samples), step) if (size := header_size(samples[index][0]))}
    found = [0, len(samples) - 1]
    for measure in (lambda size: size[0], lambda size: size[1], lambda size: size[0] / size[1]):
        by_measure = sorted(sizes, key=lambda index: measure(sizes[index]))
        found += [by_measure[0], by_measure[-1]] if by_measure else []
    classes = dict(_classes(task, samples))
    found += [classes[label] for label in (min(classes), max(classes))] if classes else []
    return list(dict.fromkeys(found))


def _highest_label(task: Task, train: DataLoader) -> str:
    """What may be behind an index that is out of range: a label for which the model has no output."""
    highest = max((class_id for class_id, _ in _classes(task, train.dataset.samples)), default=None)  # type: ignore
    if highest is None:
        return ""
    if task.kind != DETECTION:
        return f" (the highest label in train is {highest})"
    highest += task.background_class
    return f" (the highest label in train is {highest}; state num_classes, so that labels are checked against it)"


def _classes(task: Task, samples: list) -> Iterator[tuple[int, int]]:
    """(class, index of a sample that has it)."""
    for index, (_, truth) in enumerate(samples):
        if isinstance(truth, int):
            yield truth, index
        elif task.labels and num_classes_of(task.model) is None:
            yield from ((box.class_id, index) for box in truth.read().boxes)
