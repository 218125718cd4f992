"""The benchmark of watching at small size: what is drawn, and how runs are counted."""

from benchmarks.watch import AS_TRAINED, HAZE, NEW, Models, Streams, agreements, rows_of, weather_of
from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.tasks import TASKS, new_model

RECORDS = {task: {"target_acc": 0.95, "unmerged_acc": 1.0, "agreement": 0.95} for task in TASKS}


def test_models_that_are_the_same_agree_on_all_that_is_drawn():
    models = {task: new_model(task).eval() for task in TASKS}
    found = agreements(Models(RECORDS, models, models), NEW, 3)
    assert found == {task: [1.0] * 3 for task in TASKS}


def test_weather_differs_from_what_models_were_trained_in():
    for camera in CAMERAS.values():
        assert len({weather_of(weather, camera) for weather in (AS_TRAINED, HAZE, NEW)}) == 3


def test_runs_are_counted():
    good, bad = ({task: [value] for task in TASKS} for value in (1.0, 0.0))
    rows = rows_of(RECORDS, Streams(good, bad, 50, 20), runs=3)
    assert [row[0] for row in rows] == [*TASKS, "any of main_2nd", "any of elm_1st", "any"]
    assert all(row[3:5] == ["0 of 3", "3 of 3"] for row in rows)
    early = rows_of(RECORDS, Streams(bad, bad, 50, 20), runs=3)
    assert all(row[3:5] == ["3 of 3", "0 of 0"] for row in early)
    never = rows_of(RECORDS, Streams(good, good, 50, 20), runs=3)
    assert all(row[3:6] == ["0 of 3", "0 of 3", "-"] for row in never)
