"""Records that every reader of detection annotations returns: the objects of an image, and the faults of a file.

Boxes are (x1, y1, x2, y2) relative to the image's width and height, in [0, 1], for all formats; class ids count from 0.
"""

import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, TypeGuard

from PIL import Image

IMAGE_SUFFIXES = {  # raster images that Pillow decodes by itself
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
}
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
NOT_DATA = "__MACOSX"  # the folder of file attributes in an archive made on macOS
MIN_SIDE = 1e-7  # relative to the image; a shorter side is 0 in float32 pixels
ROUNDING = 1e-5  # relative to the image: rounding to six decimals, which is not reported
CLIPPED = "a box that exceeded the image by rounding was clipped to it"
BYTE_ORDER_MARK = "a byte order mark was skipped"
WINDOWS_LINES = "Windows line ends were read as line ends"
COPIES = "an object that stands twice in an image, with the same class and box, was taken once"
NO_FILE = "an image without an annotation file was taken as one without objects"
NO_CLASS = "N/A"  # the name of a class id without a class, as in torchvision
NO_IMAGE = "as it is no image"  # why a file was passed over
NO_TEST = "the test split was left out, as it has no image with {}"
AREA = "boxes with a width and a height above 0"
MAX_TEXT_BYTES = 256 << 20  # a list of a million images
ORIENTATION = 0x0112  # EXIF


Corners = tuple[float, float, float, float]  # x1, y1, x2, y2, relative to the image


class Fault(NamedTuple):
    """One problem of a file; place: "line 3", "annotations[3].bbox", or "" for the whole file."""

    file: Path
    place: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return f"{f'{self.file} {self.place}'.strip()}: got {self.got}; allowed: {self.allowed}"


class Box(NamedTuple):
    """One object; crowd: it is left out of training, and a detection of it counts neither as right nor as wrong."""

    place: str
    class_id: int
    corners: Corners
    crowd: bool = False


@dataclass
class Objects:
    """The objects of one image, and all faults of their annotation.

    size: (width, height) of the image if the annotation states it. repairs: what was corrected -> how often.
    """

    boxes: list[Box] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    size: tuple[int, int] | None = None
    repairs: Counter = field(default_factory=Counter)


class Source(Protocol):
    """Where the objects of one image are stored; file: None if the image has no annotation file."""

    @property
    def file(self) -> Path | None: ...

    def read(self) -> Objects:
        """The objects, with what is wrong in the file as faults. Raises OSError only."""

    def content(self) -> bytes:
        """Bytes for a fingerprint: they differ whenever the objects differ."""


@dataclass
class Split:
    """The samples (image, source) of one split, and faults that are known before the sources are read."""

    samples: list[tuple[Path, Source]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    repairs: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Layout:
    """The layout of a dataset folder; splits: functions that read "train", "val" and, if it exists, "test".

    images, objects: where the images and the objects of a "{split}" are expected, for messages. class_names: by class
    id, () if the format has none. crowds: whether the format marks objects as crowds.
    """

    name: str
    splits: Mapping[str, Callable[[], Split]]
    images: str
    objects: str
    class_names: tuple[str, ...] = ()
    crowds: bool = False
    faults: Sequence[Fault] = ()
    repairs: Counter = field(default_factory=Counter)


# ---- files ------------------------------------------------------------------------------------------------


def visible(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, sorted by name; [] if there is no such folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file that is not hidden."""
    return has_image_name(path) and not path.is_dir()


def has_image_name(path: Path) -> bool:
    """The same of what is known to be a file."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."


def image_files(folder: Path) -> list[Path]:
    """The images directly in the folder."""
    return [path for path in visible(folder) if is_image(path)]


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """(folder, its files sorted by name) for a folder and all folders below it, links followed, but for hidden ones.

    Each folder comes once, also where links lead in a circle.
    """
    entered = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        inner = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders) if name[0] != "."}
        folders[:] = [name for name, real in inner.items() if real not in entered and name != NOT_DATA]
        entered.update(inner.values())
        yield Path(parent), [Path(parent, name) for name in sorted(files) if name[0] != "."]


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """(images, other files) in the folder and in all folders below it."""
    images: list[Path] = []
    others: list[Path] = []
    for _, files in walk(folder):
        for path in files:
            (images if has_image_name(path) else others).append(path)
    return images, others


def passed_over(paths: Iterable[Path], why: str) -> Counter:
    """How many files of each suffix were passed over, each named by its first; why: such as NO_IMAGE."""
    by_suffix: dict[str, list[Path]] = {}
    for path in paths:
        by_suffix.setdefault(path.suffix.lower(), []).append(path)
    counts: Counter[str] = Counter()
    for suffix, found in by_suffix.items():
        example = f"{found[0].parent.name}/{found[0].name}"
        counts[f"a file {suffix or 'without a suffix'} was passed over, {why} (such as {example})"] = len(found)
    return counts


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, whose name may be written in capitals, and be valid or validation for val."""
    there = {path.name.lower(): path for path in reversed(visible(folder)) if path.is_dir()}
    return next((there[name] for name in SPLIT_FOLDERS[split] if name in there), folder / split)


def read_text(file: Path) -> tuple[str, Counter, list[Fault]]:
    """(text with Unix line ends, repairs, faults) of a UTF-8 file of at most MAX_TEXT_BYTES."""
    content = file.read_bytes()
    if len(content) > MAX_TEXT_BYTES:
        return "", Counter(), [Fault(file, "", f"{len(content)} bytes", f"at most {MAX_TEXT_BYTES} bytes")]
    repairs = Counter({BYTE_ORDER_MARK: content.startswith(b"\xef\xbb\xbf"), WINDOWS_LINES: b"\r\n" in content})
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return "", +repairs, [Fault(file, f"line {line}", f"the byte 0x{content[error.start]:02x}", "UTF-8 text")]
    return text.replace("\r\n", "\n"), +repairs, []


def file_exists(path: Path) -> bool:
    """Whether the file exists; False also for invalid file names."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_turned(image: Path) -> bool:
    """Whether an image has an EXIF orientation by which it is turned or mirrored; False if it cannot be read."""
    try:
        with Image.open(image) as opened:
            return opened.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # Pillow raises many types on broken files; the check of images reports them
        return False


def header_size(image: Path, turned: bool = True) -> tuple[int, int] | None:
    """(width, height), read from the header alone; None if it cannot be read. turned: after EXIF orientation."""
    try:
        with Image.open(image) as opened:
            swapped = turned and opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return opened.size[::-1] if swapped else opened.size
    except Exception:  # Pillow raises many types on broken files; the check of images reports them
        return None


def without_copies(objects: Objects) -> Objects:
    """The objects with every copy (the same class and the same box) removed and counted, as Ultralytics does."""
    once: dict[tuple, Box] = {}
    for box in objects.boxes:
        once.setdefault((box.class_id, box.corners, box.crowd), box)
    if len(once) < len(objects.boxes):
        objects.repairs[COPIES] += len(objects.boxes) - len(once)
        objects.boxes = list(once.values())
    return objects


# ---- values -----------------------------------------------------------------------------------------------


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number of a moderate size; booleans and strings are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


def shown(value: object) -> str:
    """A value from a file as text of at most 80 characters, however long or deeply nested it is."""
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # such as a number of 5000 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist = 2, 80, 80, 6


def clip_box(corners: Corners, tolerance: Sequence[float], repairs: Counter) -> Corners | None:
    """The box clipped to the image; None if it exceeds the image by more than the tolerance (x, y), relative to it.

    A clipped box is counted in `repairs` if it exceeds the image by more than ROUNDING.
    """
    x1, y1, x2, y2 = corners
    over_x, over_y = max(-x1, x2 - 1), max(-y1, y2 - 1)
    if over_x <= 0 and over_y <= 0:
        return x1, y1, x2, y2
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0))
    if over_x > tolerance[0] or over_y > tolerance[1] or is_empty(inside):
        return None
    repairs[CLIPPED] += max(over_x, over_y) > ROUNDING
    return inside


def names_by_id(ids: Mapping[str, int]) -> list[str]:
    """The class names by class id; NO_CLASS where there is none."""
    named = {number: name for name, number in ids.items()}
    return [named.get(number, NO_CLASS) for number in range(max(named, default=-1) + 1)]


def is_empty(corners: Sequence[float]) -> bool:
    """Whether a side of the box is shorter than MIN_SIDE."""
    return corners[2] - corners[0] < MIN_SIDE or corners[3] - corners[1] < MIN_SIDE
