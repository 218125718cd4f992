"""The phases of the adaptive strategy and their order."""

from gemel.thresholds import FillThresholds

SEARCH, FILL, TRAIN, DONE = "search", "fill in", "fill in with training", "done"
WITH_ADAPTERS, TRAIN_WITH_ADAPTERS = "fill in with adapters", "fill in with adapters and training"
SMALLER_ADAPTERS = "make adapters smaller"
ABOUT_TO_DO = {  # in the next rounds; short enough for one line
    SEARCH: "ties what is expected to save most",
    FILL: "ties what is missing, in smaller parts",
    WITH_ADAPTERS: "ties what is missing, with small private adapters",
    SMALLER_ADAPTERS: "makes the private adapters smaller",
    TRAIN_WITH_ADAPTERS: "trains what is missing, with small private adapters",
    TRAIN: "trains what is missing, in ever smaller parts",
    DONE: "everything was tried",
}
UNTRAINED = (SEARCH, FILL, WITH_ADAPTERS, SMALLER_ADAPTERS)  # in which no shared weight is trained
WITH_ANY_ADAPTERS = (WITH_ADAPTERS, SMALLER_ADAPTERS, TRAIN_WITH_ADAPTERS)
USUALLY = (SEARCH, FILL, WITH_ADAPTERS, SMALLER_ADAPTERS, TRAIN_WITH_ADAPTERS, TRAIN, DONE)
# Where the search promised little, and everything with adapters was kept
ADAPTERS_FIRST = (SEARCH, WITH_ADAPTERS, FILL, SMALLER_ADAPTERS, TRAIN_WITH_ADAPTERS, TRAIN, DONE)


def following(phase: str, adapters_first: bool | None) -> str:
    """The phase after one that is not the last."""
    order = ADAPTERS_FIRST if adapters_first else USUALLY
    return order[order.index(phase) + 1]


def least_gain(phase: str, limits: FillThresholds) -> float:
    """Of the possible saving: a phase whose trials could save less is left out."""
    if phase == SMALLER_ADAPTERS:
        return limits.worth_smaller_adapters
    return limits.worth_adapters if phase in WITH_ANY_ADAPTERS else limits.worth_training
