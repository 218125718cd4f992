"""What stands beside the models in a round of training: unmerged models as teachers, frozen prefixes."""

from collections.abc import Collection, Mapping
from typing import Any

from gemel.datasets.loaders import TaskData, repeats
from gemel.environment import ranks
from gemel.sharing.groups import Configuration, compared_layers
from gemel.training.cut import Cuts
from gemel.training.distillation import Teacher
from gemel.training.options import TrainingOptions
from gemel.training.prefix import Prefix, prefix_of
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
from gemel.workload import CLASSIFICATION, Task

IMAGES_OF_A_CUT = 4


def teachers_of(
    state: MergeState, tasks: Mapping[str, Task], proposal: Configuration, options: TrainingOptions
) -> dict[str, Teacher]:
    """The unmerged models beside those that this rank trains, if training compares with them or has no labels."""
    models, unmerged = state.models, state.unmerged
    return {
        name: Teacher(
            models[name],
            unmerged[name],
            compared_layers(models[name], name, proposal) if options.weight_of("features", task) > 0 else (),
        )
        for name, task in tasks.items()
        if ranks.takes_part(name)
        if options.teaches or not task.labels
    }


class FrozenPrefixes:
    """The frozen first layers of classifiers over the rounds of a merge.

    limit: bytes per task of outputs that are kept in memory.
    """

    def __init__(self, state: MergeState, data: Mapping[str, TaskData], images: ImageSampler, limit: int):
        self.state, self.data, self.images, self.limit = state, data, images, limit
        self._cuts: dict[str, Cuts] = {}
        self._last: dict[str, Prefix] = {}

    def of_round(self, names: Collection[str], proposal: Configuration, resumed: bool) -> dict[str, Prefix]:
        """What the named classifiers that this rank trains compute before their first tied layers.

        Outputs that were kept in an earlier round are used again where they would be the same. resumed: the weights of
        the round are yet to be loaded, so nothing can be kept of it.
        """
        found = {}
        for name in ranks.taking_part(names):
            tied = {o.layer for group in proposal for o in group.occurrences if o.task == name}
            is_classifier = self.images.tasks[name].kind == CLASSIFICATION
            cut = self._cuts_of(name).before(tied) if is_classifier else None
            if cut is not None:
                dataset: Any = self.data[name].train.dataset
                keeps_training = repeats(dataset)
                prefix = prefix_of(self.state.models[name], cut, self.limit, keeps_training)
                known = self._last.get(name)
                found[name] = known if known is not None and prefix.computes_the_same_as(known) else prefix
        self._last = {} if resumed else {**self._last, **found}
        return found

    def _cuts_of(self, name: str) -> Cuts:
        if name not in self._cuts:
            images = self.images.first_of(name, IMAGES_OF_A_CUT, "prefix")
            self._cuts[name] = Cuts(self.state.unmerged[name], images)
        return self._cuts[name]
