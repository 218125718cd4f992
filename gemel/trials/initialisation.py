"""The weights that a trial begins with: fitted in closed form, or by a data-free rule."""

import logging
from collections.abc import Callable, Collection, Mapping

from torch import nn

from gemel.environment import ranks
from gemel.environment.events import emit
from gemel.environment.failures import is_out_of_memory
from gemel.fitting.batch_norm import is_frozen, match_statistics
from gemel.fitting.rows import normalisation_behind
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.fitting.teacher_samples import StoredBatches, TeacherSamples
from gemel.forward.modes import Models, state_on_cpu
from gemel.options import LEAST_SQUARES
from gemel.sharing.groups import Configuration, Group
from gemel.sharing.holders import synchronise
from gemel.sharing.tying import copy_parameters
from gemel.thresholds import THRESHOLDS
from gemel.training.outcome import Standing
from gemel.trials.evaluator import Evaluator
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
from gemel.trials.task_weights import TaskWeights

log = logging.getLogger(__name__)

Improve = Callable[[Mapping[str, Standing], Mapping[str, int]], dict[str, Standing]]


def rule_of(initial_weights: str) -> str:
    """The data-free rule that gives a tied layer its first values; least squares starts from the mean."""
    return "mean" if initial_weights == LEAST_SQUARES else initial_weights


class WeightFitter:
    """Fits shared weights in closed form to what each task's layer does in its unmerged model, or in `state.as_kept`.

    donor_of: the task whose weights a group takes as they are; None: it is fitted. improve: what may follow a fit that
    misses targets, given where tasks are and on how many images each was fitted; returns where they are then.
    saving_of: bytes that are saved where only these tasks meet their targets; None: nothing is. screens: whether a fit
    is evaluated on the screening subset first. takes_first: whether the first saving is to come soon: fits take long.
    """

    def __init__(
        self,
        state: MergeState,
        evaluator: Evaluator,
        images: ImageSampler,
        donor_of: Callable[[Group], str | None],
        improve: Improve | None = None,
        saving_of: Callable[[Collection[str]], int] | None = None,
        screens: bool = True,
        takes_first: bool = False,
    ):
        self.state, self.evaluator, self.images, self.donor_of = state, evaluator, images, donor_of
        self.improve, self.saving_of, self.screens, self.takes_first = improve, saving_of, screens, takes_first
        self.teachers = state.unmerged if state.as_kept is None else state.as_kept

    def fit(
        self, groups: Configuration, names: Collection[str], number: int, max_fits: int, times: int = 1
    ) -> dict[str, Standing]:
        """Fits tied groups; returns where each of the named tasks, whose models the trial changes, then is.

        The first fit counts all tasks alike. If `takes_first` and nothing is kept yet, it is the only one where it
        saves something, and where most tasks miss their targets: a trial that ties less is quicker then. Else, while a
        task is below its target and the others are above theirs, the groups are fitted again with other weights of the
        tasks and, from the second fit on, on twice as many images, at most max_fits times; the fit is kept whose tasks
        at target save most among themselves, of several that save as much the one whose worst task is best. number: of
        the round, for the log. times: how many times the usual number of images the first fit takes.
        All rounds fit on the same samples of images.
        """
        if self.teachers is self.state.unmerged:
            groups = donate_weights(self.state.models, self.teachers, groups, self.donor_of)
        container = nn.ModuleDict({name: self.state.models[name] for name in names})
        before = state_on_cpu(container)
        num_pixels = times * THRESHOLDS.fit.pixels
        while True:
            try:
                reached = self._best_fit(groups, container, before, num_pixels, number, max_fits)
                synchronise(container)
                return reached
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or num_pixels <= THRESHOLDS.fit.fewest_pixels:
                    raise
                num_pixels //= 2
                log.warning("out of memory; weights are fitted again, on %d pixels a task", num_pixels)

    def _best_fit(
        self,
        groups: Configuration,
        container: nn.ModuleDict,
        before: Mapping,
        num_pixels: int,
        number: int,
        max_fits: int,
    ) -> dict[str, Standing]:
        """The best of several fits of the container's models, each from the state `before`."""
        samples = self.images.of_fits.of(self.teachers, groups, num_pixels)
        best: dict = {}  # the state of the best fit, where the models hold another one
        reached: dict[str, Standing] = {}
        is_best = False  # whether the models hold the best fit
        balance = TaskWeights(dict.fromkeys(task for group in groups for task in group.tasks))
        for attempt in range(max_fits):
            container.load_state_dict(before)
            found = self._fit_once(groups, container, samples, balance.weights, number, attempt)
            is_in_a_hurry = self.takes_first and not self.state.kept
            if is_in_a_hurry and self._saving(found) > 0:
                return found
            ratios, num_images = ratios_of(found), samples[1].num_images
            if self.improve is not None and worst(found) < 1:
                found = self.improve(found, num_images)
            is_best = not reached or self._value(found) > self._value(reached)
            reached = found if is_best else reached
            if worst(reached) >= 1 or attempt + 1 == max_fits or (is_in_a_hurry and _most_miss(ratios)):
                break
            level = balance.update(ratios)
            if attempt == 0 and level >= THRESHOLDS.fit.more_images_from:
                more = 2 * min(num_pixels, THRESHOLDS.fit.pixels)
                samples = self.images.of_fits.of(self.teachers, groups, more)
            if level < THRESHOLDS.fit.refit_from and samples[1].num_images == num_images:
                break
            best = state_on_cpu(container) if is_best else best
        if not is_best:
            container.load_state_dict(best)
        return reached

    def _fit_once(
        self,
        groups: Configuration,
        container: nn.ModuleDict,
        samples: tuple[Mapping[str, StoredBatches], TeacherSamples],
        weights: Mapping[str, float],
        number: int,
        attempt: int,
    ) -> dict[str, Standing]:
        """Fits the groups with these weights of the tasks, and evaluates the container's models."""
        emit("doing", what="fitting weights in closed form" if not attempt else f"fitting again ({attempt + 1})")
        images, outputs = samples
        given = (self.state.models, self.teachers, groups, images)
        fit_sequentially(*given, teacher_samples=outputs, task_weights=weights)
        emit("doing", what="evaluating the fitted weights")
        found = self.evaluator.standings(container, self.screens)
        emit("fit", round=number + 1, attempt=attempt, ratios=ratios_of(found))
        log.debug("round %d, fit %d with weights %s: %s of the targets", number, attempt, weights, ratios_of(found))
        return found

    def _value(self, found: Mapping[str, Standing]) -> tuple[int, float]:
        """What makes one fit better than another: (bytes saved among the tasks at target, ratio of the worst task)."""
        on_val = {name: standing for name, standing in found.items() if standing.accuracy is not None}
        return self._saving(on_val), worst(found)

    def _saving(self, found: Mapping[str, Standing]) -> int:
        met = [name for name, standing in found.items() if standing.ratio >= 1]
        return 0 if self.saving_of is None else self.saving_of(met)


def donate_weights(
    models: Models, unmerged: Models, groups: Configuration, donor_of: Callable[[Group], str | None]
) -> Configuration:
    """Gives groups with a donor its weights and the normalisation behind them; returns the groups to be fitted.

    Only where other groups of all its tasks are fitted behind it; else the group is fitted like the others. models:
    tied already.
    """
    donors = {group: donor for group in groups if (donor := donor_of(group)) is not None}
    fitted = [group for group in groups if group not in donors]
    for group, donor in donors.items():
        if not set(group.tasks) <= {task for other in fitted for task in other.tasks}:
            return groups
        source = next(o.layer for o in group.occurrences if o.task == donor)
        norm = normalisation_behind(unmerged[donor], source)
        for o in group.occurrences:
            copy_parameters(unmerged[donor].get_submodule(source), models[o.task].get_submodule(o.layer))
            own = normalisation_behind(models[o.task], o.layer)
            if norm is not None and own is not None:
                own.load_state_dict(norm.state_dict())
    return tuple(fitted)


def refit_frozen_normalisation(state: MergeState, images: ImageSampler, names: Collection[str], number: int) -> None:
    """Sets frozen batch normalisation behind tied layers so that it puts out the moments of the unmerged model's.

    It is not trained and has no statistics to re-estimate, so an error of a tied layer would stay as it is. number: of
    the round.
    """
    frozen = [name for name in ranks.mine(names) if any(map(is_frozen, state.models[name].modules()))]
    drawn = images.of_tasks(frozen, THRESHOLDS.fit.pixels, "frozen", number)
    for name in frozen:
        batches = [(batch, None) for batch in drawn[name]]
        match_statistics(state.models[name], state.unmerged[name], batches, state.device, frozen_only=True)
    synchronise({name: state.models[name] for name in names})


def _most_miss(ratios: Mapping[str, float]) -> bool:
    """Whether most tasks are below their targets."""
    return sum(ratio < 1 for ratio in ratios.values()) > len(ratios) / 2


def ratios_of(found: Mapping[str, Standing]) -> dict[str, float]:
    """Task -> accuracy / target."""
    return {name: standing.ratio for name, standing in found.items()}


def worst(found: Mapping[str, Standing]) -> float:
    """The lowest ratio of accuracy to target."""
    return min(standing.ratio for standing in found.values())
