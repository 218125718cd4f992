"""Why a group is not shared at the end: the question that everybody asks, answered in a word and a number."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemel.sharing.groups import Configuration, Group, Occurrence
from gemel.training.outcome import NOT_FINITE, OUT_OF_MEMORY

BELOW_TARGET, NOT_TRIED, NOT_WORTH_A_TRIAL = "below target", "not tried", "not worth a trial"
TIME_OVER, GOAL_REACHED = "the time was over", "the memory goal was reached"

Attempts = dict[str, dict[str, int]]  # task -> layer -> the last round in which it was tied and could not be kept


def add_attempts(attempts: Attempts, number: int, proposal: Configuration, kept: Configuration) -> None:
    """Notes what the round of this number tied and did not keep."""
    tied = {occurrence for group in kept for occurrence in group.occurrences}
    for group in proposal:
        for occurrence in group.occurrences:
            if occurrence not in tied:
                attempts.setdefault(occurrence.task, {})[occurrence.layer] = number


def not_shared(
    groups: Configuration,
    kept: Configuration,
    rounds: Sequence[Mapping[str, Any]],
    attempts: Attempts,
    sensitivity: Mapping[Occurrence, float],
    untried: str | None,
) -> list[dict[str, Any]]:
    """An entry for each group that is not wholly shared, the largest missing saving first (docs/results.md).

    untried: why the search ended before everything was tried; None: everything was.
    """
    entries = []
    for group in groups:
        left_out = _left_out(group, kept)
        if left_out:
            entry = {
                "signature": group.signature,
                "could_save_bytes": _missing_bytes(group, kept),
                "occurrences": [occurrence._asdict() for occurrence in left_out],
                **_why(left_out, rounds, attempts, untried),
                "sensitivity": max((sensitivity[o] for o in left_out if o in sensitivity), default=None),
            }
            entries.append(entry)
    return sorted(entries, key=lambda entry: -entry["could_save_bytes"])


def _parts(group: Group, kept: Configuration) -> list[set[Occurrence]]:
    """Its occurrences that share with each other, the largest part first."""
    own = set(group.occurrences)
    found = (own & set(other.occurrences) for other in kept)
    return sorted((part for part in found if len(part) > 1), key=len, reverse=True)


def _left_out(group: Group, kept: Configuration) -> list[Occurrence]:
    """Occurrences outside the largest part that shares."""
    largest = next(iter(_parts(group, kept)), set())
    return [occurrence for occurrence in group.occurrences if occurrence not in largest]


def _missing_bytes(group: Group, kept: Configuration) -> int:
    return group.bytes * (len(group.occurrences) - 1 - sum(len(part) - 1 for part in _parts(group, kept)))


def _why(
    left_out: Sequence[Occurrence], rounds: Sequence[Mapping[str, Any]], attempts: Attempts, untried: str | None
) -> dict[str, Any]:
    tried = {o: attempts[o.task][o.layer] for o in left_out if o.layer in attempts.get(o.task, {})}
    number = max(tried.values(), default=0)
    if not 0 < number <= len(rounds):
        return {"why": NOT_TRIED, "detail": untried} if untried else {"why": NOT_WORTH_A_TRIAL}
    row = rounds[number - 1]
    if row["reason"] in (OUT_OF_MEMORY, NOT_FINITE):
        return {"why": row["reason"], "round": number}
    targets = row.get("targets", {})
    missed = [task for task in row["trained"] if task not in row["met"] and task in targets]
    own = [o.task for o, last in tried.items() if last == number and o.task in missed]
    if not missed:
        return {"why": row["reason"], "round": number}
    worst = min(own or missed, key=lambda task: row["accuracies"][task] / targets[task])
    reached = {"task": worst, "accuracy": row["accuracies"][worst], "target": targets[worst]}
    return {"why": BELOW_TARGET, "round": number, **reached}
