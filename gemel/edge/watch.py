"""Watching merged models: sampled frames also go through the unmerged model, and a task may go back to it.

Merged weights were judged on the images of val. Where the stream changes (season, light, a camera that moved), a merged
model may begin to differ from the unmerged one more than was agreed. That shows without labels: as their agreement
(gemel/evaluation/agreement.py) on sampled frames, tested after each of them (falling_mean.py).
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemel.edge.falling_mean import FallingMean

NUM_REFERENCE = 100  # sampled frames that serve as reference where the results do not state the agreement
NUM_RECENT = 100  # of the newest sampled frames, whose mean agreement is reported
WENT_BACK = "went back"


@dataclass(frozen=True)
class WatchOptions:
    """How merged models are watched.

    rate: share of the frames that are sampled, in (0, 1]. store: results folder of the unmerged models; None:
    `unmerged` in the results folder. alpha: probability, over the whole stream, that any task goes back although no
    agreement has fallen below its level. seed: of the sampling. on_event: is told when a task goes back.
    """

    rate: float
    store: str | Path | None = None
    alpha: float = 0.05
    seed: int = 0
    on_event: Callable[[dict[str, Any]], object] = lambda event: None

    def __post_init__(self) -> None:
        wrong = [
            f"watch: {name}: got {value}; allowed: a number in {allowed}"
            for name, value, allowed, fits in (
                ("rate", self.rate, "(0, 1]", 0 < self.rate <= 1),
                ("alpha", self.alpha, "(0, 1)", 0 < self.alpha < 1),
            )
            if not fits
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass
class WatchedTask:
    """One task: what was agreed, what was seen, and whether it went back."""

    tolerance: float  # by how much the agreement may fall
    agreed: float | None  # None: the first NUM_REFERENCE frames will say
    alpha: float
    num_sampled: int = 0
    total: float = 0.0
    recent: deque = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    test: FallingMean | None = None
    went_back_at: int | None = None  # the frame

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        if self.agreed is not None:
            self.test = FallingMean(max(0.0, self.agreed - self.tolerance), self.alpha)

    def observe(self, agreement: float) -> bool:
        """Takes the agreement on a frame; whether it has fallen below what was agreed, less the tolerance."""
        self.num_sampled += 1
        self.total += agreement
        self.recent.append(agreement)
        if self.test is not None:
            return self.test.observe(agreement)
        if self.num_sampled == NUM_REFERENCE:
            self.agreed = self.total / NUM_REFERENCE
            self._begin()
        return False

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        mean = self.total / self.num_sampled if self.num_sampled else None
        return {
            "sampled": self.num_sampled,
            "agreement": None if mean is None else round(mean, 6),
            "agreement_recently": round(sum(self.recent) / len(self.recent), 6) if self.recent else None,
            "agreed": self.agreed,
            "level": None if self.test is None else self.test.level,
            "evidence": None if self.test is None else float(f"{self.test.evidence:.6g}"),
            "went_back_at": self.went_back_at,
        }


class Watch:
    """The watched tasks of one run. tasks: of the manifest, those that run."""

    def __init__(self, options: WatchOptions, tasks: Mapping[str, Mapping[str, Any]]):
        self.options = options
        self.tasks = {
            name: WatchedTask(
                tolerance=1 - record["target_acc"] / record["unmerged_acc"],
                agreed=record.get("agreement"),
                alpha=options.alpha / len(tasks),
            )
            for name, record in tasks.items()
        }

    def samples(self, task: str, frames: Iterable[int]) -> list[int]:
        """Of these frames, those that are sampled for a task: by its name, the seed and the frame's number alone."""
        if self.tasks[task].went_back_at is not None:
            return []
        return [k for k in frames if _uniform(f"{self.options.seed} {task} {k}") < self.options.rate]

    def observe(self, task: str, frame: int, agreement: float) -> bool:
        """Takes the agreement of a task's models on a sampled frame; whether the task goes back now, which is told."""
        watched = self.tasks[task]
        if watched.went_back_at is not None or not watched.observe(agreement):
            return False
        watched.went_back_at = frame
        self.options.on_event({"event": WENT_BACK, "task": task, "frame": frame, **watched.summary()})
        return True

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        own = {"rate": self.options.rate, "alpha": self.options.alpha, "seed": self.options.seed}
        return {**own, "tasks": {name: task.summary() for name, task in self.tasks.items()}}


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
