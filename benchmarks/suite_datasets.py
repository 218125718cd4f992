"""Writes the datasets of the suite: drawn scenes, parts of Fashion-MNIST and of photographs, laid out as usual."""

import gzip
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.suite_workloads import FASHION, FASHION_CLASSES, SHARED, Drawn, Fashion, Subset, Suite
from gemel.environment.seeds import derive_seed
from gemel.sample_workload.artifacts import replacement_of
from gemel.sample_workload.dataset_files import Crops, Frames, write_scenes
from gemel.workload import CLASSIFICATION, DATASET_SUFFIX, DETECTION, Problem, WorkloadError

RECIPE, SEED = 1, 0  # increase RECIPE when what is written for equal entries of the suite changes
RECIPE_FILE = ".recipe"
SPLITS = ("train", "val")
FASHION_PARTS = {"train": "train", "val": "t10k"}
NUMBERS_PER_CAMERA = 1000  # scenes are numbered through, so that those of several cameras fit in one folder
IDX_IMAGES, IDX_LABELS = 2051, 2049  # magic numbers of the idx format: bytes in three and in one dimensions

Sources = Mapping[str, Path | None]  # flag -> its folder or file; None: not given


def dataset_folder(root: Path, suite: Suite, name: str) -> Path:
    """Where the dataset is written."""
    return root / "datasets" / (name + DATASET_SUFFIX[kind_of(suite, name)])


def kind_of(suite: Suite, name: str) -> str:
    """CLASSIFICATION or DETECTION."""
    dataset = suite.datasets[name]
    return CLASSIFICATION if isinstance(dataset, Fashion) else dataset.kind


def dataset_digest(suite: Suite, name: str) -> str:
    """A digest of everything in the suite that the dataset depends on."""
    dataset = suite.datasets[name]
    cameras = [suite.cameras[camera] for camera in dataset.cameras] if isinstance(dataset, Drawn) else []
    return hashlib.sha256(repr((RECIPE, SEED, name, dataset, cameras)).encode()).hexdigest()[:16]


def is_written(root: Path, suite: Suite, name: str) -> bool:
    """Whether the dataset is complete and of this suite."""
    stamp = dataset_folder(root, suite, name) / RECIPE_FILE
    return stamp.is_file() and stamp.read_text() == dataset_digest(suite, name)


def missing_source(suite: Suite, name: str, sources: Sources) -> str | None:
    """Why the dataset cannot be written: its source is not given or not there. None: it can."""
    dataset = suite.datasets[name]
    if isinstance(dataset, Drawn):
        return None
    flag = FASHION if isinstance(dataset, Fashion) else SHARED
    folder = sources.get(flag)
    if folder is None:
        return f"{flag} is not given"
    needed = [folder / dataset.folder] if isinstance(dataset, Subset) else [*_idx_files(folder, "train").values()]
    absent = [path for path in needed if not path.exists()]
    return f"{flag}: there is no {absent[0]}" if absent else None


def write_dataset(root: Path, suite: Suite, name: str, sources: Sources) -> None:
    """Writes the dataset; its folder appears when it is complete.

    Raises WorkloadError if a source has too few images of a class, or is not what it should be.
    """
    dataset = suite.datasets[name]
    with replacement_of(dataset_folder(root, suite, name)) as folder:
        for number, split in enumerate(SPLITS):
            rng = np.random.default_rng(derive_seed(SEED, "suite", name, split))
            if isinstance(dataset, Drawn):
                _draw(suite, name, folder / split, number, rng)
            elif isinstance(dataset, Fashion):
                _write_fashion(dataset, _given(sources, FASHION), folder / split, split, rng)
            else:
                source = _given(sources, SHARED) / dataset.folder / split
                _copy_photographs(dataset, source, folder / split, rng)
        (folder / RECIPE_FILE).write_text(dataset_digest(suite, name))


def _given(sources: Sources, flag: str) -> Path:
    path = sources[flag]
    assert path is not None, "missing_source has refused it"
    return path


# ---- drawn scenes ---------------------------------------------------------------------------------------


def _draw(suite: Suite, name: str, folder: Path, split: int, rng: np.random.Generator) -> None:
    """Draws the scenes of one split; split: 0 for train, 1 for val."""
    dataset = suite.datasets[name]
    assert isinstance(dataset, Drawn)
    for index, camera in enumerate(dataset.cameras):
        numbers = range(NUMBERS_PER_CAMERA * index, NUMBERS_PER_CAMERA * index + dataset.scenes[split])
        output: Crops | Frames
        if dataset.kind == DETECTION:
            output = Frames(folder, dataset.classes, dataset.size)
        else:
            output = Crops(folder, dataset.classes, dataset.size, dataset.per_class[split])
        write_scenes(suite.cameras[camera], numbers, [output], rng)


# ---- Fashion-MNIST --------------------------------------------------------------------------------------


def _idx_files(folder: Path, part: str) -> dict[str, Path]:
    """The files of one part of Fashion-MNIST, as in the Debian package dataset-fashion-mnist."""
    return {"images": folder / f"{part}-images-idx3-ubyte.gz", "labels": folder / f"{part}-labels-idx1-ubyte.gz"}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array, [n, rows, columns] or [n], of a gzipped idx file. Raises WorkloadError if it is another."""
    content = gzip.decompress(path.read_bytes())
    magic = int.from_bytes(content[:4], "big")
    if magic not in (IDX_IMAGES, IDX_LABELS):
        allowed = f"{IDX_IMAGES} (images) or {IDX_LABELS} (labels)"
        raise WorkloadError([Problem("suite", FASHION, f"{path} with the magic number {magic}", allowed)])
    num_dimensions = magic % 256
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, num_dimensions + 1)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def _write_fashion(dataset: Fashion, source: Path, folder: Path, split: str, rng: np.random.Generator) -> None:
    """Writes a random choice of each class as PNG, with noise."""
    arrays = {what: read_idx(path) for what, path in _idx_files(source, FASHION_PARTS[split]).items()}
    wanted = dataset.per_class[SPLITS.index(split)]
    for kind in dataset.classes:
        (there,) = np.nonzero(arrays["labels"] == FASHION_CLASSES.index(kind))
        _require(kind, len(there), wanted, source)
        (folder / kind).mkdir(parents=True)
        for index in rng.choice(there, wanted, replace=False):
            pixels = arrays["images"][index] + rng.normal(0, dataset.noise, arrays["images"].shape[1:])
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / kind / f"{index:05}.png")


# ---- photographs ----------------------------------------------------------------------------------------


def _copy_photographs(dataset: Subset, source: Path, folder: Path, rng: np.random.Generator) -> None:
    """Copies a random choice of the images of a split, at most as many as the suite wants, with their annotations."""
    wanted = dataset.images[SPLITS.index(source.name)]
    if dataset.kind == CLASSIFICATION:
        for kind in dataset.classes:
            _copy(_chosen(source / kind, wanted, rng), folder / kind)
    else:
        images = _chosen(source / "images", wanted, rng)
        _copy(images, folder / "images")
        annotations = [source / "annotations" / f"{image.stem}.txt" for image in images]
        _copy([path for path in annotations if path.exists()], folder / "annotations")


def _chosen(folder: Path, wanted: int, rng: np.random.Generator) -> list[Path]:
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    _require(folder.name, len(files), 1, folder)
    return [files[index] for index in sorted(rng.permutation(len(files))[:wanted])]


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _require(kind: str, got: int, wanted: int, source: Path) -> None:
    if got < wanted:
        raise WorkloadError([Problem("suite", "images", f"{got} of class {kind!r} in {source}", f"at least {wanted}")])
