"""How much each group of a merge is predicted to hurt each of its tasks, with the models as they are."""

import contextlib
from collections.abc import Iterator

from gemel.environment.seeds import generator
from gemel.fitting.sensitivity import Sensitivity, predict_sensitivity
from gemel.merging.images import ImageSampler
from gemel.merging.state import MergeState
from gemel.sharing.groups import Configuration, joined
from gemel.sharing.tying import restore_snapshot, retie, take_snapshot
from gemel.thresholds import THRESHOLDS


def sensitivity_of(
    state: MergeState, images: ImageSampler, configuration: Configuration, *purpose: object
) -> Sensitivity:
    """Of every group of the configuration, which is tied now. purpose: what the sample of images depends on."""
    limits = THRESHOLDS.sensitivity
    drawn = images.of_groups(configuration, limits.pixels, *purpose)
    source = generator(images.seed, *purpose)
    return predict_sensitivity(
        state.models, state.unmerged, configuration, drawn, method=limits.method, generator=source
    )


def sensitivity_if_all_were_tied(state: MergeState, images: ImageSampler, groups: Configuration) -> Sensitivity:
    """Of every group of the workload if its weights were fitted; the models stay as they are."""
    with _all_tied(state, groups):
        return sensitivity_of(state, images, groups, "foresee")


@contextlib.contextmanager
def _all_tied(state: MergeState, groups: Configuration) -> Iterator[None]:
    snapshot = take_snapshot(state.models)
    retie(state.models, state.kept, joined(state.kept, groups), state.unmerged)
    try:
        yield
    finally:
        restore_snapshot(snapshot)
