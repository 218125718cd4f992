"""Checks every detector: it is built, evaluated, tied to a second copy, fitted in closed form, and trained.

    python -m benchmarks.detectors            # all of them, small images: a quarter of an hour or more
    python -m benchmarks.detectors fcos_resnet50_fpn yolov3

The weights are random: this shows that the parts work together, not how much accuracy a trained detector recovers. Each
model is built twice; the second has the weights of the first plus noise, as if both were fine-tuned from one ancestor.
A cell states what was measured, or the error. Prints a line per model when it is done, then the table; exit code 1 if a
step failed, other than training of models whose losses need masks or keypoints.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from tqdm import tqdm

from eval_methods import frcnn_eval
from gemel.console.tables import table
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.fitting.teacher_samples import sample_teachers
from gemel.sharing.groups import Configuration, compared_layers, find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import is_tied, tie
from gemel.training.distillation import Teacher
from model_architectures import build

OURS = ("fcos_model", "frcnn_model", "ssd_mobilenet_model", "ssd_vgg_model", "yolov3", "yolov3_tiny")
SIZE = 128  # pixels of the images; SSD and SSDLite resize them to their fixed input size
NUM_IMAGES, NUM_CLASSES = 4, 3
NOISE = 0.3  # of the standard deviation of each weight
STEPS, LEARNING_RATE = 8, 1e-4
MORE_THAN_BOXES = ("maskrcnn", "keypointrcnn")  # their losses need masks or keypoints
HEADER = ("model", "builds", "evaluates", "trains", "ties", "recovers")


def arguments_of(name: str) -> dict[str, Any]:
    """The builder's arguments for small images and no pretrained weights."""
    if name.startswith("yolo"):
        return {"size": SIZE}
    if name.startswith("ssd"):
        return {"weights_backbone": None}
    return {"min_size": SIZE, "max_size": SIZE, "weights_backbone": None}


def draw_images(seed: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """NUM_IMAGES images [3, SIZE, SIZE] with one bright rectangle each on noise, and their targets."""
    source = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for index in range(NUM_IMAGES):
        image = 0.3 * torch.rand(3, SIZE, SIZE, generator=source)
        left, top = torch.randint(0, SIZE // 2, (2,), generator=source).tolist()
        width, height = torch.randint(SIZE // 4, SIZE // 2, (2,), generator=source).tolist()
        image[index % 3, top : top + height, left : left + width] += 0.6
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
        labels = torch.tensor([1 + index % (NUM_CLASSES - 1)])
        images.append(image)
        targets.append({"boxes": box, "labels": labels, "image_id": index})
    return images, targets


def noisy(model: nn.Module) -> nn.Module:
    """A copy of the model with noise on its weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(NOISE * parameter.std() * torch.randn_like(parameter))
    return other


def set_statistics(models: nn.ModuleDict) -> None:
    """Re-estimates batch normalisation statistics on the images, and puts the models into eval mode."""
    for seed, model in enumerate(models.values()):
        reestimate_statistics(model, [draw_images(seed)], torch.device("cpu"))
    models.eval()


def check_evaluation(model: nn.Module) -> str:
    """Evaluates the model; states how many boxes it detects."""
    images, targets = draw_images(1)
    accuracy = frcnn_eval(model, [(images[i : i + 2], targets[i : i + 2]) for i in range(0, NUM_IMAGES, 2)])
    assert 0 <= accuracy <= 1, accuracy
    with torch.inference_mode():
        count = sum(len(found["boxes"]) for found in model(images))
    return f"{count} boxes"


def check_training(models: nn.ModuleDict, configuration: Configuration) -> str:
    """Trains both tied models for a few steps on the same images; asserts that the losses fall and the ties hold."""
    optimizer = torch.optim.AdamW(models.parameters(), lr=LEARNING_RATE)
    models.train()
    sums = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for seed, model in enumerate(models.values()):
            images, targets = draw_images(seed)
            torch.manual_seed(seed)  # for the sampling of proposals
            losses.append(sum(model(images, targets).values()))
        total = sum(losses)
        total.backward()
        optimizer.step()
        sums.append(float(total.detach()))
    models.eval()
    assert all(is_tied(models, group) for group in configuration), "a tie broke"
    assert sums[-1] < sums[0], f"the losses rose: {sums}"
    return f"loss {sums[0]:.3g} -> {sums[-1]:.3g}"


@torch.no_grad()
def feature_error(models: nn.ModuleDict, teachers: nn.ModuleDict, configuration: Configuration) -> float:
    """Mean squared difference of features relative to their variance, over layers at several depths and both models."""
    errors = []
    for seed, (name, model) in enumerate(models.items()):
        images, _ = draw_images(seed)
        teacher = Teacher(model, teachers[name], compared_layers(model, name, configuration))
        errors.append(float(teacher.losses(images, model(images))["features"]))
        teacher.close()
    return sum(errors) / len(errors)


def check_fit(models: nn.ModuleDict, teachers: nn.ModuleDict, configuration: Configuration) -> str:
    """Fits the tied weights, now the means, in closed form; asserts that the error to the unmerged models falls."""
    set_statistics(models)
    before = feature_error(models, teachers, configuration)
    images = {name: [draw_images(seed)[0]] for seed, name in enumerate(models)}
    source = torch.Generator().manual_seed(0)
    asked = sample_teachers(teachers, configuration, images, generator=source)
    fits = fit_sequentially(models, teachers, configuration, images, teacher_samples=asked)
    after = feature_error(models, teachers, configuration)
    fitted = sum(g.saved_bytes for g in configuration if fits[g].fitted) / saved_bytes(configuration)
    assert after < before, f"the fit made it worse: {before:.3f} -> {after:.3f}"
    return f"error {before:.2f} -> {after:.2f}, {100 * fitted:.0f} % of bytes fitted"


def row_of(name: str) -> tuple[list[str], bool]:
    """The cells of one model, and whether every step succeeded."""
    torch.manual_seed(0)
    model = build(name, NUM_CLASSES, **arguments_of(name)).eval()
    cells, good = [name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"], True
    teachers = nn.ModuleDict({"first": model, "second": noisy(model)}).eval().requires_grad_(False)
    set_statistics(teachers)
    models = copy.deepcopy(teachers).requires_grad_(True)
    configuration = find_groups(models)

    def check_ties() -> str:
        whole = distinct_bytes(models)
        tie(models, configuration)
        assert whole - distinct_bytes(models) == saved_bytes(configuration)
        return f"{100 * saved_bytes(configuration) / (whole / 2):.1f} % of a model"

    found: dict[str, str] = {}
    steps: dict[str, Callable[[], str]] = {
        "evaluates": lambda: check_evaluation(model),
        "ties": check_ties,
        "recovers": lambda: check_fit(models, teachers, configuration),
        "trains": lambda: check_training(models, configuration),
    }
    for step, measure in steps.items():
        if step == "trains" and name.startswith(MORE_THAN_BOXES):
            found[step] = "needs more than boxes"
            continue
        try:
            found[step] = measure()
        except Exception as problem:  # the table reports whatever fails
            found[step], good = failure(problem), False
    return [*cells, *(found[step] for step in HEADER[2:])], good


def failure(problem: Exception) -> str:
    """The cell of a step that failed."""
    return f"FAILED: {type(problem).__name__}: {' '.join(str(problem).split())[:80]}"


def row_or_failure(name: str) -> tuple[list[str], bool]:
    """`row_of`; a model that cannot be built is a row with the error, and does not stop the others."""
    try:
        return row_of(name)
    except Exception as problem:
        return [name, failure(problem), *["-"] * (len(HEADER) - 2)], False


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 if a step failed."""
    everything = [*torchvision_models.list_models(module=torchvision_models.detection), *OURS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: {', '.join(everything)}")
    names = parser.parse_args(arguments).names or everything
    if unknown := set(names) - set(everything):
        parser.error(f"names: got {', '.join(sorted(unknown))}; allowed: {', '.join(everything)}")
    found = []
    for name in tqdm(names, unit="model", leave=False, disable=None):
        found.append(row_or_failure(name))
        tqdm.write(": ".join([name, ", ".join(found[-1][0][1:])]))  # the table may come an hour later
    print("\n" + table(HEADER, [cells for cells, _ in found]))
    return 0 if all(good for _, good in found) else 1


if __name__ == "__main__":
    sys.exit(main())
