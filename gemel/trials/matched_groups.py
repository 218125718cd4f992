"""The groups of a workload: which layers pair, and their bytes in the store."""

from collections.abc import Mapping

from gemel.alignment.matching import BY_ACTIVATIONS, match_groups
from gemel.environment import ranks
from gemel.environment.threads import threads_of_waiting_ranks
from gemel.options import MergeOptions
from gemel.sharing.groups import Configuration, from_plain, to_plain
from gemel.sharing.precision import groups_as_stored
from gemel.thresholds import THRESHOLDS
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
from gemel.workload import Task


def matched_groups(
    tasks: Mapping[str, Task], state: MergeState, images: ImageSampler, options: MergeOptions
) -> Configuration:
    """Every group of the workload; the first rank matches."""

    @threads_of_waiting_ranks()
    def matched() -> Configuration:
        shown = None
        if options.matching == BY_ACTIVATIONS:
            shown = images.of_tasks(tasks, THRESHOLDS.sensitivity.alignment_pixels, "match")
        return groups_as_stored(match_groups(state.models, options.matching, shown), state.models, state.store_dtype)

    return matched() if ranks.size() == 1 else from_plain(ranks.of_first(lambda: to_plain(matched())))
