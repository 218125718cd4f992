"""Whatever people bring ends in a valid result or in a list of problems: any dictionary, dataset and options.

No traceback, no hang, and nothing is left behind where the input is refused. The exhaustive cases, on two cores:

    python -m pytest -n 2 -m exhaustive tests/test_any_input.py
"""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from any_input import LAYOUTS, damage, damages, dictionaries, entry_of, options, write_datasets
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from gemel.report import charts
from gemel.report.html import Html
from gemel.results_store.load import load_merged
from gemel.results_store.verify import FAIL, verify
from gemel.workload import Problem, WorkloadError
from merge_workloads import merge_workload

QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
SHARDS = 8  # of the exhaustive cases, for several processes
DRAWN = st.integers(0, 9).map(lambda number: number == 9)  # drawing the charts takes longer than all the rest
anything = given(dictionaries(), LAYOUTS, damages(), options(), DRAWN)


def ends_well(model_dict, layout, changes, chosen, drawn):
    with tempfile.TemporaryDirectory() as folder, charts_drawn(drawn):
        root, results = Path(folder) / "datasets", Path(folder) / "results"
        write_datasets(root, layout)
        damage(root, changes)
        before = sorted(root.rglob("*"))
        chosen = {"datasets": root, **chosen}
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                manifest = merge_workload(model_dict, results, **chosen)
            except WorkloadError as error:
                event("refused")
                assert_listed(error)
                assert not results.exists()
            else:
                event("merged")
                assert_valid(manifest, model_dict, results)
        assert sorted(root.rglob("*")) == before
        assert {path.name for path in Path(folder).iterdir()} <= {"datasets", "results"}


def assert_listed(error):
    assert error.problems
    for problem in error.problems:
        assert isinstance(problem, Problem) and all(isinstance(part, str) for part in problem), problem
        assert problem.key and problem.got and problem.allowed, problem
        assert "AssertionError" not in problem.got, problem
    assert str(error).count("\n") == len(error.problems), str(error)


def assert_valid(manifest, model_dict, results):
    failed = [check for check in verify(results) if check.status == FAIL]
    assert not failed
    loaded = load_merged(results, {name: entry_of(name)["model"] for name in model_dict})
    assert set(loaded) == set(model_dict) == set(manifest["tasks"])
    for name, model in loaded.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, model_dict[name]["model"].state_dict()[key]), (name, key)


@contextlib.contextmanager
def charts_drawn(drawn):
    """Otherwise figures are made, but not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr(charts, "_svg", lambda figure, prefix, label: Html("<svg></svg>"))
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is logged, and no loss of power can come."""
    logging.disable(logging.WARNING)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    logging.disable(logging.NOTSET)


@settings(max_examples=100, derandomize=True, **QUIET)
@anything
def test_any_input_ends_in_a_result_or_a_list(model_dict, layout, changes, chosen, drawn):
    ends_well(model_dict, layout, changes, chosen, drawn)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_input_ends_in_a_result_or_a_list_exhaustively(shard):
    """Each shard draws cases of its own, and others in each run."""
    settings(max_examples=2000 // SHARDS, **QUIET)(anything(ends_well))()
