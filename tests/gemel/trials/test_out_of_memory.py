"""Memory that runs out outside of training: less work, then without it; the merge goes on."""

import pytest
import torch

from gemel.trials import sensitivity, state
from gemel.trials.out_of_memory import BATCHES, on_fewer_images
from merge_workloads import merge_workload


def test_work_is_done_on_fewer_images():
    asked = []

    def work(num_pixels, max_batch):
        asked.append((num_pixels, max_batch))
        if max_batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert on_fewer_images("a test", 1024, work) == "done"
    assert asked == [(1024, BATCHES[0]), (512, 8), (256, 4)]


def test_other_failures_are_raised():
    def broken(num_pixels, max_batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        on_fewer_images("a test", 1024, broken)


@pytest.mark.parametrize("never", [False, True])
def test_alignment_and_prediction_that_do_not_fit(entries, datasets, tmp_path, monkeypatch, caplog, never):
    """Both run out of memory: the first time, or always; the merge ends, and says what it had to leave out."""
    failed = []

    def crowded(module, name):
        honest = getattr(module, name)

        def function(*args, **kwargs):
            if never or name not in failed:
                failed.append(name)
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return honest(*args, **kwargs)

        monkeypatch.setattr(module, name, function)

    crowded(state, "align")
    crowded(sensitivity, "predict_sensitivity")
    manifest = merge_workload(entries, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.3)
    assert set(failed) == {"align", "predict_sensitivity"} and manifest["run"]["finished"]
    assert manifest["memory"]["saved_bytes"] > 0 and all(task["met"] for task in manifest["tasks"].values())
    assert ("goes on without it" in caplog.text) == never and "out of memory in the alignment" in caplog.text


def test_the_models_are_undone_after_a_fit_that_does_not_fit(entries, datasets, tmp_path, monkeypatch):
    def crowded(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gemel.trials.initialisation.fit_sequentially", crowded)
    before = {n: {k: v.clone() for k, v in e["model"].state_dict().items()} for n, e in entries.items()}
    manifest = merge_workload(entries, tmp_path / "r", datasets=datasets, device="cpu", alignment="none")
    assert manifest["memory"]["saved_bytes"] == 0
    assert {row["reason"] for row in manifest["run"]["rounds"]} == {"out of memory"}
    for name, entry in entries.items():
        assert all(torch.equal(v, before[name][k]) for k, v in entry["model"].state_dict().items())
