"""Hypothesis strategies for what people bring: task dictionaries, datasets and options, right and wrong."""

import contextlib
import shutil
from pathlib import Path

import torch
from format_samples import WRITERS
from hypothesis import strategies as st
from layout_samples import Detector
from pico import PicoNet, classification_entry, detection_entry, to_tensor, write_classification
from PIL import Image

from eval_methods import frcnn_eval
from gemel.strategies import STRATEGIES

ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 10**9, 0.0, 0.5, 1.0, 1.5, -0.1, float("nan"), float("inf"), "", "x", "0.5", "a/b"]
    + ["..", "\0", b"x", (), [], {}, [1], {"a": 1}, {"car": 1, "person": 2}, {"class0": 1, "class1": 0}, object]
    + [PicoNet, print, torch.zeros(2), torch.nn.Linear(2, 2), torch.nn.ReLU(), lambda *_: 0.5, lambda *_: None]
)
KEYS = ("model", "task", "eval_method", "transforms", "unmerged_acc", "tolerance", "dataset", "batch_size")
KEYS += ("background_class", "labels", "num_classes", "class_ids", "exif_orientation", "Model", "epochs")
NAMES = st.sampled_from(["north_pico", "south_pico", "street_pico", "north", "a b_c", "", "_x", "train_x", 3, None])


def entry_of(name: str) -> dict:
    """A right entry; the models are drawn from a seed and not trained, so their targets are low."""
    torch.manual_seed(len(name))
    if name == "street_pico":
        entry = detection_entry(Detector(3), 0.01, num_classes=3, batch_size=2)
        return {**entry, "eval_method": half_and_precision}
    return classification_entry(PicoNet(3), 0.01, batch_size=3)


def half_and_precision(model, loader):
    """Above its target for a detector that was not trained."""
    return 0.5 + 0.5 * frcnn_eval(model, loader)


@st.composite
def dictionaries(draw):
    """A dictionary of one to three tasks, with up to two things wrong or unusual; now and then something else."""
    names = draw(st.lists(st.sampled_from(["north_pico", "south_pico", "street_pico"]), min_size=1, unique=True))
    found = {name: entry_of(name) for name in names}
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 2]))):
        name = draw(st.sampled_from(sorted(found, key=str)))
        what = draw(
            st.sampled_from(["value", "value", "value", "transform", "method", "gone", "name", "entry", "shared"])
        )
        entry = found[name]
        if not isinstance(entry, dict):
            continue
        if what == "value":
            entry[draw(st.sampled_from(KEYS))] = draw(ODD)
        elif what == "transform":
            split = draw(st.sampled_from(["train", "val"]))
            entry["transforms"] = {"train": to_tensor, "val": to_tensor, split: draw(st.sampled_from(TRANSFORMS))}
        elif what == "method":
            entry["eval_method"] = draw(st.sampled_from(METHODS))
        elif what == "gone":
            entry.pop(draw(st.sampled_from(KEYS)), None)
        elif what == "name":
            found[draw(NAMES)] = found.pop(name)
        elif what == "entry":
            found[name] = draw(ODD)
        else:
            found["other_pico"] = {**entry, "dataset": "north_CL"}
    return draw(st.just(found) | st.just(found) | st.just(found) | ODD) if draw(st.integers(0, 19)) == 19 else found


def raises(*_):
    raise KeyError("a user's own\nerror")


TRANSFORMS = (
    raises,
    lambda image, target=None: image,
    lambda image, target=None: to_tensor(image) if target is None else (to_tensor(image).flip(-1), target),
    lambda image, target=None: to_tensor(image)[:1],
    lambda image, target=None: to_tensor(image) * float("nan"),
    lambda image, target=None: (to_tensor(image), {}),
)
METHODS = (
    raises,
    lambda model, loader: 50.0,
    lambda model, loader: None,
    lambda model, loader: model.double() and 0.5,
    lambda model, loader: float("nan"),
    lambda model, loader: len(list(loader)) and 0.9,
)


# ---- datasets -----------------------------------------------------------------------------------------------


def write_datasets(root: Path, layout: str) -> None:
    """Right datasets of the three tasks."""
    write_classification(root, "north_CL", images=2, seed=1)
    write_classification(root, "south_CL", images=2, seed=2)
    WRITERS[layout](root / "street_OD")


LAYOUTS = st.sampled_from(sorted(WRITERS))


@st.composite
def damages(draw):
    """Up to two changes of files, as (what, which file or folder of all, a text)."""
    change = st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 10**6), st.sampled_from(TEXTS))
    return draw(st.just([]) | st.lists(change, max_size=2))


TEXTS = (
    "",
    "\n",
    "0 0.5 0.5 0.2 0.2\n",
    "7 0.5 0.5 0.2 0.2\n",
    "0 9 9 9 9\n",
    "{}",
    "[]",
    "train: x\n",
    "<annotation/>",
    "\0\xff",
)


def damage(root: Path, changes: list) -> None:
    """Makes the changes, each as far as it can be made."""
    for what, number, text in changes:
        paths = sorted(root.rglob("*"))
        if paths:
            with contextlib.suppress(OSError, ValueError, UnicodeDecodeError):
                CHANGES[what](paths[number % len(paths)], text)


def _remove(path: Path, text: str) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _image(mode: str, size: tuple[int, int]):
    def replace(path: Path, text: str) -> None:
        folder = path if path.is_dir() else path.parent
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new(mode, size).save(folder / f"{'new' if path.is_dir() else path.stem}.png", exif=exif)

    return replace


CHANGES = {
    "remove": _remove,
    "write": lambda path, text: path.write_text(text) if path.is_file() else (path / "notes.txt").write_text(text),
    "append": lambda path, text: path.write_text(path.read_text() + text),
    "double": lambda path, text: path.write_text(path.read_text() * 2),
    "cut": lambda path, text: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "rename": lambda path, text: path.rename(path.with_name(path.name.upper())),
    "move": lambda path, text: path.parent.name == "datasets" or path.rename(path.parent.parent / path.name),
    "deeper": lambda path, text: ((path.parent / "deep").mkdir(), path.rename(path.parent / "deep" / path.name)),
    "copy": lambda path, text: shutil.copy(path, path.with_name(f"copy_{path.name}")),
    "folder": lambda path, text: (path if path.is_dir() else path.parent).joinpath("test").mkdir(),
    "link": lambda path, text: (path.parent / "link").symlink_to(path.parent),
    "grey": _image("I;16", (16, 16)),
    "palette": _image("P", (40, 20)),
    "tiny": _image("RGB", (1, 1)),
}


# ---- options ------------------------------------------------------------------------------------------------

QUICK = {"device": "cpu", "time_budget": 20, "max_epochs": 1, "validation_share": 1.0}
RIGHT = {
    "strategy": st.sampled_from(sorted(STRATEGIES)),
    "tolerance": st.sampled_from([0.01, 0.5, 1.0]),
    "seed": st.integers(0, 3),
    "initial_weights": st.sampled_from(["mean", "first", "least_squares"]),
    "alignment": st.sampled_from(["none", "activations", "weights"]),
    "per_class": st.booleans(),
    "memory": st.sampled_from([1, 10**4, 10**9]),
    "num_workers": st.just(0),
    "screening_images": st.sampled_from([0, 2]),
    "freeze_prefix": st.booleans(),
}


@st.composite
def options(draw):
    """Options of merge_workload, of which now and then one is wrong."""
    chosen = draw(st.lists(st.sampled_from(sorted(RIGHT)), max_size=3, unique=True))
    found = {**QUICK, **{key: draw(RIGHT[key]) for key in chosen}}
    if draw(st.integers(0, 9)) == 9:
        found[draw(st.sampled_from([*RIGHT, "learning_rate", "pareto", "fresh", "lr", "cache_bytes", "datasets"]))] = (
            draw(ODD)
        )
    return found
