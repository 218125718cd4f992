"""A transform that moves the image without its boxes is found; one that moves both never is."""

import numpy as np
import pytest
import torch
from pico import PicoDetector, detection_entry, to_tensor, write_detection
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dataset_manager import check
from gemel.datasets.marked_boxes import misplaced
from gemel.workload import read_workload
from transforms import detection_transforms

TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
NORMALISED = v2.Compose([TO_FLOAT, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
SIZES = [(16, 16), (64, 48), (640, 360)]


def image_alone(*steps):
    """The steps applied to the image, as `lambda image, target: (compose(image), target)` does."""
    return lambda image, target: (v1.Compose([*steps, v1.ToTensor()])(image), target)


def boxes_as(convert):
    """As libraries of augmentations return boxes by convention: x, y, width, height, or shares of the image."""

    def transform(image, target):
        image, target = TO_FLOAT(image, target)
        boxes = convert(target["boxes"].as_subclass(torch.Tensor), image.shape[-1], image.shape[-2])
        return image, {**target, "boxes": boxes}

    return transform


def centre_and_size(boxes, width, height):
    middle, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return torch.cat([middle, extent], 1)


WRONG = {
    "flipped alone": image_alone(v1.RandomHorizontalFlip()),
    "flipped upside down alone": image_alone(v1.RandomVerticalFlip()),
    "resized alone": image_alone(v1.Resize((300, 300))),
    "cropped alone": image_alone(v1.RandomResizedCrop(32, scale=(0.3, 0.6))),
    "x, y, width, height": boxes_as(lambda b, w, h: torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], 1)),
    "shares": boxes_as(lambda b, w, h: b / torch.tensor([w, h, w, h])),
    "centre and size": boxes_as(centre_and_size),
    "rows and columns exchanged": boxes_as(lambda b, w, h: b[:, [1, 0, 3, 2]]),
}


def flip_boxes_alone(image, target):
    boxes = F.horizontal_flip(target["boxes"])
    return TO_FLOAT(image), {**target, "boxes": tv_tensors.wrap(boxes, like=target["boxes"])}


WRONG["flipped boxes alone"] = flip_boxes_alone
RIGHT = {
    "ours": detection_transforms()["train"],
    "ours with jitter and crops": detection_transforms(jitter=0.4, crop=True)["train"],
    "ours resized": detection_transforms(96)["train"],
    "plain": to_tensor,
    "normalised": v2.Compose([v2.RandomHorizontalFlip(), NORMALISED]),
    "distorted, zoomed out, cropped": v2.Compose(
        [v2.RandomPhotometricDistort(p=1), v2.RandomZoomOut(), v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(), TO_FLOAT]
    ),
    "rotated": v2.Compose([v2.RandomRotation(30), v2.ClampBoundingBoxes(), TO_FLOAT]),
    "affine": v2.Compose([v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10), v2.ClampBoundingBoxes(), TO_FLOAT]),
    "inverted": v2.Compose([v2.RandomInvert(), TO_FLOAT]),
    "grey and blurred": v2.Compose([v2.Grayscale(3), v2.GaussianBlur(5), TO_FLOAT]),
    "erased": v2.Compose([NORMALISED, v2.RandomErasing(p=1, value=0)]),
    "erased white": v2.Compose([TO_FLOAT, v2.RandomErasing(p=1, value=1)]),
    "raises": lambda image, target: 1 / 0,
    "without any object": lambda image, target: (TO_FLOAT(image), {**target, "boxes": target["boxes"][:0]}),
}


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_what_leaves_boxes_behind_is_found(name, size):
    assert "a box that is not where its object is, in " in misplaced(WRONG[name], size, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_what_moves_both_is_not(name, size):
    assert misplaced(RIGHT[name], size, 1) is None


def test_it_leaves_the_generators_as_they_were():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    misplaced(RIGHT["ours"], (32, 32), 1)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_check_says_it(tmp_path, split):
    write_detection(tmp_path, "cars_OD")
    entry = detection_entry(PicoDetector())
    entry["transforms"] = {"train": to_tensor, "val": to_tensor, split: image_alone(v1.RandomHorizontalFlip(1.0))}
    (line,) = map(str, check(read_workload({"cars_pico": entry})[0], [tmp_path]))
    assert line.startswith(
        f"cars_pico: transforms {split}: got a box that is not where its object is, in 16 of 16 tries"
    )
    assert line.endswith("that moves the boxes with the image, as XYXY in pixels of its result")
    unlabelled = read_workload({"cars_pico": {**entry, "labels": False}})[0]
    assert bool(check(unlabelled, [tmp_path])) == (split == "val")  # boxes of train are not used then
