"""Which models run as torch.compile compiled them in training steps: those that are faster and compute the same."""

import logging
from collections.abc import Mapping

from torch import nn

from gemel.environment import ranks
from gemel.environment.events import emit
from gemel.environment.failures import is_out_of_memory
from gemel.forward import FLOAT32
from gemel.forward.compiled import Compiled
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.thresholds import THRESHOLDS
from gemel.training.batches import split
from gemel.training.context import RoundContext
from gemel.training.precision import Step, agree, first_batch
from gemel.training.step import JointStep, Member
from gemel.workload import CLASSIFICATION, Task

PARTS = ("backbone", "network")  # of a detector: what computes features, and all that YOLOv3 computes with weights

log = logging.getLogger(__name__)


def compiled_of(
    members: Mapping[str, Member], training: JointStep, context: RoundContext, num_steps: int
) -> dict[str, Compiled]:
    """By task of this rank, what of its model is compiled in the steps of a round; what is not known yet is measured,
    and added to the context's record of how tasks are trained. All ranks call it, when a stage has begun.

    Empty unless it is asked for, and in a round of few steps: compiling takes a minute and more for an architecture.
    """
    if not training.options.compile or num_steps < THRESHOLDS.precision.least_steps:
        return {}
    measured: dict[str, bool] = {}
    found: dict[str, Compiled] = {}
    for name in (name for name in ranks.mine(members) if not ranks.parts_of(name)):
        part = part_of(members[name].task)
        if part is None:
            continue
        is_worth_it = context.precision.get(name, {}).get("compiled")
        if is_worth_it is None:
            is_worth_it = measured[name] = pays(members[name], Compiled(part), training, context)
        if is_worth_it:
            found[name] = Compiled(part)
    for name, is_worth_it in ranks.united(measured).items():
        context.precision[name] = {"precision": FLOAT32, **context.precision.get(name, {}), "compiled": is_worth_it}
    return found


def part_of(task: Task) -> nn.Module | None:
    """A classifier as a whole; of a detector the part whose inputs and outputs are tensors alone, if it is known."""
    if task.kind == CLASSIFICATION:
        return task.model
    names = {name for name, _ in task.model.named_children()}
    return next((task.model.get_submodule(part) for part in PARTS if part in names), None)


def pays(member: Member, part: Compiled, training: JointStep, context: RoundContext) -> bool:
    """Whether a training step is faster compiled, and its loss and gradients are those of before."""
    task, teacher = member.task, training.teachers.get(member.task.name)
    emit("doing", what=f"compiling and measuring training steps: {task.name}")
    step = Step(task, split(first_batch(member.data.train), member.num_parts)[0], context.device, teacher, context.seed)
    autocast, snapshot = (training.autocasts or {})[task.name], take_snapshot(task.model)
    limits = THRESHOLDS.precision
    try:
        step.seconds(autocast)
        exact = float(step.loss), step.gradients()
        with part.within():
            step.seconds(autocast)  # compiles
        if not agree(exact, (float(step.loss), step.gradients()), limits.compiled_difference, limits.compiled_cosine):
            log.warning("%s: training steps are not compiled: their losses or gradients would differ", task.name)
            return False
        usual, short = [], []
        for _ in range(2):
            usual.append(step.seconds(autocast))
            with part.within():
                short.append(step.seconds(autocast))
    except Exception as error:  # a model of a user may raise anything, and so may its compiled form
        if is_out_of_memory(error):
            raise
        log.warning("%s: training steps are not compiled, which fails: %s", task.name, " ".join(str(error).split()))
        return False
    finally:
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.clear()
    if min(short) >= min(usual):
        log.warning("%s: training steps are not compiled: %.2f x as long", task.name, min(short) / min(usual))
    return min(short) < min(usual)
