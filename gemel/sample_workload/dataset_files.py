"""Writes scenes into dataset folders: crops by class for classification, frames and annotations for detection."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemel.sample_workload.camera import CANVAS, Camera
from gemel.sample_workload.scenes import Scene, crop, draw_scene, frame


class Crops(NamedTuple):
    """Output of single objects: folder/<class>/*.jpg of size x size pixels, at most `per_class` of each class."""

    folder: Path
    classes: tuple[str, ...]
    size: int
    per_class: int


class Frames(NamedTuple):
    """Output of whole scenes: folder/images/*.jpg of size x size pixels and folder/annotations/*.txt."""

    folder: Path
    classes: tuple[str, ...]  # in the order of the class ids
    size: int


def write_scenes(
    camera: Camera, numbers: Iterable[int], outputs: Sequence[Crops | Frames], rng: np.random.Generator
) -> None:
    """Draws one scene per number and writes it to all outputs; the number is part of the file names."""
    left = [dict.fromkeys(one.classes, one.per_class) if isinstance(one, Crops) else {} for one in outputs]
    for number in numbers:
        scene = draw_scene(camera, rng)
        for output, wanted in zip(outputs, left, strict=True):
            if isinstance(output, Crops):
                _write_crops(output, f"{number:04}", scene, wanted, rng)
            else:
                _write_frame(output, f"{number:04}", scene, rng)


def _write_crops(output: Crops, stem: str, scene: Scene, wanted: dict[str, int], rng: np.random.Generator) -> None:
    """Writes the objects of a scene that are still wanted, one file each; wanted: class -> number still to write."""
    for number, item in enumerate(scene.objects):
        if wanted.get(item.kind, 0) > 0:
            wanted[item.kind] -= 1
            _write(output.folder / item.kind / f"{stem}_{number}.jpg", crop(scene, item, output.size, rng))


def _write_frame(output: Frames, stem: str, scene: Scene, rng: np.random.Generator) -> None:
    """Writes a scene and its annotation file, which is empty if it has no objects."""
    lines = []
    for item in scene.objects:
        left, top, right, bottom = (edge / CANVAS for edge in item.box)
        values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        lines.append(f"{output.classes.index(item.kind)} " + " ".join(f"{value:.6f}" for value in values))
    _write(output.folder / "images" / f"{stem}.jpg", frame(scene, output.size, rng))
    _write(output.folder / "annotations" / f"{stem}.txt", "".join(f"{line}\n" for line in lines).encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
