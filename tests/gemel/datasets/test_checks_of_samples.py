"""What the checks find when they try transforms and model on a few samples."""

import pytest
import torch
from dataset_samples import classifier_lines, detector_lines
from pico import (
    PicoDetector,
    PicoNet,
)
from PIL import Image
from torchvision.transforms import v2

RETURNED = "TypeError: the transform returned "


def raises(*sample):
    raise KeyError("no such\nthing")


@pytest.mark.parametrize(
    "transform, got",
    [
        (raises, "KeyError: 'no such\\nthing'"),
        (lambda image: image, RETURNED + "an object of type Image as image"),
        (v2.PILToTensor(), RETURNED + "a torch.uint8 tensor [3, 16, 16] as image"),
        (lambda image: torch.zeros(16, 16), RETURNED + "a torch.float32 tensor [16, 16]"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_classification_transforms_are_tried(cars, transform, got, split):
    (line,) = classifier_lines(cars, **{split: transform})
    assert line.startswith(f"cars_pico: transforms {split}: got {got}")
    assert line.endswith("allowed: image -> float tensor [C, H, W]")


def test_images_of_a_batch_need_one_size(cars):
    Image.new("RGB", (32, 16)).save(cars / "train" / "class1" / "2.png")
    transform = v2.Compose([v2.Resize(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])  # the shorter side
    (line,) = classifier_lines(cars, train=transform)
    got = "images of [3, 16, 16] and [3, 16, 32]; allowed: one size for all images of a batch"
    assert line == f"cars_pico: transforms train: got {got}"


TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def changed_target(**changes):
    def transform(image, target):
        return TO_FLOAT(image), {**target, **{key: change(target) for key, change in changes.items()}}

    return transform


@pytest.mark.parametrize(
    "transform, got",
    [
        (raises, "KeyError: 'no such\\nthing'"),
        (
            lambda image, target: TO_FLOAT(image),
            RETURNED + "a torch.float32 tensor [3, 16, 16] instead of (image, target)",
        ),
        (lambda image, target: (image, target), RETURNED + "an object of type Image as image"),
        (lambda image, target: (TO_FLOAT(image), target["boxes"]), RETURNED + "a torch.float32"),
        (
            lambda image, target: (TO_FLOAT(image), {"boxes": target["boxes"]}),
            RETURNED + "a dict",
        ),
        (
            changed_target(labels=lambda t: t["labels"].float()),
            RETURNED + "boxes [1, 4] in XYXY",
        ),
        (changed_target(labels=lambda t: t["labels"].repeat(2)), RETURNED + "boxes [1, 4]"),
        (
            v2.Compose([TO_FLOAT, v2.ConvertBoundingBoxFormat("XYWH")]),
            RETURNED + "boxes [1, 4] in XYWH",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_detection_transforms_are_tried(boxes, transform, got, split):
    (line,) = detector_lines(boxes, **{split: transform})
    assert line.startswith(f"cars_pico: transforms {split}: got {got}")
    assert "allowed: (image, target) -> (float tensor [C, H, W]" in line


class Flat(PicoNet):
    def forward(self, images):
        return super().forward(images)[0]


class Wrong(PicoNet):
    def forward(self, images):
        return {"scores": super().forward(images)}


def test_the_forward_pass_of_a_classifier_is_tried(cars):
    class Narrow(PicoNet):
        def forward(self, images):
            return super().forward(images.flatten(1))

    allowed = "; allowed: a classifier that maps [N, C, H, W] to [N, classes]"
    (line,) = classifier_lines(cars, Narrow(3))
    assert line.startswith("cars_pico: model: got RuntimeError: ") and line.endswith(allowed)
    (line,) = classifier_lines(cars, Flat(3))
    assert line == f"cars_pico: model: got a torch.float32 tensor [3] for one train image [3, 16, 16]{allowed}"
    (line,) = classifier_lines(cars, Wrong(3))
    assert line == f"cars_pico: model: got a dict with 'scores' for one train image [3, 16, 16]{allowed}"


def test_an_image_of_each_split_goes_through_the_model(cars):
    """What the train transform alone does wrong would else be found in the first round."""
    for split in ("train", "val"):
        (line,) = classifier_lines(cars, **{split: lambda image: TO_FLOAT(image)[:1]})
        assert line.startswith("cars_pico: model: got RuntimeError: ") and f"for one {split} image [1, 16, 16]" in line


def test_the_forward_pass_of_a_detector_is_tried(boxes):
    (line,) = detector_lines(boxes, PicoNet())  # a classifier, which takes no lists
    assert line.startswith("cars_pico: model: got TypeError: ")
    assert line.endswith(" for one train image [3, 16, 16]; allowed: a detector of [C, H, W] images")


def test_a_detector_that_keeps_tensors_can_be_trained_after_the_check(boxes):
    class Caching(PicoDetector):
        grid = None

        def forward(self, images, targets=None):
            self.grid = torch.stack(images).mean() if self.grid is None else self.grid
            return super().forward([image * self.grid for image in images], targets)

    model = Caching()
    assert detector_lines(boxes, model) == []
    image = torch.rand(3, 16, 16, requires_grad=True)
    sum(model.train()([image], [{"boxes": torch.ones(0, 4), "labels": torch.ones(0)}]).values()).backward()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("fails_without", [True, False])
def test_detection_transforms_are_tried_with_and_without_objects(boxes, split, fails_without):
    def choosy(image, target):
        assert bool(len(target["boxes"])) == fails_without, "not for this image"
        return TO_FLOAT(image), target

    (line,) = detector_lines(boxes, **{split: choosy})
    assert line.startswith(f"cars_pico: transforms {split}: got AssertionError: not for this image")
