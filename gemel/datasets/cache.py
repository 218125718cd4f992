"""Keeps samples in memory after they were read once: for splits without random augmentation."""

import copy
from typing import Any

import torch
from torch.utils.data import get_worker_info


class SampleCache:
    """Samples by index, up to `limit` bytes of tensors in total; further samples are not kept.

    Every loader process has a cache of its own with an equal part of the limit; pickling leaves the samples out.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self.samples: dict[int, tuple] = {}

    def get(self, index: int) -> tuple | None:
        """A copy of the sample, which the caller may change; None if it is not kept."""
        sample = self.samples.get(index)
        return None if sample is None else copy.deepcopy(sample)

    def put(self, index: int, sample: tuple) -> None:
        """Keeps a copy of the sample if it fits into the limit."""
        worker = get_worker_info()
        limit = self.limit // worker.num_workers if worker is not None else self.limit
        size = _bytes_of(sample)
        if index not in self.samples and self.num_bytes + size <= limit:
            self.samples[index] = copy.deepcopy(sample)
            self.num_bytes += size

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "num_bytes": 0, "samples": {}}


def _bytes_of(value: Any) -> int:
    if torch.is_tensor(value):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (tuple, list)) else 0
