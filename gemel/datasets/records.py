"""What every reader of detection annotations hands over: the objects of an image, and what is wrong with a file.

Boxes are (x1, y1, x2, y2) in shares of the image's width and height, whatever the format; class ids count from 0.
"""

import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MIN_SIDE = 1e-7  # share of the image; a shorter side is none in the float32 pixels that models are trained with
ROUNDING = 1e-5  # share of the image: six decimals rounded, which is not worth a word
CLIPPED = "a box that left the image by rounding was clipped to it"
BYTE_ORDER_MARK = "a byte order mark was skipped"
WINDOWS_LINES = "Windows line ends were read as line ends"
AREA = "boxes with a width and a height above 0"
MAX_TEXT_BYTES = 256 << 20  # a list of a million images
ORIENTATION = 0x0112  # EXIF


class Fault(NamedTuple):
    """One thing that is wrong; place: "line 3" or "annotations[3].bbox", or "" for the file as a whole."""

    file: Path
    place: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return f"{f'{self.file} {self.place}'.strip()}: got {self.got}; allowed: {self.allowed}"


class Box(NamedTuple):
    """One object; crowd: not trained on, and neither right nor wrong where it is detected."""

    place: str
    class_id: int
    corners: tuple[float, float, float, float]
    crowd: bool = False


@dataclass
class Objects:
    """The objects of one image, and everything that was wrong with their annotation.

    size: (width, height) of the image as the annotation states it, if it does. repairs: what was put right, counted.
    """

    boxes: list[Box] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    size: tuple[int, int] | None = None
    repairs: Counter = field(default_factory=Counter)


class Source(Protocol):
    """Where the objects of one image stand; `read` never raises for what is wrong in the file, only OSError."""

    file: Path | None

    def read(self) -> Objects: ...

    def content(self) -> bytes:
        """What a fingerprint depends on: other bytes where other objects may be read."""


@dataclass
class Split:
    """The samples of one split, and what is wrong with it beyond what its sources say when they are read."""

    samples: list[tuple[Path, Source]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    repairs: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Layout:
    """A dataset folder as it was recognised; splits: "train", "val" and, where there is one, "test", read when asked.

    images, objects: where those of a "{split}" are expected, for messages. class_names: by class id, () where the
    format names none. crowds: whether the format marks objects as crowds.
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
    """What the folder holds, sorted by name, without hidden entries; [] if there is no such folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and not path.is_dir()


def image_files(folder: Path) -> list[Path]:
    """The images that lie directly in the folder."""
    return [path for path in visible(folder) if is_image(path)]


def read_text(file: Path) -> tuple[str, Counter, list[Fault]]:
    """The text of a small file with plain line ends, what was put right for that, and why it is no text."""
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
    """Whether there is such a file; False also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def header_size(image: Path) -> tuple[int, int] | None:
    """(width, height) as the image is shown, from its header alone; None if it cannot be read."""
    try:
        with Image.open(image) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return opened.size[::-1] if turned else opened.size
    except Exception:  # Pillow's decoders raise many types on broken files; decoding reports them
        return None


# ---- values -----------------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    """A finite number that float() takes; neither a truth value nor a text that looks like one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


def shown(value: object) -> str:
    """A value from a file in a few words, however long or deep it is."""
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # such as a number of 5000 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist = 2, 80, 80, 6


def settle(corners: Sequence[float], tolerance: Sequence[float], repairs: Counter) -> tuple[Any, ...] | None:
    """The box within the image, or None if it leaves it by more than the tolerance (x, y), in shares.

    What is clipped is counted in `repairs`, unless it is no more than decimals rounded.
    """
    x1, y1, x2, y2 = corners
    over_x, over_y = max(-x1, x2 - 1), max(-y1, y2 - 1)
    if over_x <= 0 and over_y <= 0:
        return tuple(corners)
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0))
    if over_x > tolerance[0] or over_y > tolerance[1] or is_empty(inside):
        return None
    repairs[CLIPPED] += max(over_x, over_y) > ROUNDING
    return inside


def is_empty(corners: Sequence[float]) -> bool:
    return corners[2] - corners[0] < MIN_SIDE or corners[3] - corners[1] < MIN_SIDE
