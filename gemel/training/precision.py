"""In which precision the training steps of each task compute: chosen by measuring a few steps of each architecture.

Whatever is chosen, weights, losses, boxes and the optimizer stay in float32, and so does all that is judged: fits and
evaluation. The choice is plain data, which the manifest and the state of a round record, so that a run that goes on,
and every rank, computes as before. Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gemel.datasets.loaders import batch_size_of, num_samples
from gemel.environment import ranks
from gemel.environment.describe import digest
from gemel.environment.device import has_bfloat16, has_tf32, seconds_of
from gemel.environment.events import emit
from gemel.environment.failures import is_out_of_memory
from gemel.environment.seeds import seeded
from gemel.forward import AUTO, BFLOAT16, FLOAT32, TF32
from gemel.forward.autocast import IN_FLOAT32, IN_TF32, WHOLE, Autocast
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.thresholds import THRESHOLDS
from gemel.training.batches import split
from gemel.training.context import RoundContext
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.training.step import JointStep, Member
from gemel.workload import CLASSIFICATION, Task

# What of a detector computes features and raw predictions; boxes are decoded and losses computed outside of these.
PARTS = ("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "head", "network")

WITHOUT_PARTS = {FLOAT32: IN_FLOAT32, TF32: IN_TF32}

Found = dict[str, Any]  # of one task: precision, architecture, and what was measured

log = logging.getLogger(__name__)


def autocasts_of(
    members: Mapping[str, Member], training: JointStep, context: RoundContext, num_steps: int
) -> dict[str, Autocast]:
    """In what each task of a round computes its steps; what is not known yet is decided and added to the context's.

    Call it when a stage has begun. A round of few steps takes what is known, and else float32: measuring takes steps.
    """
    wanted, found = training.options.precision, context.precision

    def batch_of(name: str) -> tuple:
        return split(first_batch(members[name].data.train), members[name].num_parts)[0]

    def measure(task: Task, batch: tuple) -> Found:
        return measured(task, batch, context.device, training.teachers.get(task.name), context.seed)

    if wanted != AUTO or num_steps >= THRESHOLDS.precision.least_steps:
        decide(wanted, found, {name: member.task for name, member in members.items()}, batch_of, measure)
    return {name: autocast_of(member.task, found) for name, member in members.items()}


def first_batch(train: DataLoader) -> tuple:
    """The first samples of a train loader, as many as a batch has."""
    count = min(batch_size_of(train), num_samples(train))
    return train.collate_fn([train.dataset[i] for i in range(count)])


def autocast_of(task: Task, found: Mapping[str, Found]) -> Autocast:
    """In what the task's training steps compute; found: what was decided, by task."""
    chosen = found.get(task.name, {}).get("precision", FLOAT32)
    return Autocast(torch.bfloat16, parts_of(task)) if chosen == BFLOAT16 else WITHOUT_PARTS[chosen]


def parts_of(task: Task) -> tuple[str, ...]:
    """The submodules that may compute in 16 bits; none of a detector whose parts are not known."""
    if task.kind == CLASSIFICATION:
        return (WHOLE,)
    names = {name for name, _ in task.model.named_modules()}
    return tuple(part for part in PARTS if part in names)


def decide(
    wanted: str,
    found: dict[str, Found],
    tasks: Mapping[str, Task],
    batch_of: Callable[[str], tuple],
    measure: Callable[[Task, tuple], Found],
) -> None:
    """Adds to `found` what is not decided yet of these tasks; all ranks call it, and come to the same.

    wanted: of TrainingOptions.precision. batch_of: the images and targets of a step of a task. measure: of a task and
    its batch; called once per architecture and size of images.
    """
    mine: dict[str, Found] = {}
    for name in ranks.mine(name for name in tasks if name not in found):
        if wanted != AUTO:
            mine[name] = _as_wanted(wanted, tasks[name])
            continue
        batch = batch_of(name)
        key = architecture_of(tasks[name].model, batch)
        known = (one for one in [*found.values(), *mine.values()] if one.get("architecture") == key)
        mine[name] = next(known, {}) or {**measure(tasks[name], batch), "architecture": key}
    for part in ranks.gathered(mine):
        for name, one in part.items():  # two ranks may have measured the same
            known = (other for other in found.values() if other.get("architecture") == one.get("architecture", ""))
            found[name] = next(known, one)


def _as_wanted(wanted: str, task: Task) -> Found:
    if wanted == FLOAT32 or parts_of(task):
        return {"precision": wanted}
    log.warning("%s: trains in float32: it is not known which parts of it can compute in %s", task.name, wanted)
    return {"precision": FLOAT32}


def architecture_of(model: nn.Module, batch: tuple) -> str:
    """A digest of what decides how fast a step is: the model's modules and their settings, and the images' sizes."""
    modules = [f"{name} {type(module).__qualname__} {module.extra_repr()}" for name, module in model.named_modules()]
    return digest([modules, [list(image.shape) for image in batch[0]]])


def measured(task: Task, batch: tuple, device: torch.device, teacher: Teacher | None, seed: int) -> Found:
    """The precision for a task, and what was measured: speedup, loss_difference (relative). The model stays as it is.

    bfloat16, or on CUDA TF32, if forward and backward pass are faster than in float32 by a factor, and loss and
    gradients agree with those in float32; of several the fastest. Where it is clear that nothing is to be gained it
    takes a step for each, beside one in float32; else four more.
    """
    ways = {}
    if has_bfloat16(device) and (parts := parts_of(task)):
        ways[BFLOAT16] = Autocast(torch.bfloat16, parts)
    if has_tf32(device):
        ways[TF32] = IN_TF32
    if not ways:
        return {"precision": FLOAT32}
    emit("doing", what=f"measuring training steps in {' and '.join(ways)}: {task.name}")
    snapshot = take_snapshot(task.model)
    try:
        return _compared(Step(task, batch, device, teacher, seed), ways)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"precision": FLOAT32}
    finally:
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.clear()


class Step:
    """Forward and backward pass of one task on one batch, again and again, with the same random numbers."""

    def __init__(self, task: Task, batch: tuple, device: torch.device, teacher: Teacher | None, seed: int):
        self.task, self.batch, self.device, self.teacher, self.seed = task, batch, device, teacher, seed
        self.loss = torch.zeros(())

    def seconds(self, autocast: Autocast) -> float:
        """Seconds of the device's own time."""
        self.task.model.zero_grad(set_to_none=True)
        with seeded(self.seed, "precision", self.task.name):
            return seconds_of(lambda: self._run(autocast), self.device)

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.task.model.parameters() if p.grad is not None]

    def _run(self, autocast: Autocast) -> None:
        with autocast.whole_step():
            losses = task_losses(self.task, self.batch, self.device, self.teacher, autocast)
            loss = torch.as_tensor(sum(losses.values()))
            if loss.requires_grad:
                loss.backward()
        self.loss = loss.detach()


def _compared(step: Step, ways: Mapping[str, Autocast]) -> Found:
    """The fastest way that is fast enough and agrees with float32; else float32, with the figures of the first way."""
    limits = THRESHOLDS.precision
    exact_seconds = step.seconds(IN_FLOAT32)
    if step.device.type == "cpu" and exact_seconds < limits.least_seconds:
        return {"precision": FLOAT32}
    exact = exact_seconds, float(step.loss), step.gradients()
    measured = {way: _beside(step, autocast, exact) for way, autocast in ways.items()}
    taken = {
        way: one["speedup"] for way, one in measured.items() if one.pop("agrees") and one["speedup"] >= limits.speedup
    }
    if not taken:
        return {"precision": FLOAT32, **next(iter(measured.values()))}
    fastest = max(taken, key=taken.__getitem__)
    return {"precision": fastest, **measured[fastest]}


def _beside(step: Step, autocast: Autocast, exact: tuple[float, float, list[Tensor]]) -> Found:
    """agrees, speedup and loss_difference of a way, the first alone if it fails.

    exact: seconds, loss and gradients in float32.
    """
    limits = THRESHOLDS.precision
    exact_seconds, exact_loss, exact_gradients = exact
    try:
        seconds = step.seconds(autocast)
    except Exception as error:  # a user's model may raise anything
        if is_out_of_memory(error):
            raise
        way = str(autocast.dtype).removeprefix("torch.")
        log.warning("%s: no training step in %s, which fails: %s", step.task.name, way, " ".join(str(error).split()))
        return {"agrees": False}
    loss = float(step.loss)
    difference = abs(loss - exact_loss) / max(abs(exact_loss), limits.least_loss)
    agrees = agree((exact_loss, exact_gradients), (loss, step.gradients()), limits.loss_difference, limits.cosine)
    speedup = exact_seconds / seconds
    if agrees and speedup * limits.speedup >= 1:  # the first step may be slower than those behind it
        pairs = [(step.seconds(IN_FLOAT32), step.seconds(autocast)) for _ in range(2)]
        speedup = min(exact for exact, _ in pairs) / min(short for _, short in pairs)
    return {"agrees": agrees, "speedup": round(speedup, 3), "loss_difference": round(difference, 5)}


def agree(
    exact: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]], difference: float, cosine: float
) -> bool:
    """Whether loss and gradients differ little: the loss by at most this share, the gradients' cosine at least this."""
    least = max(abs(exact[0]), THRESHOLDS.precision.least_loss)
    return abs(other[0] - exact[0]) / least <= difference and _cosine(exact[1], other[1]) >= cosine


def _cosine(one: list[Tensor], other: list[Tensor]) -> float:
    """Of the angle between two lists of gradients, each taken as one vector; 1 where both are empty."""

    def product(a: list[Tensor], b: list[Tensor]) -> float:
        return float(sum(_dots(a, b), torch.zeros((), dtype=torch.float64)))

    lengths = (product(one, one) * product(other, other)) ** 0.5
    return product(one, other) / lengths if lengths else 1.0


def _dots(a: list[Tensor], b: list[Tensor]) -> Iterator[Tensor]:
    return ((x.flatten().float() @ y.flatten().float()).double().cpu() for x, y in zip(a, b, strict=True))
