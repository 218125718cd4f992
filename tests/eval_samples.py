"""Models with prepared outputs, and random scenes, for eval methods."""

import torch
from torch import nn

SIZE = 200  # pixels of the synthetic scenes


class Fixed(nn.Module):
    """Returns prepared outputs, one per image in the order of the loader, and records how it was called."""

    def __init__(self, outputs, batched=False):
        super().__init__()
        self.outputs, self.batched, self.position, self.calls = outputs, batched, 0, []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        self.calls.append((self.training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        part = self.outputs[self.position : self.position + len(images)]
        self.position += len(images)
        return torch.stack(part) if self.batched else part


def detector_loader(targets, batch_size=4):
    images = [torch.zeros(3, SIZE, SIZE)] * len(targets)
    return [(images[i : i + batch_size], targets[i : i + batch_size]) for i in range(0, len(targets), batch_size)]


def target(boxes=(), labels=(), **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "image_id": 7, **more}


def output(boxes=(), labels=(), scores=()):
    return {**target(boxes, labels), "scores": torch.tensor(scores, dtype=torch.float32)}


def random_boxes(generator, count):
    corner = torch.rand(count, 2, generator=generator) * 150
    return torch.cat([corner, corner + 3 + torch.rand(count, 2, generator=generator) * 47], 1)


def scenes(num_images=60, seed=3):
    """Targets and outputs: images without objects or detections, classes 1-5 of which 5 is never annotated,

    class 4 annotated only as crowd, detections of the wrong class, duplicates, noise, equal scores.
    """
    generator = torch.Generator().manual_seed(seed)
    targets, outputs = [], []
    for i in range(num_images):
        count = 0 if i % 7 == 0 else int(torch.randint(1, 6, (1,), generator=generator))
        boxes = random_boxes(generator, count)
        labels = torch.randint(1, 5, (count,), generator=generator)
        crowd = ((labels == 4) | (torch.rand(count, generator=generator) < 0.15)).long()
        size = boxes[:, 2:] - boxes[:, :2]
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowd, "area": size.prod(1), "image_id": 0})
        jitter = torch.randn(count, 4, generator=generator)
        wrong = torch.rand(count, generator=generator) < 0.2
        noise = random_boxes(generator, 3)
        found = torch.cat([boxes + jitter, boxes[:1] + 1, noise]) if i % 5 else torch.zeros(0, 4)
        names = torch.cat([torch.where(wrong, 5, labels), labels[:1], torch.tensor([1, 5, 2])])[: len(found)]
        scores = (torch.rand(len(found), generator=generator) * 20).round() / 20
        outputs.append({"boxes": found, "labels": names, "scores": scores})
    return targets, outputs
