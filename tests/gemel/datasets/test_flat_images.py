"""A train transform that scales, normalises or orders colours otherwise than the val transform is named."""

import pytest
import torch
from pico import PicoDetector, PicoNet, classification_entry, detection_entry, write_classification, write_detection
from torchvision.transforms import v2

from dataset_manager import check
from gemel.datasets.flat_images import other_colours
from gemel.workload import read_workload
from transforms import classification_transforms, detection_transforms

UNIT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
PIXELS = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=False)])
NORMALISED = v2.Compose([UNIT, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
HALVES = v2.Compose([UNIT, v2.Normalize([0.5] * 3, [0.5] * 3)])
SIZE = (48, 40)


def bgr(image):
    return UNIT(image).flip(0)


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (UNIT, NORMALISED, "becomes (0, 1, 0) by the train transform and (-2.12, 2.43, -1.8) by the val transform"),
        (NORMALISED, UNIT, "by the val transform"),
        (PIXELS, UNIT, "becomes (255, 0, 0) by the train transform and (1, 0, 0) by the val transform"),
        (UNIT, PIXELS, "by the val transform"),
        (UNIT, HALVES, "by the val transform"),
        (bgr, UNIT, "becomes (0, 0, 1) by the train transform and (1, 0, 0) by the val transform"),
    ],
)
def test_what_differs_is_named(train, val, said):
    assert said in other_colours(train, val, SIZE, has_targets=False)


STRONG = [
    v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    v2.TrivialAugmentWide(),
    v2.RandAugment(),
    v2.RandomInvert(0.3),
    v2.RandomGrayscale(0.2),
    v2.Compose([v2.Pad(20), v2.RandomCrop(32)]),
    v2.RandomResizedCrop(32, antialias=True),
    v2.RandomZoomOut(p=1.0),
]


@pytest.mark.parametrize("augmentation", STRONG, ids=[type(step).__name__ for step in STRONG])
@pytest.mark.parametrize("plain", [UNIT, NORMALISED], ids=["unit", "normalised"])
def test_augmentations_say_nothing(augmentation, plain):
    assert other_colours(v2.Compose([augmentation, plain]), plain, SIZE, has_targets=False) is None


def test_the_named_transforms_say_nothing():
    for given, has_targets in ((classification_transforms(size=40), False), (detection_transforms(), True)):
        assert other_colours(given["train"], given["val"], SIZE, has_targets) is None


def fails(image):
    raise OSError


@pytest.mark.parametrize(
    "transform",
    [fails, lambda image: UNIT(image) * 0, lambda image: UNIT(image) / 0],
    ids=["fails", "flat", "infinite"],
)
def test_nothing_is_said_of_what_cannot_be_told(transform):
    assert other_colours(transform, transform, SIZE, has_targets=False) is None
    assert other_colours(UNIT, transform, SIZE, has_targets=False) is None


def test_it_is_said_of_datasets_of_either_kind_and_no_problem(tmp_path):
    write_classification(tmp_path, "cars_CL", 3, images=2)
    write_detection(tmp_path, "street_OD", 2, 6)
    given = {
        "cars_pico": classification_entry(PicoNet(3)) | {"transforms": {"train": PIXELS, "val": UNIT}},
        "street_pico": detection_entry(PicoDetector(3)) | {"transforms": {"train": PIXELS, "val": UNIT}},
    }
    tasks, problems = read_workload(given)
    notes = {}
    assert not problems and not check(tasks, [tmp_path], notes)
    for name, images in (("cars_pico", 6), ("street_pico", 6)):
        (said,) = [line for line in notes[name] if "by the train transform" in line]
        assert said.startswith(f"{images} times: pure red becomes (255, 0, 0)")
