"""The models of a result as they load from disk, one at a time, so that a large workload is not in memory twice."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from gemel.merging.architecture import Architectures
from gemel.trials.state import MergeState


class ReloadedModels(Mapping[str, nn.Module]):
    """Task -> its model, loaded when it is asked for; only the last one is kept.

    Each is compared, bit by bit, with the live one: raises RuntimeError where it is not what was judged, and
    ResultsError where the folder is not a valid result.
    """

    def __init__(self, results_path: Path, state: MergeState, architectures: Architectures):
        self.results_path, self.state, self.architectures = results_path, state, architectures
        self._last: tuple[str, nn.Module] | None = None

    def check(self) -> None:
        """Loads every model once, and with the first one also verifies the sha256 of the store."""
        for number, name in enumerate(self):
            self._load(name, verify=number == 0)

    def __getitem__(self, name: str) -> nn.Module:
        if self._last is None or self._last[0] != name:
            self._load(name)
        assert self._last is not None
        return self._last[1]

    def _load(self, name: str, verify: bool = False) -> None:
        self._last = None  # before the next one is there
        model = self.architectures.reload(self.results_path, name, verify)
        if (different := self.state.difference_to({name: model})) is not None:
            raise RuntimeError(f"{different}: reloaded from {self.results_path} it is not what was judged")
        self._last = name, model

    def __iter__(self) -> Iterator[str]:
        return iter(self.state.models)

    def __len__(self) -> int:
        return len(self.state.models)
