"""Keeps samples in memory after they were read once, up to a number of bytes for all splits of a task together."""

from typing import Any

import torch
from torch.utils.data import get_worker_info

SPLITS_THAT_KEEP = 3  # train, val, and train without augmentation


class CacheBudget:
    """Bytes that the caches of one task may take together; who comes first is served.

    Every loader process has a budget of its own, with an equal part of the bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0

    def take(self, num_bytes: int) -> bool:
        """Takes so many bytes for good; False if they are not left."""
        worker = get_worker_info()
        limit = self.limit if worker is None else self.limit // (SPLITS_THAT_KEEP * worker.num_workers)
        if self.num_bytes + num_bytes > limit:
            return False
        self.num_bytes += num_bytes
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "num_bytes": 0}


class SampleCache:
    """What was made of the samples of one split, by index, until the budget is spent; further samples are not kept.

    whole: whether samples are the same each time, so that all of a sample can be kept. It gives what it was given: who
    changes that makes a copy first. Pickling leaves the samples out.
    """

    def __init__(self, budget: CacheBudget, whole: bool = True) -> None:
        self.budget, self.whole = budget, whole
        self.num_bytes, self.is_full = 0, False
        self.samples: dict[int, Any] = {}

    def get(self, index: int) -> Any:
        """What is kept of the sample; None if nothing is."""
        return self.samples.get(index)

    def put(self, index: int, sample: Any, num_bytes: int) -> None:
        """Keeps the sample, unless it exceeds the budget; then nothing more is kept."""
        if index in self.samples or self.is_full:
            return
        self.is_full = not self.budget.take(num_bytes)
        if not self.is_full:
            self.samples[index] = sample
            self.num_bytes += num_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "num_bytes": 0, "is_full": False, "samples": {}}


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a tensor, dictionary, tuple or list."""
    if torch.is_tensor(value):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, (tuple, list)) else 0
