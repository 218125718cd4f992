"""The phases of the adaptive strategy and their order."""

SEARCH, FILL, TRAIN, DONE = "search", "fill in", "fill in with training", "done"
WITH_ADAPTERS, TRAIN_WITH_ADAPTERS = "fill in with adapters", "fill in with adapters and training"
ABOUT_TO_DO = {  # in the next rounds; short enough for one line
    SEARCH: "predicts how much sharing hurts, then ties what saves most",
    FILL: "ties what is missing, in smaller parts",
    WITH_ADAPTERS: "ties what is missing, with small private adapters",
    TRAIN_WITH_ADAPTERS: "trains what is missing, with small private adapters",
    TRAIN: "trains what is missing, in ever smaller parts",
    DONE: "everything was tried",
}
USUALLY = (SEARCH, FILL, WITH_ADAPTERS, TRAIN_WITH_ADAPTERS, TRAIN, DONE)
ADAPTERS_FIRST = (SEARCH, WITH_ADAPTERS, FILL, TRAIN_WITH_ADAPTERS, TRAIN, DONE)  # where the search promises little


def following(phase: str, adapters_first: bool) -> str:
    """The phase after one that is not the last."""
    order = ADAPTERS_FIRST if adapters_first else USUALLY
    return order[order.index(phase) + 1]
