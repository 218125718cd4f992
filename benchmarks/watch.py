"""Whether `edge run --watch` notices new light and weather, and how often it goes back without a cause.

    python merge_workloads.py --results RESULTS --keep-unmerged --time-budget 150s
    python -m benchmarks.watch RESULTS [--images 400] [--runs 100] [--frames 2000] [--within 200]

RESULTS: of the embedded default, with its unmerged models. Scenes of both cameras are drawn as the models were trained
(with other seeds), in haze, and in another light and weather; merged and unmerged models run on them once. Each run
draws its stream from what was so found, and goes through the test of `edge run` frame by frame. Minutes on a CPU, most
of it for drawing.
"""

import argparse
import io
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from gemel import load_merged
from gemel.console.tables import table
from gemel.edge.watch import Watch, WatchOptions
from gemel.environment.seeds import derive_seed
from gemel.evaluation.agreement import agreement_of
from gemel.forward.batches import run
from gemel.forward.modes import logits_of
from gemel.results_store.files import UNMERGED
from gemel.results_store.manifest import read_manifest
from gemel.sample_workload.camera import CAMERAS, Camera
from gemel.sample_workload.scenes import crop, draw_scene, frame
from gemel.sample_workload.tasks import CROP_SIZE, FRAME_SIZE, TASKS
from gemel.workload import CLASSIFICATION
from merge_workloads import sample_methods

AS_TRAINED, HAZE, NEW = "as trained", "haze", "new light and weather"
BATCH = 50  # images that go through a model at once


def weather_of(name: str, camera: Camera) -> Camera:
    """The camera in another weather. Haze: a third of the sight, more noise. New: also other light, sky and blur."""
    if name == AS_TRAINED:
        return camera
    camera = camera._replace(haze=camera.haze / 3, noise=1.5 * camera.noise)
    if name == HAZE:
        return camera
    if camera.night:  # a foggy morning
        camera = camera._replace(sun_light=(0.2, 0.22, 0.3), sky_light=(0.5, 0.5, 0.56))
        return camera._replace(haze=25.0, blur=0.9, sky=((196, 200, 206), (170, 178, 190)))
    # evening
    camera = camera._replace(sun=(0.7, 0.3, 0.35), sun_light=(0.9, 0.5, 0.25), sky_light=(0.2, 0.2, 0.28))
    return camera._replace(haze=35.0, blur=0.9, sky=((230, 190, 150), (150, 130, 160)))


class Models(NamedTuple):
    """Of a results folder."""

    records: Mapping[str, Mapping]  # its manifest's entries of the tasks
    merged: Mapping[str, nn.Module]
    unmerged: Mapping[str, nn.Module]


def agreements(models: Models, weather: str, num_images: int) -> dict[str, list[float]]:
    """Task -> the agreement of merged and unmerged model on each image."""
    found = {}
    for name, camera in CAMERAS.items():
        tasks = {task: sample for task, sample in TASKS.items() if sample.cameras == (name,)}
        drawn = _images(name, weather_of(weather, camera), weather, num_images)
        for task, sample in tasks.items():
            files = drawn["frames"] if sample.kind != CLASSIFICATION else _crops(drawn, sample.classes)
            found[task] = _compared(models, task, sample.kind, files[:num_images])
    return found


def _images(name: str, camera: Camera, weather: str, count: int) -> dict[str, list[bytes]]:
    """JPEG files: `frames`, and crops by the kind of the object, until there are enough of all together."""
    rng = np.random.default_rng(derive_seed(1, "watch", name, weather))
    drawn: dict[str, list[bytes]] = {"frames": []}
    while len(drawn["frames"]) < count:
        scene = draw_scene(camera, rng)
        drawn["frames"].append(frame(scene, FRAME_SIZE, rng))
        for item in scene.objects:
            drawn.setdefault(item.kind, []).append(crop(scene, item, CROP_SIZE, rng))
    return drawn


def _crops(drawn: Mapping[str, list[bytes]], classes: Sequence[str]) -> list[bytes]:
    """As many of each class, as in val: in turn."""
    least = min(len(drawn[kind]) for kind in classes)
    return [drawn[kind][i] for i in range(least) for kind in classes]


def _compared(models: Models, task: str, kind: str, files: Sequence[bytes]) -> list[float]:
    transform = sample_methods()[kind].transform
    found: list[float] = []
    for first in range(0, len(files), BATCH):
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files[first : first + BATCH]]
        if kind == CLASSIFICATION:
            batch: torch.Tensor | list[torch.Tensor] = torch.stack([transform(image) for image in images])
        else:
            batch = [transform(image, {})[0] for image in images]
        outputs = (logits_of(run(own[task], batch)) for own in (models.merged, models.unmerged))
        found += [agreement_of(kind, *pair) for pair in zip(*outputs, strict=True)]
    return found


class Streams(NamedTuple):
    """What a stream that begins in one weather and goes on in another is drawn from."""

    before: Mapping[str, list[float]]
    after: Mapping[str, list[float]]
    num_before: int
    num_after: int


def delays(records: Mapping, streams: Streams, seed: int) -> dict[str, int | None]:
    """Task -> frames from the change to its going back in one run; below 0: before the change; None: never."""
    watch = Watch(WatchOptions(rate=1.0), records)
    return {task: next(_went_back(watch, task, streams, random.Random(f"{seed} {task}")), None) for task in records}


def _went_back(watch: Watch, task: str, streams: Streams, rng: random.Random) -> Iterator[int]:
    for k in range(-streams.num_before, streams.num_after):
        if watch.observe(task, k, rng.choice((streams.before if k < 0 else streams.after)[task])):
            yield k + 1 if k >= 0 else k


def rows_of(records: Mapping, streams: Streams, runs: int) -> list[list[str]]:
    """A row per task, one per camera, one for all: in how many runs it went back after the change, and before it."""
    found = [delays(records, streams, seed) for seed in range(runs)]
    groups = {task: [task] for task in records}
    groups |= {f"any of {name}": [t for t in records if TASKS[t].cameras == (name,)] for name in CAMERAS}
    groups["any"] = list(records)
    rows = []
    for title, tasks in groups.items():
        first = [min((at for t in tasks if (at := d[t]) is not None), default=None) for d in found]
        noticed, early = [d for d in first if d is not None and d > 0], [d for d in first if d is not None and d < 0]
        median = f"{statistics.median(noticed):.0f}" if noticed else "-"
        row = [title, "", "", f"{len(early)} of {runs}", f"{len(noticed)} of {runs - len(early)}", median]
        if title in records:
            mean = statistics.mean(streams.after[title])
            row[1:3] = [f"{records[title]['agreement']:.3f}", f"{mean:.3f}"]
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", metavar="RESULTS", help="of the embedded default, with its unmerged models")
    parser.add_argument("--images", type=int, default=400, help="drawn by camera and weather (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=2000, help="sampled before a change (default: %(default)s)")
    parser.add_argument("--within", type=int, default=200, help="sampled frames after it (default: %(default)s)")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = Path(flags.results)
    models = Models(read_manifest(folder)["tasks"], load_merged(folder), load_merged(folder / UNMERGED))
    usual = agreements(models, AS_TRAINED, flags.images)
    for weather in (AS_TRAINED, HAZE, NEW):
        changed = usual if weather == AS_TRAINED else agreements(models, weather, flags.images)
        for num_before in (0, flags.frames):
            streams = Streams(usual, changed, num_before, flags.within)
            print(f"\n{num_before} sampled frames as trained, then {flags.within}: {weather}")
            header = ("task", "agreed", "agreement then", "went back before", f"within {flags.within}", "median")
            print(table(header, rows_of(models.records, streams, flags.runs)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
