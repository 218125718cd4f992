"""The named transforms keep the convention of the task dictionary; boxes follow what is done to the image."""

import pickle

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from transforms import IMAGENET_MEAN, IMAGENET_STD, classification_transforms, detection_transforms


def picture_with_box(box=(2, 4, 10, 12), size=(40, 20)):
    """Black, and white inside the box."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    boxes = tv_tensors.BoundingBoxes([list(box)], format="XYXY", canvas_size=size[::-1], dtype=torch.float32)
    return image, {"boxes": boxes, "labels": torch.tensor([3]), "image_id": 5}


@pytest.mark.parametrize("size, shape", [(24, (3, 24, 24)), ((16, 24), (3, 16, 24))])
@pytest.mark.parametrize("split", ["train", "val"])
def test_classification_makes_normalised_tensors_of_one_size(size, shape, split):
    transform = classification_transforms(size)[split]
    for image in (Image.new("RGB", (50, 30), (255, 255, 255)), Image.new("RGB", (9, 90), (255, 255, 255))):
        tensor = transform(image)
        assert type(tensor) is torch.Tensor and tensor.shape == shape and tensor.dtype == torch.float32
        if split == "val":
            white = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
            assert torch.allclose(tensor, white[:, None, None].expand(shape), atol=1e-5)


def test_val_is_deterministic_and_cuts_nothing_off():
    image = Image.new("RGB", (60, 20))
    image.paste((255, 255, 255), (0, 0, 4, 20))  # at the edge that a centre crop would lose
    val = classification_transforms(20)["val"]
    assert torch.equal(val(image), val(image))
    assert val(image)[0, :, 0].min() > val(image)[0].mean()


@pytest.mark.parametrize("size", [None, 16, (30, 50)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_detection_boxes_follow_the_image(size, split):
    transform = detection_transforms(size, flip=1.0)[split]
    image, target = transform(*picture_with_box())
    height, width = (20, 40) if size is None else (16, 16) if size == 16 else size
    assert image.shape == (3, height, width) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() == 1
    expected = torch.tensor([[30.0, 4, 38, 12]] if split == "train" else [[2.0, 4, 10, 12]])
    expected *= torch.tensor([width / 40, height / 20] * 2)
    assert torch.allclose(target["boxes"], expected, atol=1e-4)
    x0, y0, x1, y1 = expected[0].round().int().tolist()
    assert image[:, y0:y1, x0:x1].mean() > 0.75  # white is where the box is
    assert target["labels"].tolist() == [3] and target["image_id"] == 5


def test_crops_drop_boxes_and_labels_together():
    image, _ = picture_with_box()
    corners = [[x, y, x + 6, y + 6] for x in range(0, 32, 8) for y in (0, 10)]
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(20, 40), dtype=torch.float32)
    target = {"boxes": boxes, "labels": torch.arange(len(boxes)), "image_id": 0}
    torch.manual_seed(0)
    train = detection_transforms(crop=True)["train"]
    counts = set()
    for _ in range(30):
        cropped, after = train(image, target)
        counts.add(len(after["boxes"]))
        assert len(after["labels"]) == len(after["boxes"]) >= 1
        assert (after["boxes"][:, 2:] > after["boxes"][:, :2]).all()
        assert (after["boxes"][:, 2:].amax(0) <= torch.tensor(cropped.shape[:0:-1])).all()
    assert len(counts) > 1


def test_transforms_can_be_sent_to_worker_processes():
    for transforms in (classification_transforms(8), detection_transforms(8, crop=True)):
        assert pickle.loads(pickle.dumps(transforms)).keys() == {"train", "val"}
