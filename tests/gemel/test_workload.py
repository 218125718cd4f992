"""The task dictionary: what is accepted, every problem, and the file that defines it."""

import copy
import sys

import numpy as np
import pytest
import torch
from pico import PicoNet, classification_entry, detection_entry
from torch import nn

from gemel.workload import CLASSIFICATION, DETECTION, WorkloadError, load_model_dict, read_workload


def problems_of(entry: object, name: object = "main_2nd_pico", **changes) -> list[str]:
    if changes:
        entry = {**entry, **changes}
    return [str(problem) for problem in read_workload({name: entry})[1]]


@pytest.fixture
def entry():
    return classification_entry(PicoNet())


def test_reads_tasks(entry):
    detector = detection_entry(PicoNet(), 0.4, tolerance=0.9, dataset="elsewhere", batch_size=4, background_class=False)
    tasks, problems = read_workload({"main_2nd_pico": entry, "elm_1st_cars_pico": detector}, tolerance=0.8)
    assert problems == []
    first, second = tasks.values()
    assert (first.kind, first.dataset, first.target_acc) == (CLASSIFICATION, "main_2nd_CL", 0.8)
    assert (first.batch_size, first.background_class) == (None, True)
    assert (second.kind, second.dataset, second.batch_size) == (DETECTION, "elsewhere", 4)
    assert second.target_acc == pytest.approx(0.36) and second.background_class is False


@pytest.mark.parametrize(
    "spelling, kind",
    [
        ("image_classification", CLASSIFICATION),
        ("image classification", CLASSIFICATION),
        ("Object Detection", DETECTION),
        ("object_detection", DETECTION),
    ],
)
def test_both_spellings_of_the_kinds(entry, spelling, kind):
    tasks, problems = read_workload({"a_b": {**entry, "task": spelling}})
    assert not problems and tasks["a_b"].kind == kind


def test_dataset_name_is_the_task_name_without_the_model(entry):
    tasks, _ = read_workload({"main_2nd_cars_people_resnet50": entry})
    assert tasks["main_2nd_cars_people_resnet50"].dataset == "main_2nd_cars_people_CL"


def test_missing_keys_are_all_named():
    found = problems_of({})
    assert len(found) == 5
    for key in ("model", "task", "eval_method", "transforms", "unmerged_acc"):
        assert any(line.startswith(f"main_2nd_pico: {key}: got nothing; allowed:") for line in found)


def test_unknown_kind_suggests_the_near_miss(entry):
    (line,) = problems_of(entry, task="object_detecton")
    assert "main_2nd_pico: task: got 'object_detecton' (did you mean 'object_detection'?)" in line
    assert "'image_classification' or 'object_detection'" in line


def test_unknown_key_suggests_the_near_miss(entry):
    (line,) = problems_of(entry, unmerged_accuracy=0.9)
    assert "unmerged_accuracy: got an unknown key (did you mean 'unmerged_acc'?)" in line


@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), "0.9", None, True, 97])
def test_unmerged_acc_outside_its_range(entry, value):
    (line,) = problems_of(entry, unmerged_acc=value)
    assert line == f"main_2nd_pico: unmerged_acc: got {value!r}; allowed: a number in (0, 1]"


@pytest.mark.parametrize("value", [0, 1.5, "high"])
def test_tolerance_outside_its_range(entry, value):
    (line,) = problems_of(entry, tolerance=value)
    assert f"tolerance: got {value!r}; allowed: a number in (0, 1]" in line
    assert "workload: tolerance" in str(read_workload({"a_b": entry}, tolerance=value)[1][0])


def test_transforms_without_train_or_val(entry):
    (line,) = problems_of(entry, transforms={"train": lambda image: image})
    assert "transforms: got {'val': None}; allowed: a dictionary {'train': callable, 'val': callable}" in line
    (line,) = problems_of(entry, transforms=len)
    assert "transforms: got a len" in line


def test_model_that_is_no_module(entry):
    (line,) = problems_of(entry, model={"state": 1})
    assert "model: got a dict; allowed: a torch.nn.Module with its weights loaded" in line
    (line,) = problems_of(entry, model=PicoNet)
    assert "model: got the class PicoNet" in line


def test_model_on_the_meta_device(entry):
    with torch.device("meta"):
        model = PicoNet()
    (line,) = problems_of(entry, model=model)
    assert "conv1.weight is on the meta device" in line


def test_model_without_usable_weights(entry):
    assert "without parameters" in problems_of(entry, model=nn.ReLU())[0]
    assert "not initialised yet" in problems_of(entry, model=nn.Sequential(nn.LazyLinear(3)))[0]
    broken = PicoNet()
    broken.fc.weight.data[0, 0] = float("nan")
    assert "fc.weight holds values that are not finite" in problems_of(entry, model=broken)[0]


@pytest.mark.parametrize("name", ["resnet", "_resnet", "a_", "a b_c", "../up_x", "a.b_c", "", "ä_b", 7, "zero_grad"])
def test_name_without_model_or_unusable(entry, name):
    (line,) = problems_of(entry, name)
    assert line.startswith(f"{name}: name: got ") and "allowed:" in line


def test_names_that_differ_only_in_case(entry):
    other = classification_entry(PicoNet())
    (line,) = map(str, read_workload({"a_net": entry, "A_net": other})[1])
    assert "'A_net' beside 'a_net'" in line


def test_eval_method_that_is_not_callable(entry):
    (line,) = problems_of(entry, eval_method="top1")
    assert "eval_method: got 'top1'; allowed: a callable f(model, data_loader)" in line


@pytest.mark.parametrize(
    "key, value", [("dataset", "../x"), ("dataset", ""), ("batch_size", 1), ("background_class", 1)]
)
def test_optional_keys(entry, key, value):
    (line,) = problems_of(entry, **{key: value})
    assert f"main_2nd_pico: {key}: got {value!r}; allowed: " in line
    assert problems_of(entry, **{key: None}) == []


def test_numbers_of_numpy_are_numbers(entry):
    numbers = {"unmerged_acc": np.float32(0.5), "tolerance": np.float64(0.9), "batch_size": np.int64(8)}
    tasks, problems = read_workload({"a_net": {**entry, **numbers}})
    assert not problems and type(tasks["a_net"].batch_size) is int and type(tasks["a_net"].unmerged_acc) is float


def test_one_model_in_two_tasks(entry):
    found = read_workload({"a_net": entry, "b_net": dict(entry)})[1]
    assert [str(p) for p in found] == [
        "b_net: model: got parameters that are also those of a_net; allowed: a model of its own for every task "
        "(copy.deepcopy)"
    ]
    assert not read_workload({"a_net": entry, "b_net": {**entry, "model": copy.deepcopy(entry["model"])}})[1]


def test_buffers_and_memory_of_two_tasks(entry):
    """A table that two models hold; and weights assigned from one state dict, which training would write for both."""
    other = {**entry, "model": copy.deepcopy(entry["model"])}
    other["model"].bn1.running_mean = entry["model"].bn1.running_mean
    (problem,) = read_workload({"a_net": entry, "b_net": other})[1]
    assert problem.got == "buffers that are also those of a_net"
    other = {**entry, "model": copy.deepcopy(entry["model"])}
    other["model"].load_state_dict(entry["model"].state_dict(), assign=True)
    (problem,) = read_workload({"a_net": entry, "b_net": other})[1]
    assert problem.got == "parameters that are also those of a_net"


@pytest.mark.parametrize("value", [{}, None, [1], "tasks"])
def test_what_is_no_dictionary_of_tasks(value):
    tasks, (problem,) = read_workload(value)
    assert tasks == {} and "with at least one task" in str(problem)


def test_all_problems_at_once(entry):
    bad = {"one_x": {**entry, "unmerged_acc": 2, "task": "x"}, "two_x": 3, "three": classification_entry(PicoNet())}
    tasks, problems = read_workload(bad)
    assert tasks == {} and {(p.task, p.key) for p in problems} == {
        ("one_x", "unmerged_acc"),
        ("one_x", "task"),
        ("two_x", "entry"),
        ("three", "name"),
    }
    message = str(WorkloadError(problems))
    assert message.startswith("4 problems in the workload:\n") and message.count("\n") == 4


# ---- the file ---------------------------------------------------------------------------------------------


@pytest.fixture
def loaded_modules(monkeypatch):
    """Forgets the loaded file and its folder afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine", None)


def test_the_file_is_run_as_a_module_beside_its_own(tmp_path, loaded_modules):
    (tmp_path / "beside_mine.py").write_text("NAME = 'a_x'")
    (tmp_path / "mine.py").write_text("from beside_mine import NAME\ndef create_model_dict(): return {NAME: __name__}")
    assert load_model_dict(tmp_path / "mine.py") == {"a_x": "mine"}
    sys.modules.pop("beside_mine")


@pytest.mark.parametrize("content, message", [(None, "which is no file"), ("create_model_dict = 3", "without it")])
def test_a_file_that_is_none(tmp_path, loaded_modules, content, message):
    if content:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(WorkloadError, match=f"mine.py,? {message}; allowed: a Python file that defines"):
        load_model_dict(tmp_path / "mine.py")
