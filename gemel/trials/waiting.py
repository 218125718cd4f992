"""Where memory is short, models that no trial changes now wait: in host memory, or in files where that is the device.

Only tasks that share nothing with each other are searched apart (gemel/strategies/components.py), so only their models
can wait. What waits keeps its values bit by bit; it can be read and stored as it is, and comes back before it computes.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from gemel.environment.events import emit
from gemel.forward.modes import Models
from gemel.sharing.residence import for_files, movable, to_file, to_host, to_memory_of


class Waiting:
    """Keeps the models of one component in the memory of the device, with their unmerged copies.

    apart: the components, sets of tasks; as long as it is empty nothing waits.
    """

    def __init__(self, models: nn.ModuleDict, unmerged: nn.ModuleDict, device: torch.device):
        self.models, self.unmerged, self.device = models, unmerged, device
        self.apart: Sequence[Collection[str]] = ()
        self._away: list[Tensor] = []

    @property
    def bytes_away(self) -> int:
        """Bytes of the tensors that wait now."""
        return sum(tensor.nbytes for tensor in self._away)

    def all_but(self, names: Collection[str]) -> None:
        """Lets all models wait but those of the components that these tasks are of, which come back.

        Of a shared parameter all holders are in one component. A tensor that another one is a view of stays.
        """
        if not self.apart:
            return
        present = {task for part in self.apart if set(part) & set(names) for task in part} | set(names)
        others = [name for name in self.models if name not in present]
        wanted, away = {id(tensor) for tensor in self._movable(present)}, {id(tensor) for tensor in self._away}
        self._send([tensor for tensor in self._movable(others) if id(tensor) not in away | wanted])
        self._bring(wanted)
        if {id(tensor) for tensor in self._away} != away:
            emit("models wait", tasks=others, bytes=self.bytes_away)

    def bring_all(self) -> None:
        """Brings all models back, until the next trial."""
        self._bring({id(tensor) for tensor in self._away})

    def end(self) -> None:
        """Brings all models back for good."""
        self.apart = ()
        self.bring_all()

    def _send(self, tensors: list[Tensor]) -> None:
        on_cpu = self.device.type == "cpu"
        for tensor in for_files(tensors) if on_cpu else tensors:
            self._away.append(tensor)
            tensor.grad = None
            (to_file if on_cpu else to_host)(tensor)

    def _bring(self, ids: set[int]) -> None:
        for tensor in [tensor for tensor in self._away if id(tensor) in ids]:
            to_memory_of(self.device, tensor)
        self._away = [tensor for tensor in self._away if id(tensor) not in ids]

    def _movable(self, names: Collection[str]) -> list[Tensor]:
        return [tensor for models in (self.models, self.unmerged) for tensor in movable(_of(models, names))]


def _of(models: nn.ModuleDict, names: Collection[str]) -> Models:
    return {name: models[name] for name in models if name in names}
