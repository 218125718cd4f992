"""What a strategy is: it decides which configuration to try next.

A strategy sees groups and outcomes, never weights or data. `propose()` names the next configuration to try, in which
everything it has kept is tied as well, or None when it is done; `record()` tells it how the last proposal ended.
`state()` and `load_state()` carry it through JSON, so that an interrupted run can be resumed. `adopt()` starts it from
what an earlier run over some of these tasks kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from gemel.sharing.groups import Configuration, Group, Occurrence, joined
from gemel.strategies.curves import ExpectedLoss

NONE: Mapping = MappingProxyType({})
Ratios = Mapping[str, float]  # task -> what it reached, as a share of its target
Sensitivity = Mapping[
    tuple[Group, str], float
]  # (group, task) -> how much tying the group is predicted to hurt the task


class FirstStep(NamedTuple):
    """What is tried before sensitivity is predicted.

    share: of what can be saved; 0: nothing is tried. chance: that it succeeds, where that is known. ties_stems: whether
    first layers are among it; those of models trained apart have no weights that serve all, and who gives them its own
    follows from predicted sensitivity. trials_take_long: whether some saving is to come early for that.
    """

    share: float = 0.0
    chance: float = 0.0
    ties_stems: bool = True
    trials_take_long: bool = False


class Strategy(ABC):
    """What the merger asks of a strategy; what an earlier run kept (`adopted`) is part of every proposal."""

    adopted: Configuration = ()
    learn_quickly: Collection[str] = ()  # tasks that few steps on what they hold alone bring far
    tied_share: float = 0.0  # of what could be saved, that trials which are trained save at least, or as a rule
    first_step: FirstStep = FirstStep()
    goal_saving: int | None = None  # bytes; the search is over as soon as what is kept saves as many

    @property
    @abstractmethod
    def kept(self) -> Configuration:
        """What is tied in the last trial that was kept."""

    @abstractmethod
    def propose(self) -> Configuration | None:
        """The next configuration to try, with everything that is kept; None when nothing is left to try."""

    @property
    def about_to_do(self) -> str:
        """What the next rounds do, in words, for the line above their table."""
        return "each round ties more groups and trains"

    @property
    def effort(self) -> int:
        """How costly the next trial is, by the step of the search that it belongs to: 0 in the first one."""
        return 0

    @property
    def searched_apart(self) -> Sequence[Collection[str]]:
        """Sets of tasks of which a trial changes one alone; empty: a trial may change all tasks."""
        return ()

    @abstractmethod
    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE) -> None:
        """Says how the last proposal ended.

        kept: the whole proposal met its targets. met: the tasks that met their target in the trial. ratios: of the
        tasks whose weights the trial changed, before a short training that followed a fit.
        """

    def chance(self, proposal: Configuration) -> float:
        """The probability that all tasks meet their targets once weights are fitted; 0 where nothing is known."""
        return 0.0

    @abstractmethod
    def state(self) -> dict:
        """Everything that the next proposals depend on, as JSON values."""

    @abstractmethod
    def load_state(self, state: dict) -> None:
        """Continues from what `state` returned."""

    def begin_with(self, choose: Callable[[Configuration], FirstStep]) -> None:
        """Says, by the groups of a search, what to try before sensitivity is predicted; here: nothing."""
        self.first_step = FirstStep()

    @property
    def trials_take_long(self) -> bool:
        """Whether fits take long, so that some saving is to come early."""
        return self.first_step.trials_take_long

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the next proposal depends on predicted sensitivities, and none were given yet."""
        return False

    @property
    def refits_all_changes(self) -> bool:
        """Whether weights are fitted for every layer that a trial changes, not only for newly tied ones."""
        return False

    @property
    def fits_to_what_is_kept(self) -> bool:
        """Whether layers are fitted to the kept models, with all that these learned, not to the unmerged ones."""
        return False

    @property
    def releases_before_training(self) -> bool:
        """Whether a trial whose fitted weights miss a target is not trained; the next one then ties fewer layers."""
        return False

    @property
    def continues_failed_trial(self) -> bool:
        """Whether the next trial starts from the weights of the failed one, not from the kept ones."""
        return False

    @property
    def trains_alone_at_length(self) -> bool:
        """Whether tasks that a fit leaves below their targets may be trained for long in what they hold alone."""
        return False

    @property
    def trains_alone_shortly(self) -> bool:
        """Whether they may be trained for no longer than another fit takes, which may follow."""
        return self.releases_before_training and not self.trains_alone_at_length

    @property
    def keeps_verified_part(self) -> bool:
        """Whether tasks that met their targets in a failed trial keep what they share among themselves."""
        return False

    def keep_part(self, kept: Configuration) -> None:
        """Says that this was kept of the last trial, which had failed; after `record`, if `keeps_verified_part`."""
        raise NotImplementedError(f"{type(self).__name__} keeps whole trials only")

    def set_sensitivity(  # noqa: B027 (of use to some only)
        self,
        sensitivity: Sensitivity,
        misfit: Sensitivity = NONE,
        reached: Ratios = NONE,
        losses: Mapping[str, ExpectedLoss] = NONE,
    ) -> None:
        """Takes the predictions for every group and task, before the first proposal.

        sensitivity: error at the outputs of the task's model, relative to their variance, if the group is tied. misfit:
        the same at the outputs of the group's layer. reached: of each task now. losses: of each task, the accuracy /
        target that sensitivity is expected to cost.
        """

    def predicted_sensitivity(self) -> Mapping[Occurrence, float]:
        """How much tying its group is predicted to hurt the task of an occurrence; nothing if nothing was predicted."""
        return {}

    def closest_to_goal(self) -> tuple[Configuration, Ratios] | None:
        """Of trials that save `goal_saving` and that every search tries, whatever its targets, the best one's ratios.

        None as long as there are trials of this kind to try, and of a strategy that has none.
        """
        return None

    def donor_of(self, group: Group) -> str | None:
        """The task whose weights a group takes as they are; None: they are fitted to all of its tasks."""
        return None

    def adopt(self, kept: Configuration) -> None:
        """Starts from what an earlier run over some of these tasks kept."""
        self.adopted = kept

    def keep_more(self, kept: Configuration) -> None:
        """Says, once the search is over, that this is tied: all that it kept, and what was tied after it."""
        self.adopted = kept

    def with_adopted(self, configuration: Configuration) -> Configuration:
        """The configuration together with what was adopted."""
        return joined(self.adopted, configuration) if self.adopted else configuration
