"""--retry TASK --data NEW: one task is merged again with other data, the others keep what they share."""

import copy
import shutil

import pytest
import torch
from pico import write_classification

from dataset_manager import open_task
from gemel.evaluation.eval_method import evaluate
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.results_store.verify import FAIL, verify
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload

QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.6, "device": "cpu"}
RETRIED = "south_pico"


def merge(entries, results, datasets, **options) -> dict:
    given = {**QUICK, "strategy": "all", **options}
    return merge_workload(copy.deepcopy(entries), results, datasets=datasets, **given)


@pytest.fixture(scope="module")
def new_data(tmp_path_factory):
    """Other images of the same classes, outside the datasets' root."""
    return write_classification(tmp_path_factory.mktemp("new"), "south_winter_CL", 4, images=10, seed=12)


@pytest.fixture(scope="module")
def merged(trained_entries, datasets, tmp_path_factory):
    path = tmp_path_factory.mktemp("retry") / "results"
    return path, merge(trained_entries, path, datasets)


@pytest.fixture
def first(merged, tmp_path):
    """(a results folder, its manifest)."""
    return shutil.copytree(merged[0], tmp_path / "results"), merged[1]


def with_data(entries, folder, accuracy: float) -> dict:
    """The dictionary as it is to be written afterwards."""
    changed = copy.deepcopy(entries)
    changed[RETRIED] |= {"dataset": folder.name, "unmerged_acc": accuracy}
    return changed


def test_the_task_is_merged_again_and_the_others_keep_what_they_share(
    first, trained_entries, datasets, new_data, tmp_path, capsys
):
    path, before = first
    after = merge(trained_entries, path, datasets, retry=RETRIED, data=new_data)
    assert f"{RETRIED}: merged again with {new_data}" in capsys.readouterr().out
    task = read_workload(copy.deepcopy(trained_entries))[0][RETRIED]
    root = tmp_path / "datasets"
    root.mkdir()
    for folder in (*datasets.iterdir(), new_data):
        (root / folder.name).symlink_to(folder)
    entries = with_data(trained_entries, new_data, after["tasks"][RETRIED]["unmerged_acc"])
    new = read_workload(entries)[0][RETRIED]
    data = open_task(new, [root], device=torch.device("cpu"), seed=0, batch_size=8)
    assert evaluate(task, data.val) == after["tasks"][RETRIED]["unmerged_acc"]
    models = {name: copy.deepcopy(entry["model"]) for name, entry in trained_entries.items()}
    loaded = load_merged(path, models)
    assert evaluate(new, data.val, loaded[RETRIED]) == after["tasks"][RETRIED]["merged_acc"]
    assert all(record["met"] for record in after["tasks"].values()) and after["run"]["finished"]
    others = [name for name in trained_entries if name != RETRIED]
    kept = {frozenset((o["task"], o["layer"]) for o in g["occurrences"]) for g in after["shared_layers"]}
    for group in before["shared_layers"]:
        own = frozenset((o["task"], o["layer"]) for o in group["occurrences"] if o["task"] in others)
        assert len(own) < 2 or any(own <= one for one in kept)
    assert not [check for check in verify(path) if check.status == FAIL]
    # the same command finds it finished, and so does the dictionary with the new data
    assert merge(trained_entries, path, datasets, retry=RETRIED, data=new_data) == after
    assert merge(entries, path, root) == after
    with pytest.raises(WorkloadError, match=f"{RETRIED}: dataset: was"):
        merge(trained_entries, path, datasets)


def test_a_retry_that_shares_nothing_leaves_the_others_bit_by_bit(
    first, trained_entries, datasets, new_data, monkeypatch
):
    """No round is played after the task has left."""
    path, before = first
    files = {name: (path / "weights" / f"{name}.pt").read_bytes() for name in trained_entries}
    monkeypatch.setattr("merger.Merger._fits", lambda self: True)
    after = merge(trained_entries, path, datasets, retry=RETRIED, data=new_data)
    for name in trained_entries:
        if name != RETRIED:
            assert (path / "weights" / f"{name}.pt").read_bytes() == files[name]
            assert after["tasks"][name] == before["tasks"][name]
    assert all(o["task"] != RETRIED for g in after["shared_layers"] for o in g["occurrences"])
    state = torch.load(path / "weights" / f"{RETRIED}.pt", weights_only=True)
    unmerged = trained_entries[RETRIED]["model"].state_dict()
    assert all(torch.equal(value, unmerged[key]) for key, value in state.items())


def test_all_that_is_wrong_is_listed_and_nothing_is_written(first, trained_entries, datasets, new_data, tmp_path):
    wrong = {"retry": "west_pico", "data": tmp_path / "none", "fresh": True}
    with pytest.raises(WorkloadError) as error:
        merge(trained_entries, tmp_path / "empty", datasets, **wrong)
    said = str(error.value)
    assert "retry: got 'west_pico'; allowed: a task of the dictionary: north_pico" in said
    assert f"data: got '{tmp_path / 'none'}'; allowed: a dataset folder" in said and "retry: got with fresh" in said
    for options, expected in (
        ({"retry": RETRIED}, "both together, or neither"),
        ({"data": new_data}, "both together, or neither"),
        ({"retry": RETRIED, "data": new_data}, "where there are none; allowed: a results folder"),
        ({"retry": "north_pico", "data": new_data}, "where there are none; allowed: a results folder"),
    ):
        with pytest.raises(WorkloadError, match=expected):
            merge(trained_entries, tmp_path / "empty", datasets, **options)
    assert not (tmp_path / "empty").exists()
    before = read_manifest(first[0])
    with pytest.raises(WorkloadError, match="north_pico: "):  # it has three classes, the new data four
        merge(trained_entries, first[0], datasets, retry="north_pico", data=new_data)
    assert read_manifest(first[0]) == before


@pytest.mark.parametrize("classes", [{"class0": "zebra"}, {"class1": None}])
def test_data_whose_class_ids_mean_other_classes_are_refused(
    first, trained_entries, datasets, new_data, tmp_path, classes
):
    """Folders are numbered by name: another name, or a folder that is left out, gives those behind it other ids."""
    data = shutil.copytree(new_data, tmp_path / new_data.name)
    for split in ("train", "val"):
        for name, renamed in classes.items():
            shutil.rmtree(data / split / name) if renamed is None else (data / split / name).rename(
                data / split / renamed
            )
    before = read_manifest(first[0])
    allowed = "allowed: the classes that the task was merged with: class0, class1, class2, class3"
    with pytest.raises(WorkloadError, match=f"{RETRIED}: data: got .*whose classes are, by class id, class.*{allowed}"):
        merge(trained_entries, first[0], datasets, retry=RETRIED, data=data)
    assert read_manifest(first[0]) == before


def test_data_without_the_last_class_keep_their_class_ids(first, trained_entries, datasets, new_data, tmp_path):
    data = shutil.copytree(new_data, tmp_path / new_data.name)
    for split in ("train", "val"):
        shutil.rmtree(data / split / "class3")
    after = merge(trained_entries, first[0], datasets, retry=RETRIED, data=data)
    assert after["tasks"][RETRIED]["met"] and after["tasks"][RETRIED]["class_names"] == ["class0", "class1", "class2"]
