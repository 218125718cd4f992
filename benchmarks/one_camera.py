"""Two classifiers and a detector that see the frames of one camera: what running their common first layers once gains.

    python -m benchmarks.one_camera [--folder DIR] [--tolerance 0.95] [--seed 0] [--seconds 8] [--repeats 3]

The detector is the embedded default's of Main & 2nd, and its frames are the camera's. Two classifiers of whole frames,
whether there is a truck and whether there are many people, are trained from the detector's backbone, with weights and
normalisation of their own. The three are merged with share_norm; then frames arrive at twice the rate that would fit,
and the merged workload runs with and without shared computation in turn. Time is counted in CPU seconds. Some minutes
of one core, the most of it training. --random: the same architectures with random weights instead, with all that is
alike in the backbones tied, normalisation too: the most that there is to gain.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.edge import write_as_merged
from eval_methods import classification_eval, frcnn_eval
from gemel.edge.counts import CpuClock
from gemel.edge.frames import FolderFrames, RandomFrames, default_transform
from gemel.edge.profile import measure
from gemel.edge.runtime import Result, Runtime
from gemel.environment.seeds import seeded
from gemel.sample_workload.tasks import DATASETS_ROOT, FRAME_SIZE, TASKS, load_trained, new_model
from gemel.sample_workload.tasks import unmerged_acc as accuracy_of
from gemel.sharing.groups import Occurrence, find_groups
from gemel.sharing.normalisation import can_share, group_of, own_tensors, tie_normalisation
from gemel.sharing.tying import tie
from gemel.workload import CLASSIFICATION, DETECTION
from merge_workloads import create_sample_model_dict, merge_workload
from model_architectures import build
from transforms import classification_transforms, detection_transforms

CAMERA, DETECTOR = "main_2nd", "main_2nd_traffic_fcos"
SPLITS = ("train", "val", "test")
QUESTIONS = {"truck": ("truck", 1), "crowd": ("person", 3)}  # name -> (kind, at least so many of it)
ENDLESS = 10**9


def write_frames(folder: Path) -> None:
    """Class folders with the camera's frames, one dataset a question; and the detector's own dataset beside them."""
    source = DATASETS_ROOT / f"{CAMERA}_traffic_OD"
    shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
    for question, (kind, least) in QUESTIONS.items():
        class_id = str(TASKS[DETECTOR].classes.index(kind))
        for image in sorted(source.glob("*/images/*.jpg")):
            split, lines = image.parts[-3], (image.parents[1] / "annotations" / f"{image.stem}.txt").read_text()
            count = sum(line.split()[0] == class_id for line in lines.splitlines())
            target = folder / f"{CAMERA}_{question}_CL" / split / ("yes" if count >= least else "no") / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target)


def trained_classifier(folder: Path, question: str, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """(a classifier that was trained from the detector's backbone, its accuracy on val)."""
    model = build("slim_resnet", 2, **{key: TASKS[DETECTOR].kwargs[key] for key in ("layers", "width")})
    body = load_trained(DETECTOR).backbone.body.state_dict()  # type: ignore[union-attr, operator]
    model.load_state_dict(body, strict=False)
    data = folder / f"{CAMERA}_{question}_CL"
    images, labels = _read(data / "train")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // 16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    with seeded(seed, "one camera", question):
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(16)[: len(images) // 16]:
                flipped = images[batch].flip(-1) if torch.rand(()) < 0.5 else images[batch]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(flipped), labels[batch]).backward()
                optimizer.step()
                schedule.step()
    images, labels = _read(data / "val")
    return model.eval(), classification_eval(model, [(images, labels)])


def _read(split: Path) -> tuple[Tensor, Tensor]:
    frames = FolderFrames(split)
    transform = default_transform(CLASSIFICATION, FRAME_SIZE)
    images = torch.stack([transform(frames[i]) for i in range(len(frames))])
    return images, torch.tensor([int(file.parent.name == "yes") for file in frames.files])


def workload(folder: Path, epochs: int, seed: int) -> dict:
    """The task dictionary. seed: of the training of the classifiers."""
    create_sample_model_dict()  # draws and trains what is missing
    write_frames(folder)
    entries: dict[str, dict] = {}
    for question in QUESTIONS:
        model, accuracy = trained_classifier(folder, question, epochs, seed)
        entries[f"{CAMERA}_{question}_resnet10"] = {
            "model": model,
            "task": "image_classification",
            "eval_method": classification_eval,
            "transforms": classification_transforms(FRAME_SIZE),
            "unmerged_acc": accuracy,
        }
    entries[DETECTOR] = {
        "model": load_trained(DETECTOR),
        "task": "object_detection",
        "eval_method": frcnn_eval,
        "transforms": detection_transforms(),
        "unmerged_acc": accuracy_of(DETECTOR),
    }
    return entries


def write_random(results: Path) -> None:
    """A result of the three architectures with random weights, in which the whole backbone is one."""
    torch.manual_seed(0)
    kwargs = {key: TASKS[DETECTOR].kwargs[key] for key in ("layers", "width")}
    models = nn.ModuleDict(
        {f"{CAMERA}_{question}_resnet10": build("slim_resnet", 2, **kwargs) for question in QUESTIONS}
    )
    models[DETECTOR] = new_model(DETECTOR)
    groups = find_groups(models)
    tie(models, groups, "first")
    norms = []
    for name, norm in next(iter(models.values())).named_modules():
        if can_share(norm):
            layers = [name if task != DETECTOR else f"backbone.body.{name}" for task in models]
            norms.append(group_of(models, [Occurrence(*pair) for pair in zip(models, layers, strict=True)]))
            tie_normalisation(models, norms[-1], own_tensors(norm))
    write_as_merged(results, models.eval(), (*groups, *norms))


# ---- running it -----------------------------------------------------------------------------------------


def opened(results: Path, shared: bool) -> Runtime:
    """The merged workload with everything in memory, on one thread's clock."""
    with Runtime(results) as probe:
        kinds = probe.kinds
    of_kind = {kind: default_transform(kind, FRAME_SIZE) for kind in (CLASSIFICATION, DETECTION)}
    transforms = {task: of_kind[kind] for task, kind in kinds.items()}
    return Runtime(results, transforms=transforms, device="cpu", clock=CpuClock, shared_computation=shared)


def run(
    results: Path, shared: bool, frames: Sequence, fps: float, sla: float, seconds: float
) -> tuple[dict[str, Any], dict]:
    """(summary, answers by task and frame) of so many seconds of the stream."""
    answers = {}
    with opened(results, shared) as runtime:

        def take(result: Result) -> None:
            answers[result.task, result.frame] = result.output
            if result.frame >= seconds * fps:
                runtime.stop()

        summary = runtime.run(frames, fps, sla, ENDLESS, on_result=take)
    return summary, answers


def _frames() -> Path:
    return DATASETS_ROOT / f"{CAMERA}_traffic_OD" / "val" / "images"


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal in every bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)


def compare(results: Path, frames: Sequence, seconds: float, repeats: int) -> float:
    """Prints frames in time and answers with and without shared computation; the ratio of frames."""
    with opened(results, False) as runtime:
        profile = measure(runtime, frames, (1, 2))
    cycle = sum(task.run_seconds(1) + task.input_ms / 1e3 for task in profile.tasks.values())
    fps, sla = 2 / cycle, 2.5 * cycle
    in_time: dict[bool, list[float]] = {True: [], False: []}
    equal = compared = 0
    for _ in range(repeats):
        answers = {}
        for shared, found in in_time.items():
            summary, answers[shared] = run(results, shared, frames, fps, sla, seconds)
            found.append(sum(task["processed"] for task in summary["tasks"].values()) / summary["seconds"])
            if shared:
                said = summary["shared_computation"]
        both = answers[True].keys() & answers[False].keys()
        compared += len(both)
        equal += sum(same(answers[True][key], answers[False][key]) for key in both)
    rates = {shared: statistics.median(found) for shared, found in in_time.items()}
    ratio = rates[True] / rates[False]
    print(f"run once a frame, of the multiplications of each model: {[group['share'] for group in said['groups']]}")
    print(
        f"frames answered in time, a second, at {fps:.1f} frames a second and task, within {1e3 * sla:.0f} ms: "
        f"{rates[False]:.1f} without, {rates[True]:.1f} with shared computation, {ratio:.2f} x; "
        f"{equal} of {compared} answers equal in every bit; {said['peak_bytes'] / 1024:.0f} KiB kept at most",
        flush=True,
    )
    return ratio


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the datasets and the results there; default: nowhere")
    parser.add_argument("--random", action="store_true", help="random weights; trains and merges nothing")
    parser.add_argument("--epochs", type=int, default=8, help="of the classifiers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their training (default: %(default)s)")
    parser.add_argument("--strategy", default="adaptive", help="of the merge (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--max-epochs", type=float, default=1.0, help="of a trial (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        results = folder / "results"
        if flags.random:
            write_random(results)
        elif not (results / "merged.json").is_file():
            entries = workload(folder / "datasets", flags.epochs, flags.seed)
            options = {"tolerance": flags.tolerance, "share_norm": True, "num_threads": 1, "device": "cpu"}
            options |= {"strategy": flags.strategy, "max_epochs": flags.max_epochs, "initial_weights": "least_squares"}
            options |= {"feature_weight": 1.0, "probability_weight": 1.0}
            merge_workload(entries, results, datasets=folder / "datasets", **options)
        frames = RandomFrames(FRAME_SIZE, FRAME_SIZE) if flags.random else FolderFrames(_frames())
        compare(results, frames, flags.seconds, flags.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
