"""What a joint training step costs beside plain ones: prints one line a ratio, each the median of alternated pairs.

    python -m benchmarks.throughput [--device cpu] [--pixels 96] [--batch 16] [--repeats 9]

- Joint step: three models of one architecture, all layers tied, one step of the trainer (optimizer and moving average
  of weights included), over the sum of three plain steps of the same models and batches (torchvision's reference loop:
  zero_grad, forward, cross entropy, backward, AdamW, and the moving average of weights that it has as an option).
- Layout and precision: a plain step of resnet18 in NCHW and float32 over the same with channels-last weights; with
  bfloat16 autocast; with both; and with channels-last weights in the precision that a merge chooses by measuring.
- Average: AveragedModel.update_parameters over the trainer's own, for six ResNet-50.

Ratios of the device's own time: CPU seconds of one thread, on CUDA seconds after a synchronisation.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torchvision import models as classifiers

from gemel.environment import DEVICES
from gemel.environment.device import pick_device, seconds_of
from gemel.forward.autocast import IN_FLOAT32, WHOLE, Autocast
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from gemel.training.early_stopping import Progress
from gemel.training.options import TrainingOptions
from gemel.training.precision import autocast_of, measured
from gemel.training.schedule import Schedule
from gemel.training.step import JointStep, Member
from gemel.workload import CLASSIFICATION, Reading, Task

NUM_MODELS, CLASSES = 3, 4


class Given:
    """Batches that are one and the same, on the device already."""

    def __init__(self, batch: tuple[Tensor, Tensor]):
        self.batch = batch

    def next(self) -> tuple[Tensor, Tensor]:
        return self.batch


def ratio(one: Callable[[], object], other: Callable[[], object], device: torch.device, repeats: int) -> tuple:
    """Median and spread of seconds of `one` over those of `other`, which alternate; the first pair warms up."""
    ratios = []
    for _ in range(repeats + 1):
        first = seconds_of(one, device)
        ratios.append(first / seconds_of(other, device))
    found = sorted(ratios[1:])
    return statistics.median(found), found[0], found[-1]


def show(what: str, found: tuple) -> None:
    print(f"{what}: {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})", flush=True)


def task_of(name: str, model: nn.Module) -> Task:
    nothing: Any = None  # what a step does not read
    return Task(name, model, CLASSIFICATION, nothing, nothing, nothing, 1.0, 1.0, "none", None, Reading())


def joint_step(models: nn.ModuleDict, batches: list, device: torch.device) -> Callable[[], object]:
    """One step of the trainer over all models."""
    options = TrainingOptions(warmup_steps=0)
    members = []
    for (name, model), batch in zip(models.items(), batches, strict=True):
        nothing: Any = None  # what a step does not read
        given: Any = Given(batch)
        members.append(Member(task_of(name, model), nothing, given, Progress(1.0, accuracy=1.0)))
    training = JointStep(models, options, Schedule(options, 100, True), device, {})
    training.begin_stage(members)
    return lambda: training.step(members)


def plain_step(model: nn.Module, batch: tuple, device: torch.device, autocast: Autocast = IN_FLOAT32) -> Callable:
    """One step of torchvision's reference loop, with the moving average of weights that it has as an option."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device.type != "cpu" or None)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=False)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast.within(model):
            output = model(batch[0])
        F.cross_entropy(output, batch[1]).backward()
        optimizer.step()
        average.update_parameters(model)

    return step


def batch_of(settings: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.rand(settings.batch, 3, settings.pixels, settings.pixels, device=device)
    return images, torch.randint(CLASSES, (settings.batch,), device=device)


def print_joint_step(name: str, settings: argparse.Namespace, device: torch.device) -> None:
    models = {f"a{i}_{name}": getattr(classifiers, name)(num_classes=CLASSES).to(device) for i in range(NUM_MODELS)}
    plain = [copy.deepcopy(model) for model in models.values()]
    batches = [batch_of(settings, device) for _ in models]
    tied = nn.ModuleDict(models)
    tie(tied, find_groups(tied))
    steps = [plain_step(model, batch, device) for model, batch in zip(plain, batches, strict=True)]
    found = ratio(joint_step(tied, batches, device), lambda: [step() for step in steps], device, settings.repeats)
    show(f"joint step of {NUM_MODELS} tied {name} / sum of plain steps, {settings.pixels} px", found)


def print_layouts(settings: argparse.Namespace, device: torch.device) -> None:
    batch, model = batch_of(settings, device), classifiers.resnet18(num_classes=CLASSES).to(device)
    reference = plain_step(copy.deepcopy(model), batch, device)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = batch[0].to(memory_format=torch.channels_last)
    in_bfloat16 = Autocast(torch.bfloat16, (WHOLE,))
    ways = {
        "channels-last": plain_step(last, (images, batch[1]), device),
        "bfloat16 autocast": plain_step(copy.deepcopy(model), batch, device, in_bfloat16),
        "both": plain_step(copy.deepcopy(last), (images, batch[1]), device, in_bfloat16),
    }
    chosen, found = copy.deepcopy(last).train(), {}
    found["chosen"] = measured(task_of("chosen", chosen), batch, device, None, 0)
    autocast = autocast_of(task_of("chosen", chosen), found)
    ways[f"channels-last in {found['chosen']['precision']}, as chosen"] = plain_step(chosen, batch, device, autocast)
    for way, step in ways.items():
        show(f"plain step of resnet18 in NCHW and float32 / {way}", ratio(reference, step, device, settings.repeats))


def print_average(settings: argparse.Namespace, device: torch.device) -> None:
    models = nn.ModuleDict({f"a{i}_resnet50": classifiers.resnet50().to(device) for i in range(6)})
    options = TrainingOptions()
    training = JointStep(models, options, Schedule(options, 100, True), device, {})
    training.begin_stage([])
    training.schedule.step = 1
    library = AveragedModel(models, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True)
    library.update_parameters(models)
    found = ratio(lambda: library.update_parameters(models), training._move_average, device, settings.repeats)
    show("average of six ResNet-50: AveragedModel.update_parameters / the trainer's", found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", nargs="*", default=["resnet18", "mobilenet_v3_small"])
    parser.add_argument("--without-average", action="store_true", help="six ResNet-50 take 1.5 GiB")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = pick_device(settings.device)
    for name in settings.models:
        print_joint_step(name, settings, device)
    print_layouts(settings, device)
    if not settings.without_average:
        print_average(settings, device)


if __name__ == "__main__":
    main()
