"""Merges whose store has weights of 16 bits: what ships is judged with them, and loads as it was judged."""

import copy

import pytest
import torch
from torch import nn

from dataset_manager import open_task
from gemel.evaluation.eval_method import evaluate
from gemel.results_store.load import load_merged
from gemel.results_store.verify import FAIL, verify
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.precision import weights_of
from gemel.sharing.signatures import is_normalisation
from gemel.workload import read_workload
from merge_workloads import merge_workload

QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.85, "device": "cpu"}


def merge(entries, results, datasets, **options) -> dict:
    return merge_workload(entries, results, datasets=datasets, **{**QUICK, "store_dtype": "float16", **options})


def copies_of(entries) -> dict[str, nn.Module]:
    return {name: copy.deepcopy(entry["model"]) for name, entry in entries.items()}


def normalisation_bytes(models) -> int:
    modules = [module for model in models.values() for module in model.modules() if is_normalisation(module)]
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


@pytest.mark.parametrize("strategy", ["adaptive", "gemel", "all", "stem"])
@pytest.mark.parametrize("store_dtype", ["float16", "bfloat16"])
def test_what_ships_is_judged_as_it_loads(entries, trained_entries, datasets, tmp_path, strategy, store_dtype):
    manifest = merge(entries, tmp_path / "results", datasets, strategy=strategy, store_dtype=store_dtype)
    assert manifest["memory"]["saved_bytes"] > 0
    assert manifest["precision"] == {"weights": store_dtype, "arithmetic": "float32", "device": "cpu"}
    loaded = load_merged(tmp_path / "results", copies_of(trained_entries))
    for name, task in read_workload(entries)[0].items():
        data = open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=8)
        record = manifest["tasks"][name]
        assert evaluate(task, data.val, loaded[name]) == record["merged_acc"] >= record["target_acc"]
        assert {p.dtype for p in weights_of(loaded[name])} == {getattr(torch, store_dtype)}
    assert manifest["memory"]["merged_bytes"] == distinct_bytes(loaded)
    assert not [check for check in verify(tmp_path / "results") if check.status == FAIL]
