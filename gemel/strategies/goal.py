"""Configurations that just save enough, and release what the tasks are most sensitive to.

Those of a memory goal depend on predicted sensitivities alone, not on targets, and a search that has a goal tries all
of them as long as none succeeds: so what one of them reached also holds for a search with other targets.
"""

import itertools
from collections.abc import Mapping, Sequence

from gemel.sharing.groups import Configuration, ordered, saved_bytes

Costs = Mapping[tuple[int, str], float]  # (index of a group, task) -> what tying the task there is expected to cost it


def just_enough(groups: Configuration, costs: Costs, saving: int) -> Configuration | None:
    """The groups without what can be released so that they still save as many bytes; None: they do not save as many.

    Again and again the task with the highest expected cost releases its most expensive group per byte. Only what has an
    entry in `costs` is released. Of a group that two tasks share, both are released.
    """
    spare = saved_bytes(groups) - saving
    if spare < 0:
        return None
    tied = [set(group.tasks) for group in groups]
    left: dict[str, list[int]] = {}  # task -> what it could release, the most expensive per byte last
    for i, task in sorted(costs, key=lambda key: costs[key] / groups[key[0]].bytes):
        left.setdefault(task, []).append(i)
    total = {task: sum(costs[i, task] for i in own) for task, own in left.items()}
    while candidates := [task for task in sorted(left) if left[task]]:
        worst = max(candidates, key=total.__getitem__)
        i = left[worst].pop()
        if worst not in tied[i] or groups[i].bytes > spare:
            continue
        released = tied[i] if len(tied[i]) == 2 else {worst}
        if any((i, task) not in costs for task in released):
            continue
        spare -= groups[i].bytes
        for task in released:
            total[task] -= costs[i, task]
        tied[i] = tied[i] - released
    kept = (group.restricted_to(tasks) for group, tasks in zip(groups, tied, strict=True))
    return ordered(group for group in kept if len(group.occurrences) > 1)


def least_sensitive(groups: Configuration, density: Sequence[float], saving: float) -> Configuration:
    """As few groups as save as many bytes, the ones of the least density first, of equal density the largest ones.

    density: of each group, how much tying it is expected to hurt, per byte.
    """
    order = sorted(range(len(groups)), key=lambda i: (density[i], -groups[i].saved_bytes, -i))
    saved = itertools.accumulate((groups[i].saved_bytes for i in order), initial=0)  # by those that come before each
    return ordered(groups[i] for i, before in zip(order, saved, strict=False) if before < saving)
