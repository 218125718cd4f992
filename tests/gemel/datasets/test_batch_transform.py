"""Transforms of whole batches: what torchvision makes image by image, with draws of each image's own."""

import numpy as np
import pytest
import torch
from dataset_samples import TO_FLOAT, classifier_task, detector_task, opened, save_image, write_detection_split
from pico import write_classification
from PIL import Image
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from gemel.datasets.batch_transform import Crop, Flip, Images, Jitter, batch_transform
from gemel.datasets.folders import transform_seed
from gemel.datasets.transform_parts import apply, decoded, parts_of
from transforms import classification_transforms, detection_transforms


def pictures(count=6, size=(30, 20), seed=0):
    drawn = np.random.default_rng(seed).integers(0, 256, (count, size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in drawn]


def pixels_of(images):
    return [functional.pil_to_tensor(image) for image in images]


def target_of(image, boxes=((2, 3, 12, 15),)):
    size = (image.height, image.width)
    found = tv_tensors.BoundingBoxes(torch.tensor(boxes).float().reshape(-1, 4), format="XYXY", canvas_size=size)
    return {"boxes": found, "labels": torch.ones(len(boxes), dtype=torch.int64), "image_id": 0}


VAL = {
    "named": classification_transforms(12)["val"],
    "v1": v1.Compose([v1.Resize(14), v1.CenterCrop(12), v1.ToTensor(), v1.Normalize([0.5] * 3, [0.2] * 3)]),
    "tensor first": v2.Compose([v2.ToImage(), v2.Resize((12, 9)), v2.ToDtype(torch.float32, scale=True)]),
    "sequential": torch.nn.Sequential(v2.CenterCrop(12), v2.ToImage(), v2.ConvertImageDtype(torch.float32)),
}


@pytest.mark.parametrize("name", VAL)
def test_without_random_steps_a_batch_gives_what_its_images_give_bit_by_bit(tmp_path, name):
    for number, image in enumerate(pictures()):
        (tmp_path / "cars_CL" / "val" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "cars_CL" / "val" / f"{number % 2}" / f"{number}.png")
    write_classification(tmp_path, "cars_CL", classes=2, images=2)
    transform = VAL[name]
    data = opened(classifier_task(val=transform), tmp_path, cache_bytes=1 << 20)
    dataset = data.val.dataset
    assert dataset.parts.batch is not None and not dataset.parts.batch.is_random
    wanted = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in dataset.samples])
    for _ in range(2):
        found = torch.cat([images for images, _ in data.val])
        assert torch.equal(found, wanted) and found.is_contiguous() and type(found) is torch.Tensor


@pytest.mark.parametrize("size", [None, 16, (12, 18)])
def test_a_detector_s_images_and_boxes_are_those_of_its_transform(size):
    transform = detection_transforms(size)["val"]
    parts = parts_of(transform, has_boxes=True)
    assert parts.batch is not None and not parts.batch.is_random
    for image in [*pictures(2), *pictures(2, (20, 30))]:
        wanted, boxes = transform(image, target_of(image))
        first = decoded(*apply(parts.first, image, target_of(image)))
        (found,) = parts.batch([first.pixels], [first.target], 0)
        assert torch.equal(found, wanted) and torch.equal(first.target["boxes"], boxes["boxes"])


def test_colours_are_changed_as_torchvision_changes_them():
    images = [functional.to_image(image) for image in pictures(8)]
    changed = Images(torch.stack(images), None, torch.Generator().manual_seed(3))
    ranges = ((0.2, 1.8), (0.3, 1.7), (0.4, 1.6))
    Jitter(ranges)(changed)
    draws = torch.Generator().manual_seed(3)
    low, high = torch.tensor(ranges).T
    factors = low + torch.rand(8, 3, generator=draws) * (high - low)
    orders = torch.rand(8, 3, generator=draws).argsort(1)
    assert len(orders.unique(dim=0)) > 2, "every image has an order of its own"
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for image, found, factor, order in zip(images, changed.pixels, factors, orders.tolist(), strict=True):
        wanted = functional.to_dtype(image, torch.float32, scale=True)
        for kind in order:
            wanted = adjust[kind](wanted, float(factor[kind]))
        torch.testing.assert_close(found, wanted.as_subclass(torch.Tensor), atol=2e-6, rtol=0)


def test_crops_have_the_sizes_that_torchvision_draws():
    theirs = v2.RandomResizedCrop(10, scale=(0.2, 0.9))
    ours = Crop((10, 10), theirs.scale, theirs.ratio, theirs.interpolation, True)
    uniform = torch.rand(2000, 11, 2, generator=torch.Generator().manual_seed(0)).tolist()
    boxes = torch.tensor([ours.box(30, 50, draws[:10], draws[10]) for draws in uniform]).float()
    image = torch.zeros(3, 30, 50)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = [theirs.make_params([image]) for _ in range(2000)]
    others = torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in drawn]).float()
    assert (boxes[:, 0] + boxes[:, 2] <= 30).all() and (boxes[:, 1] + boxes[:, 3] <= 50).all()
    assert (boxes.mean(0) - others.mean(0)).abs().max() < 0.5 and (boxes.std(0) - others.std(0)).abs().max() < 0.5
    assert ours.box(10, 100, [(0.9, 0.5)] * 10, (0, 0)) == (0, 43, 10, 13), "where nothing fits, the middle"


def test_a_crop_has_the_pixels_of_its_place():
    images = pictures(4)
    step = Crop((8, 8), (0.3, 0.6), (0.75, 4 / 3), v2.InterpolationMode.BILINEAR, True)
    changed = Images(pixels_of(images), None, torch.Generator().manual_seed(5))
    step(changed)
    draws = torch.Generator().manual_seed(5)
    shares, places = torch.rand(4, 10, 2, generator=draws).tolist(), torch.rand(4, 2, generator=draws).tolist()
    for image, found, share, place in zip(images, changed.pixels, shares, places, strict=True):
        top, left, height, width = step.box(image.height, image.width, share, place)
        wanted = functional.resized_crop(image, top, left, height, width, [8, 8])
        assert (found.int() - functional.pil_to_tensor(wanted).int()).abs().max() <= 1, "rounding alone"


def test_every_image_is_flipped_or_not_by_itself_and_its_boxes_with_it():
    for sizes in ([(30, 20)] * 12, [(30, 20), (20, 30)] * 6):
        images = [Image.new("RGB", size) for size in sizes]
        for image in images:
            image.paste((255, 255, 255), (2, 3, 12, 15))
        targets = [target_of(image) for image in images]
        steps = [Flip(0.5, -1), Flip(0.5, -2)]
        changed = Images(pixels_of(images), targets, torch.Generator().manual_seed(1))
        for step in steps:
            step(changed)
        corners = set()
        for pixels, target in zip(changed.pixels, targets, strict=True):
            x1, y1, x2, y2 = target["boxes"][0].int().tolist()
            corners.add((x1 == 2, y1 == 3))
            assert (x2 - x1, y2 - y1) == (10, 12) and pixels[:, y1:y2, x1:x2].min() == 255
            assert int((pixels > 0).sum()) == 3 * 10 * 12
        assert len(corners) == 4


def test_augmented_images_look_on_average_as_those_of_torchvision():
    image = pictures(1, (60, 40), seed=4)[0]
    transform = classification_transforms(16)["train"]
    parts = parts_of(transform, has_boxes=False)
    found = torch.cat([parts.batch(pixels_of([image] * 50), None, seed) for seed in range(8)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wanted = torch.stack([transform(image) for _ in range(400)])
    assert found.shape == wanted.shape and len(found.flatten(1).unique(dim=0)) == len(found)
    assert (found.mean(0) - wanted.mean(0)).abs().mean() < 0.05
    assert (found.std(0) - wanted.std(0)).abs().mean() < 0.05


UNKNOWN = {
    "a function": lambda image: TO_FLOAT(image),
    "a subclass": type("Own", (v2.Resize,), {})(8),
    "hue": v2.ColorJitter(0.1, hue=0.1),
    "an unknown step": v2.RandomGrayscale(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_step_that_is_not_known_is_called_image_by_image(name):
    steps = [v2.CenterCrop(10), UNKNOWN[name], TO_FLOAT]
    parts = parts_of(v2.Compose(steps), has_boxes=False)
    assert parts.batch is None and parts.first == (steps[0],) and parts.rest[0] is UNKNOWN[name]
    assert batch_transform([v2.RandomHorizontalFlip()], has_boxes=False, is_tensor=False) is None, "no floats"
    assert parts_of(v1.Compose([v1.ToTensor()]), has_boxes=True).batch is None, "it passes no boxes on"
    assert parts_of(UNKNOWN["a function"], has_boxes=True).batch is None


def test_what_a_plain_callable_is_given_it_may_change(tmp_path):
    seen = []

    def spoil(image):
        seen.append(np.array(image).copy())
        image.paste((0, 0, 0), (0, 0, image.width, image.height))
        return TO_FLOAT(image)

    write_classification(tmp_path, "cars_CL", classes=2, images=2)
    data = opened(classifier_task(train=spoil), tmp_path, cache_bytes=1 << 20)
    for _ in range(2):
        list(data.train)
    assert len(seen) == 8 and sorted(map(np.sum, seen[:4])) == sorted(map(np.sum, seen[4:])) and np.sum(seen[0]) > 0


@pytest.mark.parametrize("kind", ["CL", "OD"])
def test_augmented_images_depend_on_the_seed_alone(tmp_path, kind):
    """Not on the cache, nor on loader processes."""
    if kind == "CL":
        write_classification(tmp_path, "cars_CL", classes=2, images=6)
        task = classifier_task(**classification_transforms(12))
    else:
        for split in ("train", "val"):
            write_detection_split(tmp_path / "cars_OD" / split, {str(i): "0 0.4 0.4 0.2 0.2\n" for i in range(9)})
        save_image(tmp_path / "cars_OD" / "train" / "images" / "3.png", 9, (16, 24))
        task = detector_task(**detection_transforms(jitter=0.2))

    def passes(**options):
        data = opened(task, tmp_path, **options)
        assert data.train.dataset.parts.batch.is_random
        return [str(batch) + str([image.sum() for image in batch[0]]) for _ in range(3) for batch in data.train]

    wanted = passes()
    assert len(set(wanted)) == len(wanted)
    assert passes(cache_bytes=3000) == wanted == passes(cache_bytes=1 << 20) == passes(num_workers=1, cache_bytes=4000)
    assert passes(seed=1) != wanted


def test_a_fingerprint_sees_the_transform_as_it_is(tmp_path):
    """Not how it is computed here, so that results of earlier versions are recognised."""
    write_classification(tmp_path, "cars_CL", classes=2, images=2)
    transform = classification_transforms(12)["train"]
    dataset = opened(classifier_task(train=transform), tmp_path, cache_bytes=1 << 20).train.dataset
    with transform_seed(7):
        wanted = transform(Image.open(dataset.samples[1][0]).convert("RGB"))
    assert torch.equal(dataset.image_by_image()[1, 7][0], wanted)
    assert not torch.equal(dataset[1, 7][0], wanted)
