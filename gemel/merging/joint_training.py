"""Training after the search, of tasks whose first layers become common (`share_norm`), as in any trial."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from gemel.environment.clock import Clock, TimeOver
from gemel.options import MergeOptions
from gemel.sharing.groups import Configuration, Occurrence
from gemel.training.context import RoundContext
from gemel.training.outcome import TIME_OVER, Outcome, Standing
from gemel.trials.evaluator import Evaluator
from gemel.trials.state import MergeState
from gemel.trials.teachers import teachers_of


class JointTraining:
    """Trains tasks together with all that share weights with them.

    recover: of trainer.py.
    """

    def __init__(
        self,
        state: MergeState,
        evaluator: Evaluator,
        clock: Clock,
        recover: Callable[..., Outcome],
        options: MergeOptions,
    ):
        self.state, self.evaluator, self.clock = state, evaluator, clock
        self.recover, self.options = recover, options
        self.trainings = self.steps = 0

    def train(self, fitted: Mapping[str, float], norms: Sequence[Occurrence] = ()) -> dict[str, float]:
        """Trains what is tied now; what all of these tasks then reach on val, as it will be loaded.

        fitted: what some of the tasks reach as they are. norms: shared normalisation, whose statistics stay as they
        are: each batch is of one task. Raises Interrupted or TimeOver.
        """
        names = sharing_with(fitted, self.state.tied)
        known = {**{name: self.evaluator.accuracy[name].merged for name in names}, **fitted}
        tasks = {name: self.evaluator.tasks[name] for name in names}
        options = replace(self.options.training, freeze_prefix=False)
        teachers = teachers_of(self.state, tasks, self.state.tied, options)
        self.trainings += 1
        context = RoundContext(
            device=self.state.device,
            seed=self.options.seed,
            purpose=("shared normalisation", self.trainings),
            clock=self.clock,
            fitted={name: Standing(known[name] / task.target_acc, known[name]) for name, task in tasks.items()},
            screen_targets=self.evaluator.screen_targets(names),
        )
        try:
            with _in_eval_mode(self.state.models[o.task].get_submodule(o.layer) for o in norms):
                outcome = self.recover(self.state.models, tasks, self.evaluator.data, options, context, teachers)
        finally:
            for teacher in teachers.values():
                teacher.close()
        if outcome.reason == TIME_OVER:
            raise TimeOver
        self.steps += outcome.steps
        with self.clock.interruptible():
            return self.evaluator.measure_all({name: self.state.models[name] for name in names})


def sharing_with(tasks: Iterable[str], tied: Configuration) -> list[str]:
    """The tasks, and those that share weights with any of them, directly or through others."""
    found, grown = set(tasks), True
    while grown:
        reached = {task for group in tied if found & set(group.tasks) for task in group.tasks}
        grown = not reached <= found
        found |= reached
    return sorted(found)


@contextlib.contextmanager
def _in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these modules stay in eval mode, also where their models are put into train mode."""
    held = list(modules)
    for module in held:
        module.eval()
        vars(module)["train"] = _stay  # models call it for each of their modules
    try:
        yield
    finally:
        for module in held:
            del vars(module)["train"]


def _stay(mode: bool = True) -> None:
    """In the place of a module's `train`."""
