"""How much each group of a merge is predicted to hurt each of its tasks, and what is tried before that is predicted."""

import itertools
import math
from collections.abc import Mapping

from gemel.alignment.align import are_alike
from gemel.environment import ranks
from gemel.environment.events import emit
from gemel.environment.failures import is_out_of_memory
from gemel.environment.seeds import generator
from gemel.environment.threads import threads_of_waiting_ranks
from gemel.fitting.sensitivity import Sensitivity, predict_sensitivity
from gemel.sharing.groups import Configuration
from gemel.strategies.base import FirstStep, Strategy
from gemel.strategies.curves import Curve, ExpectedLoss
from gemel.strategies.donors import first_layers
from gemel.thresholds import THRESHOLDS
from gemel.trials.evaluator import Evaluator
from gemel.trials.images import ImageSampler
from gemel.trials.out_of_memory import on_fewer_images
from gemel.trials.state import MergeState
from gemel.workload import CLASSIFICATION, Task


def sensitivity_if_all_were_tied(
    state: MergeState, images: ImageSampler, groups: Configuration
) -> tuple[Sensitivity, Sensitivity] | None:
    """As `_predicted`, which the first rank alone does: it takes few images, and all rows of a group together."""

    @threads_of_waiting_ranks()
    def listed() -> list[list[list]] | None:
        found = _predicted(state, images, groups)
        return found and [[[groups.index(g), t, value] for (g, t), value in part.items()] for part in found]

    if ranks.size() == 1:
        return _predicted(state, images, groups)
    parts = ranks.of_first(listed)
    if parts is None:
        return None
    errors, misfit = ({(groups[i], task): value for i, task, value in part} for part in parts)
    return errors, misfit


def _predicted(
    state: MergeState, images: ImageSampler, groups: Configuration
) -> tuple[Sensitivity, Sensitivity] | None:
    """(error at the outputs of the model, misfit of the layer) of every group and task if the weights were fitted.

    Errors are relative to the variance of the outputs, and larger ones than that count as much. The models stay as they
    are. None if memory runs out on single images.
    """
    return on_fewer_images(
        "the prediction of sensitivity",
        THRESHOLDS.sensitivity.pixels,
        lambda num_pixels, max_batch: _sensitivity(state, images, groups, num_pixels, max_batch),
    )


def _sensitivity(
    state: MergeState, images: ImageSampler, groups: Configuration, num_pixels: int, max_batch: float
) -> tuple[Sensitivity, Sensitivity]:
    limits, purpose = THRESHOLDS.sensitivity, "foresee"
    drawn = images.of_groups(groups, num_pixels, purpose, max_batch=max_batch, max_images=limits.images)
    source = generator(images.seed, purpose)
    with state.all_tied(groups):
        misfit = predict_sensitivity(
            state.models, state.unmerged, groups, drawn, method=limits.method, generator=source
        )
    metrics = {task: images.of_fits.metrics(state.unmerged, task) for task in drawn}
    importance = {(task, name): metric.importance for task, own in metrics.items() for name, metric in own.items()}
    errors = {
        (group, o.task): min(1.0, misfit[group, o.task] * importance.get((o.task, o.layer), 1.0))
        for group in groups
        for o in group.occurrences
    }
    return errors, misfit


def predict_for(
    strategy: Strategy, state: MergeState, images: ImageSampler, groups: Configuration, evaluator: Evaluator
) -> None:
    """Tells the strategy what is predicted, unless there is not enough memory to predict anything."""
    emit("doing", what="predicting how much sharing hurts")
    predicted = sensitivity_if_all_were_tied(state, images, groups)
    if predicted is not None:
        strategy.set_sensitivity(*predicted, evaluator.ratios(), expected_losses(evaluator.tasks))


def choose_first_step(strategy: Strategy, state: MergeState, images: ImageSampler, evaluator: Evaluator) -> None:
    """Tells a strategy that fits before it trains what comes first; all ranks call it.

    With a memory goal nothing does: what its first trials reach is to be the same with other targets.
    """
    if strategy.keeps_verified_part and strategy.goal_saving is None:
        strategy.begin_with(lambda groups: _first_step_of(groups, state, images, evaluator))


def _first_step_of(groups: Configuration, state: MergeState, images: ImageSampler, evaluator: Evaluator) -> FirstStep:
    """What a search of these groups tries first.

    Classifiers are likely to bear that everything is tied where their targets leave enough: so nothing need be
    predicted before, but first layers are left out if their weights show that the models were trained apart. Where that
    is not likely and fits take long, a small step comes first. No layer of a detector is safe before sensitivity was
    predicted.
    """
    tasks = list(dict.fromkeys(task for group in groups for task in group.tasks))
    try:
        flops = images.of_fits.flops(state.unmerged, tasks, THRESHOLDS.fit.pixels)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        flops = math.inf  # then fits are large
    nothing = FirstStep(trials_take_long=flops > THRESHOLDS.search.long_fit)
    if any(images.tasks[task].kind != CLASSIFICATION for task in tasks):
        return nothing
    losses, ratios = expected_losses(evaluator.tasks), evaluator.ratios()
    chance = math.prod(Curve.expecting(losses[t], ratios[t]).probability(1.0) for t in tasks)
    is_likely = chance >= THRESHOLDS.fit.no_screening_from
    if not is_likely and not nothing.trials_take_long:
        return nothing
    stems = tuple(itertools.compress(groups, first_layers(state.unmerged, groups)))
    step = nothing._replace(ties_stems=ranks.of_first(lambda: are_alike(state.unmerged, stems)))
    return step._replace(share=1.0, chance=chance) if is_likely else step._replace(share=THRESHOLDS.search.first_step)


def expected_losses(tasks: Mapping[str, Task]) -> dict[str, ExpectedLoss]:
    """Task -> accuracy / target that sensitivity is expected to cost, before anything was measured."""
    limits = THRESHOLDS.search
    classifier = ExpectedLoss(limits.classifier_loss, limits.classifier_exponent)
    detector = ExpectedLoss(limits.detector_loss)
    return {name: classifier if task.kind == CLASSIFICATION else detector for name, task in tasks.items()}
