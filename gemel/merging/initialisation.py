"""What a trial begins with: the weights of what is newly tied, the teachers, and what the screening has to reach."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from gemel.alignment.align import align, permutations_of
from gemel.alignment.matching import BY_WEIGHTS
from gemel.datasets.loaders import plain_images, repeats
from gemel.environment.failures import is_out_of_memory
from gemel.environment.seeds import generator
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.batch_norm import is_frozen, match_statistics
from gemel.fitting.rows import normalisation_behind
from gemel.fitting.sensitivity import Sensitivity, predict_sensitivity
from gemel.fitting.sequential_fit import TeacherSamples, fit_sequentially, is_short_of_rows, sample_teachers
from gemel.sharing.groups import Configuration, compared_layers, joined
from gemel.sharing.tying import reset, restore_snapshot, retie, take_snapshot
from gemel.training.cut import Cuts
from gemel.training.distillation import Teacher
from gemel.training.early_stopping import Standing
from gemel.training.prefix import Prefix, prefix_of
from gemel.workload import CLASSIFICATION, DETECTION, Task

if TYPE_CHECKING:
    from merger import Run

log = logging.getLogger(__name__)

LEAST_SQUARES = "least_squares"
NO_ALIGNMENT = "none"
WEIGHTS_OF = {"adaptive": LEAST_SQUARES}  # the initial weights of a strategy, where they are not the mean
MATCHING_OF = {"adaptive": BY_WEIGHTS}  # which layers pair in a strategy, where it is not by order
ALIGNMENT_OF = {"adaptive": "weights"}  # how a strategy lines up channels, where it does
ADAPTER_BUDGET_OF = {"adaptive": 0.125}  # what a residual may cost, where a strategy has them (benchmarks/LOG.md)
MAX_ADAPTER_BUDGET = 0.45  # from a half on, two tasks would save nothing by sharing
FIT_PIXELS = 320 * 96 * 96  # of the images per task that weights are fitted on (benchmarks/LOG.md)
DETECTION_SHARE = 0.5  # of the pixels, for detectors (benchmarks/LOG.md)
FEWEST_PIXELS = FIT_PIXELS // 16  # where memory is short
FIT_POSITIONS = 4096  # rows per layer and task
MORE_IMAGES = 4  # times as many, where there would be fewer rows than half the inputs (benchmarks/LOG.md)
MAX_FITS = 3
WORTH_ALL_OF_VAL = 0.97  # of the targets on the screening subset, which may be off by a few points
WORTH_A_REFIT = 0.97  # of the targets, that all tasks should reach with the next weights
USUAL_SLOPE, MIN_SLOPE, MAX_SLOPE = 0.12, 0.08, 0.4  # of a ratio over the logarithm of its weight
MIN_MOVE, MAX_MOVE = 0.03, 1.1  # of the logarithm of a weight: less tells nothing of the slope, more is a leap
SENSITIVITY_METHOD = "fitted_error"  # cheap, and it finds the layers that do real harm (benchmarks/LOG.md)
SENSITIVITY_PIXELS = FIT_PIXELS // 4
IMAGES_OF_A_CUT = 4
ALIGN_PIXELS = FIT_PIXELS // 8  # "weights" needs images only to check that each model still computes the same


def align_channels(run: "Run") -> None:
    """Permutes the channels of models that share nothing yet so that they line up with the others.

    What they compute stays the same; their teachers are permuted alike. What was permuted is part of the run's record,
    because the weights that are kept make sense in this order only.
    """
    tied = {task for group in run.strategy.kept for task in group.tasks}
    if run.alignment == NO_ALIGNMENT or not run.groups or set(run.tasks) <= tied | set(run.permutations):
        return
    images = _images(run, run.groups, ALIGN_PIXELS, "align")
    fixed = tied | set(run.permutations)
    done = align(run.unmerged, run.groups, images, method=run.alignment, seed=run.seed, fixed=fixed)
    for name, permutations in permutations_of(done).items():
        run.originals[name] = state_of(run.models[name])
        run.models[name].load_state_dict(run.unmerged[name].state_dict())
        run.permutations[name] = permutations
    for name in run.tasks:
        run.permutations.setdefault(name, {})  # once lined up, a model stays as it is


def state_of(model: nn.Module) -> dict:
    """A copy of the model's state dict in CPU memory."""
    return {key: value.to("cpu", copy=True) for key, value in model.state_dict().items()}


def restore_channel_order(run: "Run") -> None:
    """Gives the models that share nothing the order of channels that they came with, bit by bit."""
    tied = {task for group in run.strategy.kept for task in group.tasks}
    for name, state in run.originals.items():
        if name not in tied:
            run.models[name].load_state_dict(state)


def rule_of(initial_weights: str) -> str:
    """The data-free rule that gives a tied layer its first values; least squares starts from the mean."""
    return "mean" if initial_weights == LEAST_SQUARES else initial_weights


def reset_to_unmerged(run: "Run", groups: Configuration, trained: Mapping[str, Task]) -> None:
    """Gives tied groups the mean of what they were, everything private the values of the unmerged model."""
    for name in trained:
        run.models[name].load_state_dict(run.unmerged[name].state_dict(), strict=False)  # it has no residuals
    reset(run.models, groups, run.unmerged)


def fit_weights(
    run: "Run", groups: Configuration, trained: Mapping[str, Task], max_fits: int = MAX_FITS
) -> dict[str, Standing]:
    """Fits the weights of tied groups in closed form to what each task's unmerged layer does.

    The first fit counts all tasks alike. While a task is below its target and the others have something to give, the
    groups are fitted again with other weights of the tasks; what came nearest to all targets is kept. Returns where
    each trained task then is.
    """
    groups, num_pixels = _given(run, groups), FIT_PIXELS
    container = nn.ModuleDict({name: run.models[name] for name in trained})
    before = state_of(container)
    while True:
        try:
            return _fit_on(run, groups, container, before, num_pixels, max_fits)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or num_pixels <= FEWEST_PIXELS:
                raise
            num_pixels //= 2
            log.warning("out of memory; weights are fitted again, on %d pixels a task", num_pixels)


def _fit_on(run: "Run", groups, container: nn.ModuleDict, before: dict, num_pixels: int, max_fits: int):
    """`fit_weights` of the container's tasks, from the state `before`, on so many pixels a task."""
    trained = {name: run.tasks[name] for name in container}
    images, asked = _sample_teachers(run, groups, num_pixels)
    best, reached = {}, dict.fromkeys(trained, Standing(0.0))
    balance = Balance(images)
    for attempt in range(max_fits):
        container.load_state_dict(before)
        fit_sequentially(run.models, run.unmerged, groups, images, teacher_samples=asked, task_weights=balance.weights)
        found = standings(run, trained)
        ratios = {name: standing.ratio for name, standing in found.items()}
        log.debug("fit %d with weights %s: %s of the targets", attempt, balance.weights, ratios)
        if not best or _worst(found) > _worst(reached):
            best, reached = state_of(container), found
        if _worst(reached) >= 1 or balance.update(ratios) < WORTH_A_REFIT:
            break
    container.load_state_dict(best)
    return reached


def _given(run: "Run", groups: Configuration) -> Configuration:
    """Gives the groups that are not to be fitted the weights of the task that the strategy names, and the normalisation
    behind them; returns the others. Only where others of all its tasks are fitted to that."""
    fitted = [group for group in groups if run.strategy.donor_of(group) is None]
    for group in (group for group in groups if group not in fitted):
        donor = run.strategy.donor_of(group)
        if not set(group.tasks) <= {task for other in fitted for task in other.tasks}:
            return groups
        source = next(o.layer for o in group.occurrences if o.task == donor)
        norm = normalisation_behind(run.unmerged[donor], source)
        for o in group.occurrences:
            layer = run.models[o.task].get_submodule(o.layer)
            layer.load_state_dict(run.unmerged[donor].get_submodule(source).state_dict(), strict=False)
            own = normalisation_behind(run.models[o.task], o.layer)
            if norm is not None and own is not None:
                own.load_state_dict(norm.state_dict())
    return tuple(fitted)


def _sample_teachers(run: "Run", groups: Configuration, num_pixels: int) -> tuple[dict[str, list], TeacherSamples]:
    """Images to fit groups on, and what the teachers say to them; more where a layer has far fewer rows than inputs.

    Layers deep in a network put out a few positions an image: a fit with few rows for its unknowns remembers them.
    """
    purpose = ("fit", len(run.rounds))
    for times in (1, MORE_IMAGES):
        images = _images(run, groups, times * num_pixels, *purpose)
        source = generator(run.seed, *purpose)
        asked = sample_teachers(run.unmerged, groups, images, generator=source, positions=FIT_POSITIONS)
        if not is_short_of_rows(run.unmerged, groups, asked, FIT_POSITIONS):
            break
    return images, asked


def _worst(found: Mapping[str, Standing]) -> float:
    return min(standing.ratio for standing in found.values())


class Balance:
    """How much each task counts in the fits: what one task has above its target, another may use.

    Near a fit, a task's ratio (accuracy / target) is taken to be a line in the logarithm of its weight. The next
    weights are those at which the lines of all tasks are level.
    """

    def __init__(self, names: Iterable[str]):
        self.weights = dict.fromkeys(names, 1.0)
        self.slopes = dict.fromkeys(self.weights, USUAL_SLOPE)  # of the ratio over the logarithm of the weight
        self.last: dict[str, tuple[float, float]] = {}  # logarithm of the weight, ratio

    def update(self, ratios: Mapping[str, float]) -> float:
        """Moves the weights, given what was reached with them; returns the ratio that all tasks should then reach."""
        for name, weight in self.weights.items():
            here = math.log(weight), ratios[name]
            if name in self.last and abs(here[0] - self.last[name][0]) > MIN_MOVE:
                slope = (here[1] - self.last[name][1]) / (here[0] - self.last[name][0])
                self.slopes[name] = min(MAX_SLOPE, max(MIN_SLOPE, slope))
            self.last[name] = here
        level = sum(ratios[n] / s for n, s in self.slopes.items()) / sum(1 / s for s in self.slopes.values())
        for name, slope in self.slopes.items():
            move = min(MAX_MOVE, max(-MAX_MOVE, (level - ratios[name]) / slope))
            self.weights[name] *= math.exp(move)
        mean = sum(self.weights.values()) / len(self.weights)
        self.weights = {name: weight / mean for name, weight in self.weights.items()}
        return level


def standings(run: "Run", trained: Mapping[str, Task]) -> dict[str, Standing]:
    """Where each trained task is on the screening subset and, if all are near their targets there, on all of val."""
    targets = screen_targets(run, trained)
    found = {}
    for name, task in trained.items():
        accuracy = evaluate(task, run.data[name].screen)
        whole = run.data[name].screen is run.data[name].val
        found[name] = Standing(accuracy / targets.get(name, task.target_acc), accuracy if whole else None)
    if _worst(found) >= WORTH_ALL_OF_VAL:
        for name in (name for name, standing in found.items() if standing.accuracy is None):
            accuracy = evaluate(trained[name], run.data[name].val)
            found[name] = Standing(accuracy / trained[name].target_acc, accuracy)
    return found


def set_sensitivity(run: "Run") -> None:
    """Tells the strategy how much every group would hurt its tasks if its weights were fitted; changes nothing."""
    if not run.strategy.uses_sensitivity or not run.groups:
        return
    snapshot = take_snapshot(run.models)
    retie(run.models, run.strategy.kept, joined(run.strategy.kept, run.groups), run.unmerged)
    images = _images(run, run.groups, SENSITIVITY_PIXELS, "foresee")
    source = generator(run.seed, "foresee")
    harm = predict_sensitivity(
        run.models, run.unmerged, run.groups, images, method=SENSITIVITY_METHOD, generator=source
    )
    restore_snapshot(snapshot)
    run.strategy.set_sensitivity(harm)


def sensitivity_of(run: "Run", configuration: Configuration) -> Sensitivity:
    """How much each group hurts each of its tasks, with the weights as they are now."""
    purpose = ("harm", len(run.rounds))
    images = _images(run, configuration, SENSITIVITY_PIXELS, *purpose)
    source = generator(run.seed, *purpose)
    return predict_sensitivity(
        run.models, run.unmerged, configuration, images, method=SENSITIVITY_METHOD, generator=source
    )


def refit_frozen(run: "Run", trained: Mapping[str, Task]) -> None:
    """Frozen batch normalisation behind tied layers is made to put out what the unmerged model's does.

    It is not trained and has no statistics to re-estimate, so what a tied layer changes would stay as it is.
    """
    for name in trained:
        if any(map(is_frozen, run.models[name].modules())):
            images = plain_images(
                run.data[name], int(DETECTION_SHARE * FIT_PIXELS), run.seed, "frozen", len(run.rounds)
            )
            batches = [(batch, None) for batch in images]
            match_statistics(run.models[name], run.unmerged[name], batches, run.device, frozen_only=True)


def teachers_of(run: "Run", trained: Mapping[str, Task], proposal: Configuration) -> dict[str, Teacher]:
    """The unmerged models beside those that are trained, if training compares with them or has no labels."""
    return {
        name: Teacher(run.models[name], run.unmerged[name], compared_layers(run.models[name], name, proposal))
        for name, task in trained.items()
        if run.training.teaches or not task.labels
    }


def prefixes_of(run: "Run", trained: Mapping[str, Task], proposal: Configuration) -> dict[str, Prefix]:
    """What the trained classifiers compute before their first tied layers, if that is to stay as it is.

    What was kept of it in an earlier trial is used again where it would be the same.
    """
    found = {}
    for name in trained if run.training.freeze_prefix else ():
        tied = {o.layer for group in proposal for o in group.occurrences if o.task == name}
        if (cut := _cuts(run, name).before(tied) if run.tasks[name].kind == CLASSIFICATION else None) is not None:
            prefix = prefix_of(run.models[name], cut, run.prefix_bytes, repeats(run.data[name].train.dataset))
            known = run.prefixes.get(name)
            found[name] = known if prefix.computes_the_same_as(known) else prefix
    run.prefixes = {**run.prefixes, **found} if run.in_flight is None else {}  # else the weights are yet to be loaded
    return found


def _cuts(run: "Run", name: str) -> Cuts:
    if name not in run.cuts:
        images = plain_images(run.data[name], 0, run.seed, "prefix")[0][:IMAGES_OF_A_CUT]
        run.cuts[name] = Cuts(run.unmerged[name], images.to(run.device))
    return run.cuts[name]


def screen_targets(run: "Run", trained: Mapping[str, Task]) -> dict[str, float]:
    """What the unmerged models reach on the screening subset, times the tolerance; measured when first needed."""
    if not run.training.screening_images:
        return {}
    for name, task in trained.items():
        data = run.data[name]
        if name not in run.screen_accuracy and data.screen is not data.val:
            run.screen_accuracy[name] = evaluate(task, data.screen, run.unmerged[name])
    return {n: run.tasks[n].tolerance * run.screen_accuracy[n] for n in trained if n in run.screen_accuracy}


def _images(run: "Run", configuration: Configuration, num_pixels: int, *purpose: object) -> dict[str, list]:
    tasks = dict.fromkeys(task for group in configuration for task in group.tasks)
    share = {CLASSIFICATION: 1.0, DETECTION: DETECTION_SHARE}
    together = FIT_PIXELS if run.device.type == "cuda" else 0  # small batches leave a GPU waiting for the next kernel
    return {
        n: plain_images(
            run.data[n], int(share[run.tasks[n].kind] * num_pixels), run.seed, *purpose, batch_pixels=together
        )
        for n in tasks
    }
