"""The state of a round whose tasks are trained by several ranks, in the form in which one process has it.

So a round that was interrupted goes on with any number of ranks. The state of the optimizer is by the position of each
parameter in the list that one process gives it: shared parameters first, then private ones, in the order of the models.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gemel.environment import ranks
from gemel.forward.modes import Models


def names_of(models: Models, parameters: Sequence[nn.Parameter]) -> list[str]:
    """ "task.name" of each parameter, with the first task that holds it."""
    found: dict[nn.Parameter, str] = {}
    for task, model in models.items():
        for name, parameter in model.named_parameters():
            found.setdefault(parameter, f"{task}.{name}")
    return [found[parameter] for parameter in parameters]


def positions(models: Models, trained: Sequence[nn.Parameter]) -> list[int]:
    """Where the parameters that this rank trains are in the list of all that are trained; all ranks ask."""
    everywhere = {name for part in ranks.gathered(names_of(models, trained)) for name in part}
    holders: dict[nn.Parameter, int] = {}
    for model in models.values():
        for parameter in model.parameters():
            holders[parameter] = holders.get(parameter, 0) + 1
    named = list(zip(names_of(models, list(holders)), holders.values(), strict=True))
    ordered = [name for name, count in named if count > 1] + [name for name, count in named if count == 1]
    index = {name: i for i, name in enumerate(name for name in ordered if name in everywhere)}
    return [index[name] for name in names_of(models, trained)]


def united_state(state: dict, models: Models) -> dict:
    """The state of all ranks' tasks, on the first rank; on the others an empty one.

    state: of the round, with what JointStep.state returns on this rank. models: those that are trained, of all ranks.
    """
    if ranks.size() == 1:
        return state
    mine = ranks.mine(models)
    part = {**state, "members": {name: state["members"][name] for name in mine}}
    buffer = io.BytesIO()
    torch.save(part, buffer)
    messages = ranks.sent_to_first(buffer.getvalue())
    if not ranks.is_first():
        return {}
    parts = [torch.load(io.BytesIO(m), map_location="cpu", weights_only=True) for m in messages]
    whole: dict[str, Any] = {**parts[0]}
    for key in ("models", "averaged", "members"):
        whole[key] = {name: value for part in parts for name, value in part[key].items()}
    whole["members"] = {name: whole["members"][name] for name in models}
    states = {part["positions"][i]: values for part in parts for i, values in part["optimizer"]["state"].items()}
    num_trained = 1 + max(position for part in parts for position in part["positions"])
    groups = [{**group, "params": list(range(num_trained))} for group in parts[0]["optimizer"]["param_groups"]]
    whole["optimizer"] = {"state": {i: states[i] for i in sorted(states)}, "param_groups": groups}
    del whole["positions"]
    return whole


def state_of_rank(state: dict, models: Models, trained: Sequence[nn.Parameter]) -> dict:
    """Of the state of all ranks' tasks what this rank holds; trained: the parameters of its optimizer."""
    if ranks.size() == 1:
        return state
    mine, places = set(ranks.taking_part(models)), positions(models, trained)
    averaged = {key: v for key, v in state["averaged"].items() if "." not in key or key.split(".")[1] in mine}
    states = state["optimizer"]["state"]
    own = {i: states[position] for i, position in enumerate(places) if position in states}
    groups = [{**group, "params": list(range(max(1, len(places))))} for group in state["optimizer"]["param_groups"]]
    return {**state, "averaged": averaged, "optimizer": {"state": own, "param_groups": groups}}
