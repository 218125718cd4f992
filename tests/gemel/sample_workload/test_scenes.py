"""Street scenes: objects, boxes, cameras, crops."""

import io

import numpy as np
import pytest
from PIL import Image

from gemel.sample_workload.camera import CAMERAS, CANVAS
from gemel.sample_workload.objects import KINDS
from gemel.sample_workload.scenes import Scene, SceneObject, crop, draw_scene, frame
from gemel.sample_workload.tasks import CROP_SIZE


def scenes_of(camera, number, seed=5):
    rng = np.random.default_rng(seed)
    return [draw_scene(CAMERAS[camera], rng) for _ in range(number)]


def picture_of(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), dtype=float)


@pytest.mark.parametrize("camera", CAMERAS)
def test_scenes_show_all_kinds_and_sometimes_nobody(camera):
    scenes = scenes_of(camera, 40)
    assert {item.kind for scene in scenes for item in scene.objects} == set(KINDS)
    assert any(not scene.objects for scene in scenes)
    assert np.mean([len(scene.objects) for scene in scenes]) > 2


@pytest.mark.parametrize("camera", CAMERAS)
def test_boxes_lie_on_the_canvas_and_around_what_was_drawn(camera):
    """Inside its box a scene differs from the empty street of the same camera."""
    empty = next(scene for scene in scenes_of(camera, 60) if not scene.objects)
    reference = np.asarray(empty.image, dtype=float)
    for scene in scenes_of(camera, 10):
        pixels = np.asarray(scene.image, dtype=float)
        pixels = pixels * np.median(reference / np.maximum(pixels, 1), axis=(0, 1))  # the same exposure
        changed = np.abs(pixels - reference).max(-1) > 12
        for left, top, right, bottom in (item.box for item in scene.objects):
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
        boxes = [item.box for scene in some for item in scene.objects if item.kind == "car"]
        shapes[camera] = np.median([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    assert shapes["elm_1st"] > 1.2 * shapes["main_2nd"]


@pytest.mark.parametrize("box", [(100, 150, 200, 250), (0, 0, 60, 60), (350, 340, 384, 384)])
def test_a_crop_shows_the_whole_object_and_a_little_more(box):
    image = Image.new("RGB", (CANVAS, CANVAS), (90, 90, 90))
    image.paste((230, 230, 230), box)
    scene, item = Scene(CAMERAS["main_2nd"], image, []), SceneObject("car", box)
    for seed in range(8):
        light = picture_of(crop(scene, item, CROP_SIZE, np.random.default_rng(seed))).mean(-1)
        white = light > 160
        side = max(box[2] - box[0], box[3] - box[1])
        share = (box[2] - box[0]) * (box[3] - box[1]) / side**2
        assert white.shape == (CROP_SIZE, CROP_SIZE)
        assert 0.75 * share / 1.4**2 < white.mean() < 1.03 * share
        assert light.min() > 45  # nothing from beyond the edge of the canvas
