"""Which ranks hold a tensor of a workload, and how all of them get the values of those that computed them.

Every rank has all models with the same ties, but trains, fits and evaluates only those of the tasks that it computes:
what only others hold is out of date until `synchronise`.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from gemel.environment import ranks
from gemel.forward.modes import Models
from gemel.sharing.memory import distinct_tensors, named_tensors
from gemel.sharing.residence import for_files, to_file


def own_models(models: Models) -> nn.ModuleDict:
    """The models of the tasks that this rank computes, in one container; with one process all of them."""
    return nn.ModuleDict({name: model for name, model in models.items() if ranks.takes_part(name)})


def held_by(models: Models) -> dict[nn.Parameter, set[int]]:
    """Every distinct parameter -> the ranks that compute tasks which hold it."""
    found: dict[nn.Parameter, set[int]] = {}
    for name, model in models.items():
        for parameter in model.parameters():
            found.setdefault(parameter, set()).update(ranks.ranks_of(name))
    return found


def synchronise(models: Models) -> None:
    """Gives every parameter and buffer, on all ranks, the value it has on the rank of the first task that holds it."""
    if ranks.size() == 1:
        return
    of_root: dict[int, list[Tensor]] = {}
    seen = set()
    for name, model in models.items():
        for tensor in named_tensors(model).values():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                of_root.setdefault(ranks.owner_of(name), []).append(tensor)
    for root in sorted(of_root):
        ranks.broadcast(of_root[root], root)


def synchronise_copies(models: Models) -> None:
    """Gives the ranks that compute a task the values that its model has on the task's own rank.

    All ranks call it. A fit runs on a task's own rank alone, so that the copies on its other ranks are out of date.
    """
    for name, model in models.items():
        if ranks.parts_of(name) and ranks.takes_part(name):
            ranks.broadcast(list(named_tensors(model).values()), ranks.owner_of(name), ranks.ranks_of(name))


def park(models: Models) -> None:
    """Moves the large tensors of other ranks' models to temporary files (residence.py), on a CPU."""
    held = {id(tensor) for tensor in _tensors(models, mine=True)}
    for tensor in for_files(tensor for tensor in _tensors(models, mine=False) if id(tensor) not in held):
        to_file(tensor)


def _tensors(models: Models, mine: bool) -> Iterator[Tensor]:
    """Distinct parameters and saved buffers of the models of the tasks that this rank computes, or of the others."""
    return distinct_tensors({name: model for name, model in models.items() if ranks.takes_part(name) == mine})
