"""What tests of stores with weights of 16 and of 8 bits have in common."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
from torch import nn

from merger import Merger

QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.5, "device": "cpu"}


def copies_of(entries) -> dict[str, nn.Module]:
    return {name: copy.deepcopy(entry["model"]) for name, entry in entries.items()}


def two_of(entries) -> dict:
    return {name: copy.deepcopy(entries[name]) for name in ("north_pico", "south_pico")}


@contextlib.contextmanager
def interrupted_in_the_second_round() -> Iterator[None]:
    """Within, a merge must end by Ctrl-C when its second round begins."""
    play_round = Merger.play_round

    def interrupted(self, proposal):
        if len(self.record.rounds) == 1:
            raise KeyboardInterrupt
        return play_round(self, proposal)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Merger, "play_round", interrupted)
        yield
