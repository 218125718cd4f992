"""A fault at the k-th call of what can fail: the folder stays valid, the fault is named, the next run goes on."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemel.datasets.folders import ClassificationFolder
from gemel.evaluation import eval_method
from gemel.results_store import files
from gemel.results_store.manifest import has_results, read_result
from gemel.results_store.verify import verify
from merge_workloads import merge_workload

OPTIONS = {"device": "cpu", "tolerance": 0.5, "strategy": "adaptive", "max_epochs": 1.0}
NUM_PLACES = 8  # of a fault, evenly spread over the calls of a whole merge


class FailsAt:
    """Counts calls, and raises at the k-th."""

    def __init__(self, k: int, error: Exception):
        self.k, self.error, self.calls = k, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.k:
            raise self.error

    def before(self, honest: Callable) -> Callable:
        def function(*args, **kwargs):
            self()
            return honest(*args, **kwargs)

        return function


class Allocations(TorchDispatchMode):
    """Every operation of torch, each of which may allocate."""

    def __init__(self, fault: FailsAt):
        super().__init__()
        self.fault = fault

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fault()
        return func(*args, **(kwargs or {}))


ERRORS = {
    "allocation": torch.OutOfMemoryError("CUDA out of memory"),
    "evaluation": RuntimeError("the evaluation failed"),
    "loader": OSError("the disk with the images is gone"),
    "write": OSError(28, "No space left on device"),
}
SITES = {
    "evaluation": (eval_method, "_evaluate_once"),
    "loader": (ClassificationFolder, "read"),
    "write": (files, "stage"),
}


@pytest.fixture
def two_tasks(trained_entries):
    return lambda: {name: copy.deepcopy(trained_entries[name]) for name in ("north_pico", "south_pico")}


@pytest.fixture
def run(two_tasks, datasets, tmp_path):
    """Merges with a fault at the k-th call; returns (folder, what was raised, number of calls)."""

    def run(what: str, k: int):
        fault, folder = FailsAt(k, ERRORS[what]), tmp_path / f"{what}{k}"
        with pytest.MonkeyPatch.context() as patch:
            if what in SITES:
                owner, name = SITES[what]
                patch.setattr(owner, name, fault.before(getattr(owner, name)))
            raised = None
            try:
                if what == "allocation":
                    with Allocations(fault):
                        merge_workload(two_tasks(), folder, datasets=datasets, **OPTIONS)
                else:
                    merge_workload(two_tasks(), folder, datasets=datasets, **OPTIONS)
            except Exception as error:
                raised = error
        return folder, raised, fault.calls

    return run


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ERRORS)
def test_a_fault_at_any_call(what, run, two_tasks, datasets):
    _, raised, num_calls = run(what, 0)
    assert raised is None and num_calls >= 4, "the calls of a merge without a fault"
    places = {1 + i * (num_calls - 1) // (NUM_PLACES - 1) for i in range(NUM_PLACES)}  # all, where there are few
    for k in sorted(places):
        folder, raised, _ = run(what, k)
        if raised is not None:
            assert str(ERRORS[what].args[-1]) in f"{raised} {raised.__cause__}", f"call {k}: {raised!r}"
        if has_results(folder):
            read_result(folder)
        manifest = merge_workload(two_tasks(), folder, datasets=datasets, **OPTIONS)
        assert manifest["run"]["finished"] and all(task["met"] for task in manifest["tasks"].values()), f"call {k}"
        assert not [check for check in verify(folder) if check.status == "FAIL"], f"call {k}"
