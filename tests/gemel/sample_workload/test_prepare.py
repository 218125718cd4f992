"""The embedded default: street scenes as datasets, small trained models, a dictionary that is ready to merge."""

import io
import json
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from PIL import Image

import dataset_manager
from gemel.sample_workload import drawing, made
from gemel.sample_workload import prepare as prepare_module
from gemel.sample_workload import tasks as sample_tasks
from gemel.sample_workload.camera import CAMERAS, CANVAS
from gemel.sample_workload.objects import KINDS
from gemel.sample_workload.prepare import prepare
from gemel.sample_workload.scenes import Scene, Thing, crop, draw_scene, frame
from gemel.sample_workload.tasks import ANCESTORS, CROP_SIZE, FRAME_SIZE, TASKS, Plan
from gemel.sample_workload.training import is_trained
from gemel.sharing.groups import find_groups
from gemel.workload import CLASSIFICATION, DATASET_SUFFIX, DETECTION, read_workload
from merge_workloads import create_sample_model_dict, sample_methods
from model_architectures import architecture_of

TINY = Plan(scenes=(20, 12, 4), crops=(10, 6, 2), epochs=0.9)
FRAMES_PARTS = ("images", "annotations")
CLASSIFIER = "main_2nd_vehicles_resnet10"
METHODS = sample_methods()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    prepare(METHODS, root, TINY, processes=1)
    return root


def scenes_of(camera, number, seed=5):
    rng = np.random.default_rng(seed)
    return [draw_scene(CAMERAS[camera], rng) for _ in range(number)]


def picture_of(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), dtype=float)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- drawing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("camera", CAMERAS)
def test_scenes_show_all_kinds_and_sometimes_nobody(camera):
    scenes = scenes_of(camera, 40)
    assert {thing.kind for scene in scenes for thing in scene.things} == set(KINDS)
    assert any(not scene.things for scene in scenes)
    assert np.mean([len(scene.things) for scene in scenes]) > 2


@pytest.mark.parametrize("camera", CAMERAS)
def test_boxes_lie_on_the_canvas_and_around_what_was_drawn(camera):
    """Inside its box a scene differs from the empty street of the same camera."""
    empty = next(scene for scene in scenes_of(camera, 60) if not scene.things)
    reference = np.asarray(empty.image, dtype=float)
    for scene in scenes_of(camera, 10):
        pixels = np.asarray(scene.image, dtype=float)
        pixels = pixels * np.median(reference / np.maximum(pixels, 1), axis=(0, 1))  # the same exposure
        changed = np.abs(pixels - reference).max(-1) > 12
        for left, top, right, bottom in (thing.box for thing in scene.things):
            assert 0 <= left < right <= CANVAS and 0 <= top < bottom <= CANVAS
            assert changed[top:bottom, left:right].mean() > 0.25


def test_the_same_generator_draws_the_same_picture():
    first, again = (frame(scenes_of("elm_1st", 2)[1], 64, np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert first != frame(scenes_of("elm_1st", 2, seed=6)[1], 64, np.random.default_rng(3))


def test_the_cameras_differ():
    """One is by day and one at nightfall, and their boxes have other shapes: it looks along the road, it across."""
    scenes = {camera: scenes_of(camera, 30) for camera in CAMERAS}
    light = {camera: np.mean([np.asarray(s.image).mean() for s in some]) for camera, some in scenes.items()}
    assert light["main_2nd"] > 1.4 * light["elm_1st"]
    shapes = {}
    for camera, some in scenes.items():
        boxes = [thing.box for scene in some for thing in scene.things if thing.kind == "car"]
        shapes[camera] = np.median([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    assert shapes["elm_1st"] > 1.2 * shapes["main_2nd"]


@pytest.mark.parametrize("box", [(100, 150, 200, 250), (0, 0, 60, 60), (350, 340, 384, 384)])
def test_a_crop_shows_the_whole_object_and_a_little_more(box):
    image = Image.new("RGB", (CANVAS, CANVAS), (90, 90, 90))
    image.paste((230, 230, 230), box)
    scene, thing = Scene(CAMERAS["main_2nd"], image, []), Thing("car", box)
    for seed in range(8):
        light = picture_of(crop(scene, thing, CROP_SIZE, np.random.default_rng(seed))).mean(-1)
        white = light > 160
        side = max(box[2] - box[0], box[3] - box[1])
        share = (box[2] - box[0]) * (box[3] - box[1]) / side**2
        assert white.shape == (CROP_SIZE, CROP_SIZE)
        assert 0.75 * share / 1.4**2 < white.mean() < 1.03 * share
        assert light.min() > 45  # nothing from beyond the edge of the canvas


# ---- datasets ---------------------------------------------------------------------------------------------


def test_the_datasets_have_the_layout(prepared):
    root = prepared / "datasets"
    expected = {name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind] for name, task in TASKS.items()}
    assert {path.name for path in root.iterdir()} == expected
    for name, task in TASKS.items():
        folder = root / (name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind])
        for split, scenes, crops in zip(("train", "val", "test"), TINY.scenes, TINY.crops, strict=True):
            if task.kind == CLASSIFICATION:
                counts = {path.name: len(list(path.glob("*.jpg"))) for path in (folder / split).iterdir()}
                assert set(counts) == set(task.classes) and all(0 < count <= crops for count in counts.values())
            else:
                stems = {part: {path.stem for path in (folder / split / part).iterdir()} for part in FRAMES_PARTS}
                assert stems["images"] == stems["annotations"] and len(stems["images"]) == scenes


def test_annotations_are_inside_the_image_and_some_are_empty(prepared):
    texts = [path.read_text() for path in prepared.glob("datasets/*_OD/*/annotations/*.txt")]
    assert any(not text for text in texts)
    rows = np.array([line.split() for text in texts for line in text.splitlines()], dtype=float)
    assert set(rows[:, 0]) == set(range(len(KINDS)))
    assert (rows[:, 3:] > 0).all()
    assert (rows[:, 1:3] - rows[:, 3:] / 2 > -1e-5).all() and (rows[:, 1:3] + rows[:, 3:] / 2 < 1 + 1e-5).all()
    sizes = {Image.open(path).size for path in prepared.glob("datasets/*_OD/*/images/*.jpg")}
    assert sizes == {(FRAME_SIZE, FRAME_SIZE)}


def test_the_splits_share_no_image(prepared):
    pictures = [path.read_bytes() for path in prepared.glob("datasets/*/*/*/*.jpg")]
    assert len(set(pictures)) == len(pictures) > 100


def test_an_interrupted_drawing_is_drawn_again(prepared, tmp_path, monkeypatch):
    """Killed after some of the files, or after all but before the end: no dataset is there, and then the same one."""
    draw, calls = drawing.write_scenes, []

    def interrupted(*arguments):
        draw(*arguments)
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "write_scenes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawing.draw_camera(tmp_path, "main_2nd", TINY)
    assert not list((tmp_path / "datasets").iterdir())
    assert not drawing.is_drawn(tmp_path, "main_2nd", TINY)
    drawing.draw_camera(tmp_path, "main_2nd", TINY)
    assert drawing.is_drawn(tmp_path, "main_2nd", TINY)
    for folder in (tmp_path / "datasets").iterdir():
        assert files_of(folder) == files_of(prepared / "datasets" / folder.name)


def test_a_dataset_of_another_recipe_is_replaced(tmp_path):
    for scenes in (3, 2):
        plan = Plan(scenes=(scenes,) * 3, crops=(1, 1, 1))
        drawing.draw_camera(tmp_path, "elm_1st", plan)
        assert drawing.is_drawn(tmp_path, "elm_1st", plan)
        assert len(list(tmp_path.glob("datasets/elm_1st_traffic_OD/*/images/*.jpg"))) == 3 * scenes
    assert not drawing.is_drawn(tmp_path, "elm_1st", TINY)


def test_leftovers_of_a_killed_process_do_not_count_and_do_not_stay(tmp_path, monkeypatch):
    leftover = tmp_path / "datasets" / f"{made.PARTIAL}1-main_2nd_traffic_OD"
    (leftover / "train").mkdir(parents=True)
    (leftover / drawing.RECIPE_FILE).write_text(made.recipe(TINY))
    assert not drawing.is_drawn(tmp_path, "main_2nd", TINY)
    monkeypatch.setattr(prepare_module, "_work_in_processes", lambda stages, processes: None)
    prepare(METHODS, tmp_path, TINY)
    assert leftover.exists()  # its process may be alive
    monkeypatch.setattr(made, "PARTIAL_SECONDS", -1.0)
    prepare(METHODS, tmp_path, TINY)
    assert not leftover.exists()


# ---- models -----------------------------------------------------------------------------------------------


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


def test_backbones_have_the_same_layers_and_one_ancestor(prepared):
    """All four share layers, and a task's weights are nearer to its ancestor than to fresh ones."""
    models = {name: sample_tasks.load_trained(name, prepared) for name in TASKS}
    assert any(len(group.occurrences) == len(TASKS) for group in find_groups(models))
    for name, task in TASKS.items():
        prefix = "" if task.kind == CLASSIFICATION else "backbone.body."
        weight = models[name].state_dict()[f"{prefix}layer3.0.conv2.weight"].flatten()
        ancestor = sample_tasks.load_trained("ancestor_resnet18", prepared).state_dict()["layer3.0.conv2.weight"]
        assert torch.cosine_similarity(weight, ancestor.flatten(), dim=0) > 0.5
        assert not torch.equal(weight, ancestor.flatten())


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
    assert prepare_module._stages(prepared, TINY, METHODS) == []
    assert [len(stage) for stage in prepare_module._stages(prepared, TINY._replace(epochs=2.0), METHODS)] == [
        2,
        1,
        3,
        2,
    ]
    monkeypatch.setattr(made, "RECIPE", made.RECIPE + 1)
    stages = prepare_module._stages(prepared, TINY, METHODS)
    assert [len(stage) for stage in stages] == [2, 1, 3, 2]
    assert sum(map(len, stages)) == len(CAMERAS) + len(ANCESTORS) + len(TASKS)


def test_no_other_process_is_needed(prepared, monkeypatch):
    """A script without a guard around its main part cannot start processes: then this one does the work."""

    def broken(stages, processes):
        raise BrokenProcessPool

    monkeypatch.setattr(prepare_module, "_work_in_processes", broken)
    stamp = sample_tasks.stamp_path(CLASSIFIER, prepared)
    stamp.unlink()
    torch.set_num_threads(2)
    try:
        prepare(METHODS, prepared, TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as all tests have it
    assert 0 < json.loads(stamp.read_text())["unmerged_acc"] <= 1


@pytest.mark.slow
def test_processes_make_what_one_process_makes(prepared):
    before = sample_tasks.weights_path(CLASSIFIER, prepared).read_bytes()
    sample_tasks.stamp_path(CLASSIFIER, prepared).unlink()
    prepare(METHODS, prepared, TINY, processes=2)
    assert sample_tasks.weights_path(CLASSIFIER, prepared).read_bytes() == before


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="no_such_task.*main_2nd_vehicles_resnet10"):
        sample_tasks.load_trained("no_such_task")
