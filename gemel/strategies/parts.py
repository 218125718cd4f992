"""Parts: what is tied in one trial of what is missing, how a part that failed is split, how a trial is identified."""

import hashlib
from collections.abc import Collection

from gemel.sharing.groups import Configuration

Part = dict[int, tuple[str, ...]]  # index of a group -> tasks that would join it


def by_tasks(part: Part, tasks: Collection[str]) -> tuple[Part, Part]:
    """What these tasks would join, and what the others would."""
    chosen = {i: left for i, own in part.items() if (left := tuple(t for t in own if t in tasks))}
    others = {i: left for i, own in part.items() if (left := tuple(t for t in own if t not in tasks))}
    return chosen, others


def halves(part: Part) -> tuple[Part, Part]:
    """Half of the groups each, the largest savings first."""
    indices = sorted(part)
    half = (len(indices) + 1) // 2
    return {i: part[i] for i in indices[:half]}, {i: part[i] for i in indices[half:]}


def digest_of(trial: Configuration) -> str:
    """Identifies what a trial ties, and with which adapters."""
    named = sorted(",".join(f"{o.task}:{o.layer}" for o in g.occurrences) + "+" * bool(g.rank) for g in trial)
    return hashlib.sha256(";".join(named).encode()).hexdigest()[:16]
