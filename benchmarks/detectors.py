"""What every detector can do here: is built, evaluates, trains, ties, and is fitted back to what it did before.

    python -m benchmarks.detectors            # all of them, small images: a quarter of an hour or more
    python -m benchmarks.detectors fcos_resnet50_fpn yolov3

The weights are random: this shows that the parts fit each other, not what a trained detector recovers. Each model is
built twice; the second has the weights of the first with noise on them, as if both came from one ancestor. A cell says
what was measured, or why it could not be. Prints a line per model as it is done, and the table; exit code 1 if anything
failed but training of models whose losses need more than boxes.
"""

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from tqdm import tqdm

from eval_methods import frcnn_eval
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.fitting.sequential_fit import fit_sequentially, sample_teachers
from gemel.merging.console import table
from gemel.sharing.groups import Configuration, compared_layers, find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import is_tied, tie
from gemel.training.distillation import Teacher
from model_architectures import build

OURS = ("fcos_model", "frcnn_model", "ssd_mobilenet_model", "ssd_vgg_model", "yolov3", "yolov3_tiny")
SIZE = 128  # of the images; SSD and SSDLite resize them to the one size that they are made for
NUM_IMAGES, NUM_CLASSES = 4, 3
NOISE = 0.3  # of the standard deviation of each weight
STEPS, LEARNING_RATE = 8, 1e-4
MORE_THAN_BOXES = ("maskrcnn", "keypointrcnn")  # whose losses need masks or keypoints
HEADER = ("model", "builds", "evaluates", "trains", "ties", "recovers")


def arguments_of(name: str) -> dict:
    if name.startswith("yolo"):
        return {"size": SIZE}
    if name.startswith("ssd"):
        return {"weights_backbone": None}
    return {"min_size": SIZE, "max_size": SIZE, "weights_backbone": None}


def drawn(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images [3, SIZE, SIZE] with one bright rectangle each on noise, and the targets."""
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
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(NOISE * parameter.std() * torch.randn_like(parameter))
    return other


def settle(models: nn.ModuleDict) -> None:
    """Batch normalisation statistics of the images, as models have that were trained."""
    for seed, model in enumerate(models.values()):
        reestimate_statistics(model, [drawn(seed)], torch.device("cpu"))
    models.eval()


def evaluates(model: nn.Module) -> str:
    images, targets = drawn(1)
    accuracy = frcnn_eval(model, [(images[i : i + 2], targets[i : i + 2]) for i in range(0, NUM_IMAGES, 2)])
    assert 0 <= accuracy <= 1, accuracy
    with torch.inference_mode():
        count = sum(len(found["boxes"]) for found in model(images))
    return f"{count} boxes"


def trains(models: nn.ModuleDict, configuration: Configuration) -> str:
    """Both models tied, a few steps on the same images: do the losses fall, and do the ties hold?"""
    optimizer = torch.optim.AdamW(models.parameters(), lr=LEARNING_RATE)
    models.train()
    sums = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for seed, model in enumerate(models.values()):
            images, targets = drawn(seed)
            torch.manual_seed(seed)  # which proposals are sampled
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
def error(models: nn.ModuleDict, teachers: nn.ModuleDict, configuration: Configuration) -> float:
    """Mean squared difference of layers over the depth, relative to their variance, mean of both models."""
    errors = []
    for seed, (name, model) in enumerate(models.items()):
        images, _ = drawn(seed)
        teacher = Teacher(model, teachers[name], compared_layers(model, name, configuration))
        errors.append(float(teacher.losses(images, model(images))["features"]))
        teacher.close()
    return sum(errors) / len(errors)


def recovers(models: nn.ModuleDict, teachers: nn.ModuleDict, configuration: Configuration) -> str:
    """The mean of the weights, and the same fitted in closed form: how far from the two models are they?"""
    settle(models)
    before = error(models, teachers, configuration)
    images = {name: [drawn(seed)[0]] for seed, name in enumerate(models)}
    source = torch.Generator().manual_seed(0)
    asked = sample_teachers(teachers, configuration, images, generator=source)
    fits = fit_sequentially(models, teachers, configuration, images, teacher_samples=asked)
    after = error(models, teachers, configuration)
    fitted = sum(g.saved_bytes for g in configuration if fits[g].fitted) / saved_bytes(configuration)
    assert after < before, f"the fit made it worse: {before:.3f} -> {after:.3f}"
    return f"error {before:.2f} -> {after:.2f}, {100 * fitted:.0f} % of bytes fitted"


def row_of(name: str) -> tuple[list[str], bool]:
    """The cells of one model, and whether all is as it should be."""
    torch.manual_seed(0)
    model = build(name, NUM_CLASSES, **arguments_of(name)).eval()
    cells, good = [name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"], True
    teachers = nn.ModuleDict({"first": model, "second": noisy(model)}).eval().requires_grad_(False)
    settle(teachers)
    models = copy.deepcopy(teachers).requires_grad_(True)
    configuration = find_groups(models)

    def ties() -> str:
        whole = distinct_bytes(models)
        tie(models, configuration)
        assert whole - distinct_bytes(models) == saved_bytes(configuration)
        return f"{100 * saved_bytes(configuration) / (whole / 2):.1f} % of a model"

    found: dict[str, str] = {}
    steps: dict[str, Callable[[], str]] = {
        "evaluates": lambda: evaluates(model),
        "ties": ties,
        "recovers": lambda: recovers(models, teachers, configuration),
        "trains": lambda: trains(models, configuration),
    }
    for step, measure in steps.items():
        if step == "trains" and name.startswith(MORE_THAN_BOXES):
            found[step] = "needs more than boxes"
            continue
        try:
            found[step] = measure()
        except Exception as problem:  # the table is to say what does not work
            found[step], good = failure(problem), False
    return [*cells, *(found[step] for step in HEADER[2:])], good


def failure(problem: Exception) -> str:
    return f"FAILED: {type(problem).__name__}: {' '.join(str(problem).split())[:80]}"


def tried(name: str) -> tuple[list[str], bool]:
    """`row_of`; a model that cannot even be built is a row as well, and the others go on."""
    try:
        return row_of(name)
    except Exception as problem:
        return [name, failure(problem), *["-"] * (len(HEADER) - 2)], False


def main(arguments: list[str] | None = None) -> int:
    everything = [*torchvision_models.list_models(module=torchvision_models.detection), *OURS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: {', '.join(everything)}")
    names = parser.parse_args(arguments).names or everything
    if unknown := set(names) - set(everything):
        parser.error(f"names: got {', '.join(sorted(unknown))}; allowed: {', '.join(everything)}")
    found = []
    for name in tqdm(names, unit="model", leave=False, disable=None):
        found.append(tried(name))
        tqdm.write(": ".join([name, ", ".join(found[-1][0][1:])]))  # the table comes after what may be an hour
    print("\n" + table(HEADER, [cells for cells, _ in found]))
    return 0 if all(good for _, good in found) else 1


if __name__ == "__main__":
    sys.exit(main())
