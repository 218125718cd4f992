"""What several models compute alike from the same images on: where one can go on from outputs of another.

Two outputs are alike where they come from equal entries by the same operations with equal parameters, normalisation and
buffers (gemel/forward/trace.py). Layers that are named differently, as in a classifier and in the backbone of a
detector, are compared by what they compute. Source of the idea: Jiang et al., "Mainstream", ATC 2018 (a stem that tasks
share runs once a frame); here for parameters that were merged, and for models with several branches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gemel.forward.trace import Point, Trace

LEAST_SHARE = 0.05  # of a model's multiplications before a point: with less, passing outputs on gains hardly anything


@dataclass(frozen=True)
class Member:
    """What one task of a group takes from the others, and gives to them."""

    points: tuple[Point, ...]  # where it can go on from outputs of another task, the latest first
    gives: dict[str, str]  # module -> number of its output, which others need
    share: float  # of its multiplications that are before its latest point


def common_points(trace: Trace, other: Trace) -> list[Point]:
    """The points of a model at which all that it needs are outputs of the other one too, in the order of the pass."""
    return [point for point in trace.points if all(number in other.outputs for number in point.needed.values())]


def with_equal_entries(traces: Mapping[str, Trace]) -> list[list[str]]:
    """Tasks whose entries are equal in every bit, two or more together."""
    found: list[list[str]] = []
    for task, traced in traces.items():
        if traced.entry is None:
            continue
        for tasks in found:
            entry = traces[tasks[0]].entry
            assert entry is not None
            if entry.shape == traced.entry.shape and torch.equal(entry, traced.entry):
                tasks.append(task)
                break
        else:
            found.append([task])
    return [tasks for tasks in found if len(tasks) > 1]


def members_of(traces: Mapping[str, Trace], tasks: Sequence[str]) -> list[dict[str, Member]]:
    """The groups among tasks with equal entries: each passes outputs on to another, directly or through others."""
    points: dict[str, list[Point]] = {task: [] for task in tasks}
    partners: dict[str, set[str]] = {task: {task} for task in tasks}
    for task in tasks:
        for other in tasks:
            common = common_points(traces[task], traces[other]) if other != task else []
            if common and common[-1].flops >= LEAST_SHARE * traces[task].flops:
                points[task].append(common[-1])
                partners[task].add(other)
                partners[other].add(task)
    wanted = {number for found in points.values() for point in found for number in point.needed.values()}
    groups, left = [], list(tasks)
    while left:
        group = _connected(left[0], partners)
        left = [task for task in left if task not in group]
        if len(group) > 1:
            groups.append({t: _member(traces[t], points[t], wanted) for t in tasks if t in group})
    return groups


def _connected(task: str, partners: Mapping[str, set[str]]) -> set[str]:
    found, waiting = {task}, [task]
    while waiting:
        new = partners[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _member(trace: Trace, points: Sequence[Point], wanted: set[str]) -> Member:
    order = {id(point): i for i, point in enumerate(trace.points)}
    latest_first = sorted({id(p): p for p in points}.values(), key=lambda p: -order[id(p)])
    gives = {names[0]: number for number, names in trace.outputs.items() if number in wanted}
    share = latest_first[0].flops / max(1, trace.flops) if latest_first else 0.0
    return Member(tuple(latest_first), gives, share)
