"""Memory of a workload, counted over distinct tensors: a shared one counts once."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from gemel.forward.modes import Models


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """State-dict key -> the parameter or buffer object itself (not a detached alias)."""
    return model.state_dict(keep_vars=True)


def distinct_tensors(models: Models) -> Iterator[Tensor]:
    """Every parameter and saved buffer of the workload, each object once."""
    seen = set()
    for model in models.values():
        for tensor in named_tensors(model).values():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def distinct_bytes(models: Models) -> int:
    """Bytes of the workload's distinct parameters and buffers."""
    return sum(tensor.nbytes for tensor in distinct_tensors(models))


@dataclass(frozen=True)
class Memory:
    """Bytes of a workload before and after merging, and the most that merging could save."""

    unmerged_bytes: int
    merged_bytes: int
    optimal_saved_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.unmerged_bytes - self.merged_bytes

    @property
    def saved_of_optimal(self) -> float:
        """Share of the possible saving that was reached; 1.0 where nothing could be saved."""
        return self.saved_bytes / self.optimal_saved_bytes if self.optimal_saved_bytes else 1.0
