"""Whether tasks that a fit leaves just below their targets are trained shortly, in what they hold alone.

What is shared stays as it is then, and so do the other tasks: what was measured of them holds. It is decided by counts
and by what earlier trainings gained, so that runs with the same seed, or one that is resumed, decide the same.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace

from gemel.datasets.loaders import num_samples
from gemel.environment.clock import TimeOver
from gemel.forward.modes import state_on_cpu
from gemel.sharing.groups import Configuration
from gemel.thresholds import THRESHOLDS
from gemel.training.context import RoundContext
from gemel.training.options import TrainingOptions
from gemel.training.outcome import TIME_OVER, Outcome, Standing
from gemel.trials.evaluator import Evaluator
from gemel.trials.state import MergeState
from gemel.trials.teachers import teachers_of
from gemel.workload import CLASSIFICATION

STEP_IN_PASSES = 3  # a training step costs about as much as three forward passes of its images


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
        self.tasks, self.data = evaluator.tasks, evaluator.data
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
            accuracy, taken = self._train(name, steps, proposal, found)
            after = Standing(accuracy / self.tasks[name].target_acc, accuracy)
            self.now.append(Gained(name, found[name].ratio, after.ratio, taken))
            if after.ratio < found[name].ratio:
                self.state.models[name].load_state_dict(fitted)
            else:
                reached[name] = after
        return reached

    def steps_for(self, found: Mapping[str, Standing], num_images: Mapping[str, int]) -> dict[str, int]:
        """Task below its target -> the most steps that it is trained for; empty, if that is not expected to help all.

        found: where all tasks of the trial are, on all of val. num_images: that each was fitted on. All steps together
        cost at most what one more fit and its evaluation would.
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
        if any(1 - below[name].ratio > steps * self._gain_per_step(name) for name, steps in affordable.items()):
            return {}
        return {name: int(steps) for name, steps in affordable.items() if int(steps)}

    def _gain_per_step(self, name: str) -> float:
        """Of accuracy / target: as expected at first, corrected by what tasks of this kind gained in this run."""
        kind, limits = self.tasks[name].kind, THRESHOLDS.private
        done = [
            one for one in [*self.earlier, *self.now] if one.task in self.tasks and self.tasks[one.task].kind == kind
        ]
        expected = limits.classifier_gain if kind == CLASSIFICATION else limits.detector_gain
        gain = expected + sum(one.after - one.before for one in done)
        return max(0.0, gain) / (limits.steps + sum(one.steps for one in done))

    def _train(
        self, name: str, steps: int, proposal: Configuration, found: Mapping[str, Standing]
    ) -> tuple[float, int]:
        """Trains what one task holds alone, at most for so many steps; its accuracy then, and the steps taken."""
        task, epochs = {name: self.tasks[name]}, steps / len(self.data[name].train)
        options = replace(self.options, max_epochs=epochs, private_epochs=epochs)
        teachers = teachers_of(self.state, task, proposal, options)
        context = replace(self.context, fitted={name: found[name]}, beside=tuple(found))
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
