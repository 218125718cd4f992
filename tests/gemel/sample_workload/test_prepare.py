"""The embedded default: a dictionary that is ready to merge, interruptions, other recipes."""

import json
import threading
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
import torch
from tiny_sample import METHODS, TINY

import dataset_manager
from gemel.sample_workload import artifacts
from gemel.sample_workload import datasets as sample_datasets
from gemel.sample_workload import prepare as prepare_module
from gemel.sample_workload import tasks as sample_tasks
from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.prepare import prepare
from gemel.sample_workload.tasks import ANCESTORS, SPLITS, TASKS
from gemel.sample_workload.training import is_trained
from gemel.workload import CLASSIFICATION, DETECTION, read_workload
from merge_workloads import create_sample_model_dict
from model_architectures import architecture_of

CLASSIFIER = "main_2nd_vehicles_resnet10"


def test_leftovers_of_a_killed_process_do_not_count_and_do_not_stay(tmp_path, monkeypatch):
    leftover = tmp_path / "datasets" / "main_2nd_traffic_OD" / f"{artifacts.PARTIAL}1-train"
    (leftover / "images").mkdir(parents=True)
    assert not sample_datasets.is_drawn(tmp_path, "main_2nd", "train", TINY)
    monkeypatch.setattr(prepare_module, "_work_with", lambda num_workers, jobs: None)
    prepare(METHODS, tmp_path, TINY)
    assert leftover.exists()  # its process may be alive
    monkeypatch.setattr(artifacts, "PARTIAL_SECONDS", -1.0)
    prepare(METHODS, tmp_path, TINY)
    assert not leftover.exists()


def test_the_dictionary_is_accepted(prepared):
    model_dict = create_sample_model_dict(prepared, TINY)
    tasks, problems = read_workload(model_dict)
    problems += dataset_manager.check(tasks, [prepared / "datasets"])
    assert [str(problem) for problem in problems] == []
    assert list(tasks) == list(TASKS)
    assert {task.kind for task in tasks.values()} == {CLASSIFICATION, DETECTION}
    assert all(architecture_of(task.model) for task in tasks.values())


def test_the_accuracy_is_what_the_projects_loaders_and_eval_methods_measure(prepared):
    tasks, _ = read_workload(create_sample_model_dict(prepared, TINY))
    for task in tasks.values():
        data = dataset_manager.open_task(
            task, [prepared / "datasets"], device=torch.device("cpu"), seed=0, batch_size=8
        )
        assert task.eval_method(task.model, data.val) == pytest.approx(task.unmerged_acc, abs=0.02), task.name


def test_what_is_prepared_is_not_made_again(prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    prepare(METHODS, prepared, TINY)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_an_interrupted_training_is_done_again_with_the_same_result(prepared):
    """Killed between the weights and their accuracy: the weights do not count. Trained again, they are the same."""
    weights, stamp = sample_tasks.weights_path(CLASSIFIER, prepared), sample_tasks.stamp_path(CLASSIFIER, prepared)
    before, accuracy = weights.read_bytes(), stamp.read_text()
    stamp.unlink()
    weights.write_bytes(before[:1000])
    assert not is_trained(prepared, CLASSIFIER, TINY)
    prepare(METHODS, prepared, TINY, processes=1)
    assert weights.read_bytes() == before
    assert stamp.read_text() == accuracy


def test_another_recipe_is_made_again(prepared, monkeypatch):
    assert prepare_module._jobs(prepared, TINY, METHODS) == []
    number = len(SPLITS) * len(CAMERAS) + len(ANCESTORS) + len(TASKS)
    assert len(prepare_module._jobs(prepared, TINY._replace(epochs=2.0), METHODS)) == number
    monkeypatch.setattr(artifacts, "RECIPE", artifacts.RECIPE + 1)
    assert len(prepare_module._jobs(prepared, TINY, METHODS)) == number


def test_each_job_comes_behind_what_it_needs(tmp_path):
    done = set()
    for job in prepare_module._jobs(tmp_path, TINY, METHODS):
        assert job.needs <= done, job.name
        done.add(job.name)
    assert done >= {*ANCESTORS, *TASKS}


def jobs_of(needs, run):
    return [prepare_module.Job(name, frozenset(own), partial(run, name)) for name, own in needs.items()]


def test_a_job_waits_for_what_it_needs_and_another_takes_its_turn():
    """Two threads: b can only end after c has begun, which in the order comes behind d, that waits for both."""
    begun, ended = {name: threading.Event() for name in "abcd"}, []

    def run(name):
        begun[name].set()
        if name == "b":
            assert begun["c"].wait(10)
        ended.append(name)

    schedule = prepare_module.Schedule(jobs_of({"a": "", "b": "a", "d": "bc", "c": ""}, run))
    other = threading.Thread(target=schedule.work_off, args=(lambda job: job.run(),))
    other.start()
    schedule.work_off(lambda job: job.run())
    other.join(10)
    assert sorted(ended) == list("abcd") and ended[-1] == "d" and ended.index("a") < ended.index("b")


def test_where_a_job_fails_no_other_begins_and_nobody_waits_for_ever():
    ran, fails = [], threading.Event()

    def run(name):
        ran.append(name)
        if name == "a":
            fails.wait(10)
            raise OSError("disk full")

    schedule = prepare_module.Schedule(jobs_of({"a": "", "b": "a"}, run))
    other = threading.Thread(target=schedule.work_off, args=(lambda job: job.run(),))
    taken = schedule.next()
    other.start()  # waits, as b needs a
    schedule.left.insert(0, taken)
    fails.set()
    with pytest.raises(OSError, match="disk full"):
        schedule.work_off(lambda job: job.run())
    other.join(10)
    assert not other.is_alive() and ran == ["a"]


def test_no_other_process_is_needed(prepared, monkeypatch):
    """A script without a guard around its main part cannot start processes: then this one does the work."""

    def broken(num_workers, jobs):
        raise BrokenProcessPool

    monkeypatch.setattr(prepare_module, "_work_with", broken)
    stamp = sample_tasks.stamp_path(CLASSIFIER, prepared)
    stamp.unlink()
    torch.set_num_threads(2)
    try:
        prepare(METHODS, prepared, TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as all tests have it
    assert 0 < json.loads(stamp.read_text())["unmerged_acc"] <= 1


@pytest.mark.exhaustive
def test_processes_make_what_one_process_makes(prepared):
    before = sample_tasks.weights_path(CLASSIFIER, prepared).read_bytes()
    sample_tasks.stamp_path(CLASSIFIER, prepared).unlink()
    prepare(METHODS, prepared, TINY, processes=2)
    assert sample_tasks.weights_path(CLASSIFIER, prepared).read_bytes() == before
