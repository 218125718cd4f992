"""Whether tasks that a fit leaves below their targets are trained in what they hold alone, and for how long.

What is shared stays as it is then, and so do the other tasks: what was measured of them holds. It is decided by counts
and by what earlier trainings gained, so that runs with the same seed, or one that is resumed, decide the same.

An FCOS is trained to predict what its unmerged model predicts at every position (gemel/training/predictions.py), and
nothing else: that gains several times as much in a step as labels do (benchmarks/LOG.md, 2026-11-27 Imitation).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from gemel.datasets.loaders import num_samples
from gemel.environment import ranks
from gemel.environment.clock import TimeOver
from gemel.environment.memory import give_back_unused
from gemel.forward.modes import state_on_cpu
from gemel.sharing.groups import Configuration
from gemel.thresholds import THRESHOLDS
from gemel.training.context import RoundContext
from gemel.training.options import TrainingOptions
from gemel.training.outcome import TIME_OVER, Outcome, Standing
from gemel.training.predictions import learns_by_imitation
from gemel.trials.evaluator import Evaluator
from gemel.trials.state import MergeState
from gemel.trials.teachers import teachers_of
from gemel.workload import CLASSIFICATION

Save = Callable[[dict, bool], None]
ALONE = "trained alone"  # the key of what is saved of trainings at length
STEP_IN_PASSES = 3  # a training step costs about as much as three forward passes of its images
CLASSIFIER, DETECTOR, IMITATION = "classifier", "detector", "imitation"  # how a task is trained


@dataclass(frozen=True)
class Gained:
    """What one task's training gained: accuracy / target before and after its steps."""

    task: str
    before: float
    after: float
    steps: int


class PrivateTraining:
    """Decides in one round who is trained after a fit, and for how long, and does it.

    context: of the round. recover: of trainer.py. earlier: what trainings of this run gained, as rounds record it.
    """

    def __init__(
        self,
        state: MergeState,
        evaluator: Evaluator,
        options: TrainingOptions,
        context: RoundContext,
        recover: Callable[..., Outcome],
        earlier: Collection[Mapping] = (),
    ):
        self.state, self.options, self.context, self.recover = state, options, context, recover
        self.tasks, self.data, self.evaluator = evaluator.tasks, evaluator.data, evaluator
        self.earlier = [Gained(**gained) for gained in earlier]
        self.now: list[Gained] = []  # in this round

    def improve(
        self, proposal: Configuration, found: Mapping[str, Standing], num_images: Mapping[str, int]
    ) -> dict[str, Standing]:
        """Trains whom `steps_for` names; returns where all tasks of the trial are then.

        A task that is worse afterwards gets back what the fit gave it. proposal: what is tied. Raises Interrupted or
        TimeOver.
        """
        reached = dict(found)
        for name, steps in self.steps_for(found, num_images).items():
            fitted = state_on_cpu(self.state.models[name])
            reached[name] = self._trained(name, steps, proposal, reached)
            if reached[name].ratio < found[name].ratio:
                self.state.models[name].load_state_dict(fitted)
                reached[name] = found[name]
        return reached

    def at_length(
        self, proposal: Configuration, found: Mapping[str, Standing], save: Save, saved: Mapping | None = None
    ) -> dict[str, Standing]:
        """Trains one task after the other, each again and again as `steps_at_length` says; where all are then.

        Each training goes on from where the last one ended, also where that was below its beginning: what a task learns
        shows in how well it predicts what its unmerged model does before it shows in its accuracy. Ends when fewer than
        two tasks are at their targets or expected to get there, since one alone shares nothing. A task that gains
        nothing twice in a row is given up. found: after the fit. save: called as in RoundContext, with what
        `saved` must be to go on from there under the key ALONE; several ranks save nothing, and begin the trial again.
        Raises Interrupted or TimeOver.
        """
        reached, spent = dict(found), dict.fromkeys(found, 0)
        names, round_state = list(found), None
        if saved is not None:
            reached = {name: Standing(*standing) for name, standing in saved["reached"].items()}
            spent, names, round_state = saved["spent"], saved["names"], saved["round"]
            self.now = [Gained(**gained) for gained in saved["now"]]
            nn.ModuleDict({name: self.state.models[name] for name in reached}).load_state_dict(saved["models"])
        for number, name in enumerate(names):
            while self._num_in_reach(reached, spent) > 1 and (
                steps := self.steps_at_length(name, reached[name], spent[name])
            ):
                begun = {
                    "reached": {task: list(standing) for task, standing in reached.items()},
                    "spent": spent,
                    "names": names[number:],
                    "now": self.of_round(),
                    "models": state_on_cpu(nn.ModuleDict({task: self.state.models[task] for task in reached})),
                }
                give_back_unused()  # else what fits and evaluations left in pieces adds up
                keep = None if ranks.size() > 1 else partial(_save_within, save, begun)
                resumed, round_state = {"save": keep, "saved": round_state}, None
                reached[name] = self._trained(name, steps, proposal, reached, spent[name], resumed)
                spent = {**spent, name: spent[name] + self.now[-1].steps}
                last = [one for one in self.now if one.task == name][-2:]
                if not last[-1].steps or [one.after < one.before for one in last] == [True, True]:
                    break  # it cannot be trained, or gains nothing any more
        return reached

    def _num_in_reach(self, reached: Mapping[str, Standing], spent: Mapping[str, int]) -> int:
        """How many tasks are at their targets, or expected to get there."""
        return sum(s.ratio >= 1 or self.steps_at_length(n, s, spent[n]) > 0 for n, s in reached.items())

    def steps_for(self, found: Mapping[str, Standing], num_images: Mapping[str, int]) -> dict[str, int]:
        """Task below its target -> the most steps that it is trained for; empty, if that is not expected to help all.

        found: where all tasks of the trial are, on all of val. num_images: that each was fitted on. All steps together
        cost at most what one more fit and its evaluation would; nobody is trained where that is too few for a task.
        """
        below = {name: standing for name, standing in found.items() if standing.ratio < 1}
        if any(standing.accuracy is None for standing in found.values()):
            return {}
        affordable = {
            name: (2 * num_images[name] + num_samples(self.data[name].val))
            * (len(found) / len(below))
            / (STEP_IN_PASSES * self.options.batch_size(self.tasks[name]))
            for name in below
        }
        if any(self._fewest_steps(name, below[name]) > steps for name, steps in affordable.items()):
            return {}
        return {name: int(steps) for name, steps in affordable.items() if int(steps)}

    def _fewest_steps(self, name: str, standing: Standing) -> float:
        """That a short training needs: by imitation more than the first ones, which only disturb what the fit gave it;
        as many as are expected to bring the task to its target, unless what it lacks may be chance."""
        limits = THRESHOLDS.private
        fewest = limits.fewest_imitation_steps if self._kind(name) == IMITATION else 0
        may_be_chance = 1 - standing.ratio < limits.least_gap < self._unmerged_ratio(name) - 1
        return fewest if may_be_chance else max(fewest, self._steps_to_target(name, standing))

    def steps_at_length(self, name: str, standing: Standing, spent: int) -> int:
        """As many as are expected to bring the task to its target; 0 where it is there, or where these and what was
        spent already are more than a round of training has, in which an epoch is a pass over the largest train split.
        """
        if standing.ratio >= 1:
            return 0
        steps = max(THRESHOLDS.private.least_steps, self._steps_to_target(name, standing))
        most = self.options.max_epochs * max(len(data.train) for data in self.data.values())
        return math.ceil(steps) if steps <= most - spent else 0

    def _steps_to_target(self, name: str, standing: Standing) -> float:
        """Steps that are expected to bring a task to its target; infinite where its unmerged model is not above it.

        Each step is expected to close the same share of the gap that is left to the accuracy of the unmerged model: as
        expected at first, corrected by what tasks that are trained alike gained in this run, up to their targets.
        Beyond these, gaps are as small as what one evaluation shows by chance, and say nothing.
        """
        kind, limits = self._kind(name), THRESHOLDS.private
        done = [one for one in [*self.earlier, *self.now] if one.task in self.tasks and self._kind(one.task) == kind]
        closed = limits.steps * getattr(limits, f"{kind}_rate") + sum(
            math.log(self._gap(one.task, one.before) / self._gap(one.task, min(1.0, one.after))) for one in done
        )
        rate = closed / (limits.steps + sum(one.steps for one in done))
        wanted = math.log(self._gap(name, standing.ratio) / self._gap(name, 1.0))
        return wanted / rate if rate > 0 and self._unmerged_ratio(name) - 1 >= limits.least_gap else math.inf

    def _unmerged_ratio(self, name: str) -> float:
        return self.evaluator.accuracy[name].unmerged / self.tasks[name].target_acc

    def _gap(self, name: str, ratio: float) -> float:
        """To the unmerged model's accuracy, in accuracy / target."""
        return max(THRESHOLDS.private.least_gap, self._unmerged_ratio(name) - ratio)

    def _kind(self, name: str) -> str:
        """How a task is trained: whose rate of THRESHOLDS.private is expected."""
        if self.tasks[name].kind == CLASSIFICATION:
            return CLASSIFIER
        imitates = self.options.probability_weight > 0 and learns_by_imitation(self.state.unmerged[name])
        return IMITATION if imitates else DETECTOR

    def _trained(
        self,
        name: str,
        steps: int,
        proposal: Configuration,
        found: Mapping[str, Standing],
        spent: int = 0,
        resumed: Mapping[str, Any] = MappingProxyType({}),
    ) -> Standing:
        """Where a task is after a training.

        spent: steps of its trainings in this trial before this one, which sees other batches. resumed: of RoundContext.
        """
        accuracy, taken = self._train(name, steps, proposal, found, spent, resumed)
        after = Standing(accuracy / self.tasks[name].target_acc, accuracy)
        self.now.append(Gained(name, found[name].ratio, after.ratio, taken))
        return after

    def _train(
        self,
        name: str,
        steps: int,
        proposal: Configuration,
        found: Mapping[str, Standing],
        spent: int,
        resumed: Mapping[str, Any],
    ) -> tuple[float, int]:
        """Trains what one task holds alone, at most for so many steps; its accuracy then, and the steps taken."""
        task, epochs = {name: self.tasks[name]}, steps / len(self.data[name].train)
        options = replace(self.options, max_epochs=epochs, private_epochs=epochs)
        if self._kind(name) == IMITATION:
            options = replace(options, label_weight=0.0, feature_weight=0.0)
        teachers = teachers_of(self.state, task, proposal, options)
        purpose = (*self.context.purpose, spent) if spent else self.context.purpose
        context = replace(self.context, fitted={name: found[name]}, beside=tuple(found), purpose=purpose, **resumed)
        try:
            outcome = self.recover(self.state.models, task, self.data, options, context, teachers)
        finally:
            for teacher in teachers.values():
                teacher.close()
        if outcome.reason == TIME_OVER:
            raise TimeOver
        return outcome.accuracies[name], outcome.steps

    def of_round(self) -> list[dict]:
        """What was gained since this was made, as a round records it."""
        return [asdict(gained) for gained in self.now]


def _save_within(save: Save, begun: Mapping, state: dict, last: bool) -> None:
    """Hands on the state of a round within a training that began there."""
    save({ALONE: {**begun, "round": state}}, last)
