"""What is checked of a workload before anything is trained or written, beside the dictionary and the datasets."""

from collections.abc import Mapping

import torch

from gemel.datasets.loaders import TaskData, batch_size_of, num_samples
from gemel.environment.seeds import seeded
from gemel.merging.state import MergeState
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.workload import Problem, Task


def training_problems(
    tasks: Mapping[str, Task], data: Mapping[str, TaskData], state: MergeState, seed: int
) -> list[Problem]:
    """What makes the losses of a task impossible to compute on the first images of train; models stay as they are."""
    problems = []
    allowed = "a model that is trained as torchvision's are: logits, or a dict of losses from (images, targets)"
    for name, task in tasks.items():
        train = data[name].train
        snapshot = take_snapshot(task.model)
        teacher = None if task.labels else Teacher(task.model, state.unmerged[name], [])
        try:
            with torch.no_grad(), seeded(seed, "trial", name):
                count = min(batch_size_of(train), num_samples(train))
                batch = train.collate_fn([train.dataset[i] for i in range(count)])
                task.model.train()
                task_losses(task, batch, state.device, teacher)
        except Exception as error:  # a user's model may raise anything
            got = f"{type(error).__name__} in training: {' '.join(str(error).split())[:300]}"
            problems.append(Problem(name, "model", got, allowed))
        finally:
            restore_snapshot(snapshot)
            if teacher is not None:
                teacher.close()
    return problems
