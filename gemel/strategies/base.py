"""What a strategy is: it decides which configuration to try next.

A strategy sees groups and outcomes, never weights or data. `propose()` names the next configuration to try, in which
everything it has kept is tied as well, or None when it is done; `record()` tells it how the last proposal ended.
`state()` and `load_state()` carry it through JSON, so that an interrupted run can be resumed. `adopt()` starts it from
what an earlier run over some of these tasks kept.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Protocol

from gemel.sharing.groups import Configuration, Group, joined

NONE: Mapping = MappingProxyType({})
Ratios = Mapping[str, float]  # task -> what it reached, as a share of its target
Sensitivity = Mapping[
    tuple[Group, str], float
]  # (group, task) -> how much tying the group is predicted to hurt the task


class Strategy(Protocol):
    """What the merger asks of a strategy."""

    kept: Configuration
    uses_sensitivity: bool
    refits_all_changes: bool  # weights are fitted for every layer that a trial changes, not only for newly tied ones
    releases_before_training: bool  # where fitted weights do not reach the targets, it releases layers, trains nothing
    continues_failed_trial: (
        bool  # the next trial begins with the weights of the last one, which failed, instead of the kept ones
    )

    def set_sensitivity(self, sensitivity: Sensitivity) -> None:
        """The predicted sensitivity of every group and task; before the first proposal, if the strategy uses it."""

    def propose(self) -> Configuration | None: ...

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE, sensitivity: Sensitivity = NONE) -> None:
        """kept: the whole proposal met its targets. met: the tasks that met their target in the trial.

        ratios: of the tasks whose weights the trial changed. sensitivity: of every group and task of a failed trial,
        if the strategy uses it.
        """

    def donor_of(self, group: Group) -> str | None:
        """The task whose weights a group takes as they are; None: they are fitted to all of its tasks."""

    def adopt(self, kept: Configuration) -> None: ...

    def state(self) -> dict: ...

    def load_state(self, state: dict) -> None: ...


class Adopting:
    """What all strategies have in common: what an earlier run kept is part of every proposal."""

    uses_sensitivity = refits_all_changes = releases_before_training = continues_failed_trial = False
    adopted: Configuration = ()

    def set_sensitivity(self, sensitivity: Sensitivity) -> None:
        pass

    def donor_of(self, group: Group) -> str | None:
        return None

    def adopt(self, kept: Configuration) -> None:
        self.adopted = kept

    def with_adopted(self, configuration: Configuration) -> Configuration:
        return joined(self.adopted, configuration) if self.adopted else configuration
