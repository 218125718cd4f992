"""The Pascal VOC layouts: an XML file per image with its size, and objects with a name and box corners in pixels.

VOC's own layout has Annotations/*.xml, JPEGImages/ and ImageSets/Main/<split>.txt; Roboflow's has a folder per split
with the XML files beside the images. Images and files are paired by stem; <filename> is not read.

VOC counts pixels from 1, and a box includes xmax and ymax (devkit_doc of VOC2012: "the top-left pixel in the image has
coordinates (1,1)"). So 1 is subtracted from xmin and ymin only, as in detectron2 (data/datasets/pascal_voc.py). In a
file of a tool that counts from 0, boxes are off by one pixel and clipped at the edge.

Objects marked as difficult are ignored in evaluation, as in VOC, and left out of training, as in Fast R-CNN's code
(pascal_voc.py, use_diff=False): they become crowds.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from xml.parsers import expat

from gemel.datasets.numbering import Numbering, name_labels
from gemel.datasets.records import (
    AREA,
    BYTE_ORDER_MARK,
    NO_FILE,
    NO_IMAGE,
    SPLIT_FOLDERS,
    Box,
    Corners,
    Fault,
    Layout,
    Objects,
    Split,
    clip_box,
    files_below,
    header_size,
    image_files,
    is_empty,
    is_image,
    is_number,
    names_by_id,
    passed_over,
    read_text,
    shown,
    visible,
    without_copies,
)
from gemel.datasets.yolo import orphan_faults, path_below, stem_faults

NAME = "Pascal VOC XML"
CLASSES_FILE = "classes.txt"
MAX_XML_BYTES = 4 << 20  # of one image
CORNERS = ("xmin", "ymin", "xmax", "ymax")
PIXELS = 1.0  # a box that exceeds the image by at most this is clipped
NO_SIZE = "the size of an image was read from the image, as its annotation has none"
INSIDE = "boxes inside the image, in pixels from 1"


def evidence(folder: Path) -> str | None:
    """The files by which one of the layouts is recognised, as a pattern; None if they are missing."""
    for part in ("Annotations", *SPLIT_FOLDERS["train"]):
        if any(path.suffix.lower() == ".xml" for path in visible(folder / part)):
            return f"{part}/*.xml"
    return None


def open_layout(folder: Path, numbering: Numbering, turned: bool) -> Layout:
    """The layout of the folder; without a classes.txt it reads all annotations for the class names.

    turned: whether an image whose size is not stated has the size that its EXIF orientation gives it.
    """
    in_folders = evidence(folder) != "Annotations/*.xml"
    pairs_of = partial(_folder_pairs if in_folders else _listed_pairs, folder)
    there = [
        split
        for split in SPLIT_FOLDERS
        if split != "test" or (folder / ("test" if in_folders else "ImageSets/Main/test.txt")).exists()
    ]
    labels, faults, repairs = _class_labels(folder, {split: pairs_of(split, Split()) for split in there}, numbering)
    ids = {name: label - numbering.first_label for name, label in labels.items()}
    return Layout(
        NAME,
        {split: partial(_split, pairs_of, split, ids, turned) for split in there},
        images="{split}/*.jpg" if in_folders else "images that ImageSets/Main/{split}.txt lists",
        objects="XML files named after the images",
        class_names=tuple(names_by_id(ids)),
        crowds=True,
        faults=faults,
        repairs=repairs,
    )


def _split(pairs_of: Callable, split: str, ids: Mapping[str, int], turned: bool) -> Split:
    found = Split()
    found.samples = [(image, XmlFile(file, image, ids, turned)) for image, file in pairs_of(split, found)]
    return found


def _class_labels(
    folder: Path, pairs: Mapping[str, list[tuple[Path, Path | None]]], numbering: Numbering
) -> tuple[dict[str, int], list[Fault], Counter]:
    """(class name -> label, faults, what is to be said): by the lines of classes.txt, if it exists, else by names."""
    file = folder / CLASSES_FILE
    if file.is_file() and not isinstance(numbering.wanted, Mapping):
        text, _, faults = read_text(file)
        names = [line.strip() for line in text.rstrip("\n").split("\n")]
        for number, name in enumerate(names, start=1):
            if not name or name in names[: number - 1]:
                got = f"{shown(name)} again" if name else "an empty line"
                faults.append(Fault(file, f"line {number}", got, "one class name per line"))
        found = dict.fromkeys(filter(None, names))
        return {name: numbering.first_label + index for index, name in enumerate(found)}, faults, Counter()
    occur = {split: {name for _, file in of if file for name in _names_in(file)} for split, of in pairs.items()}
    elsewhere = {name for split, names in occur.items() if split != "train" for name in names}
    labels, wrong, said = name_labels(occur["train"], elsewhere, numbering)
    return labels, [Fault(folder, "", *wrong)] if wrong else [], said


def _names_in(file: Path) -> tuple[str, ...]:
    """The names of the objects in a file; () if it has a fault, which is reported when the file is read."""
    try:
        state = file.stat()
        return _names_of_state(file, state.st_mtime_ns, state.st_size)
    except OSError:
        return ()


@lru_cache(maxsize=1 << 18)
def _names_of_state(file: Path, modified: int, size: int) -> tuple[str, ...]:
    root, faults = parse(file)
    return () if faults else tuple({name for item in root.all("object") if (name := item.text("name"))})


# ---- which files ------------------------------------------------------------------------------------------


def _folder_pairs(folder: Path, split: str, found: Split) -> list[tuple[Path, Path | None]]:
    """(image, its file) of every image in a split's folder."""
    there = [folder / name for name in SPLIT_FOLDERS[split] if (folder / name).is_dir()]
    if len(there) != 1:
        names = " or ".join(SPLIT_FOLDERS[split])
        found.faults.append(Fault(folder, "", f"{len(there) or 'no'} folders {names}", f"one folder {names}"))
    if not there:
        return []
    images, others = files_below(there[0])
    files = [path for path in others if path.suffix.lower() == ".xml"]
    key = path_below(there[0])
    found.faults += [*stem_faults(images, key), *orphan_faults(files, images, key, key)]
    by_key = {key(path): path for path in files}
    found.repairs += Counter({NO_FILE: sum(key(image) not in by_key for image in images)})
    found.repairs += passed_over((path for path in others if path.suffix.lower() != ".xml"), NO_IMAGE)
    return [(image, by_key.get(key(image))) for image in images]


def _listed_pairs(folder: Path, split: str, found: Split) -> list[tuple[Path, Path | None]]:
    """(image, its file) of every stem that ImageSets/Main/<split>.txt lists."""
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        found.faults.append(Fault(listing, "", "no such file", "the stems of the split's images, one per line"))
        return []
    text, repairs, faults = read_text(listing)
    found.repairs += repairs
    found.faults += faults
    images = {path.stem: path for path in image_files(folder / "JPEGImages")}
    others = [path for path in visible(folder / "JPEGImages") if not is_image(path)]
    found.repairs += passed_over(others, NO_IMAGE)
    files = {path.stem: path for path in visible(folder / "Annotations") if path.suffix.lower() == ".xml"}
    pairs: list[tuple[Path, Path | None]] = []
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        stem = line.strip()
        if not stem:
            continue
        wrong = f"{shown(stem)} again" if stem in seen else None
        wrong = wrong or (f"no image JPEGImages/{stem[:80]}.*" if stem not in images else None)
        wrong = wrong or (f"no file Annotations/{stem[:80]}.xml" if stem not in files else None)
        if wrong:
            allowed = "stems of images with an annotation file, each once, one per line"
            found.faults.append(Fault(listing, f"line {number}", wrong, allowed))
        else:
            pairs.append((images[stem], files[stem]))
        seen.add(stem)
    found.faults += stem_faults([path for path in image_files(folder / "JPEGImages") if path.stem in seen])
    return pairs


# ---- one file ---------------------------------------------------------------------------------------------


@dataclass
class Element:
    """An XML element: its line number, text and children, without attributes."""

    tag: str
    line: int
    words: list[str] = field(default_factory=list)
    children: list["Element"] = field(default_factory=list)

    def all(self, tag: str) -> list["Element"]:
        """All children of that name."""
        return [child for child in self.children if child.tag == tag]

    def text(self, tag: str) -> str | None:
        """The text of the only child of that name; None if there is no or more than one."""
        found = self.all(tag)
        return "".join(found[0].words).strip() if len(found) == 1 else None

    def number(self, tag: str) -> float | None:
        """The number in the only child of that name; None if it is not a finite number."""
        text = self.text(tag) or ""
        try:
            value = float(text) if text.isascii() and "_" not in text else None
        except ValueError:
            return None
        return value if is_number(value) else None


def parse(file: Path) -> tuple[Element, list[Fault]]:
    """(root element, faults). A DOCTYPE is a fault: its entities could expand without limit or read other files."""
    content, top = file.read_bytes(), Element("", 0)
    if len(content) > MAX_XML_BYTES:
        return top, [Fault(file, "", f"{len(content)} bytes", f"at most {MAX_XML_BYTES} bytes")]
    parser, open_elements = expat.ParserCreate(), [top]

    def start(tag: str, attributes: dict) -> None:
        element = Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def refuse(*_: object) -> None:
        raise _Doctype

    parser.StartElementHandler, parser.StartDoctypeDeclHandler = start, refuse
    parser.EndElementHandler = lambda tag: open_elements.pop()
    parser.CharacterDataHandler = lambda text: open_elements[-1].words.append(text)
    try:
        parser.Parse(content, True)
    except _Doctype:
        return top, [Fault(file, f"line {parser.CurrentLineNumber}", "a DOCTYPE", "XML without a DOCTYPE")]
    except (expat.ExpatError, ValueError, LookupError) as error:  # ValueError, LookupError: an unknown encoding
        got = expat.ErrorString(error.code) if isinstance(error, expat.ExpatError) else str(error)[:200]
        return top, [Fault(file, f"line {parser.ErrorLineNumber}", got, "valid XML")]
    root = top.children[0]
    if root.tag != "annotation":
        return root, [Fault(file, f"line {root.line}", f"the element {shown(root.tag)}", "the element 'annotation'")]
    return root, []


class _Doctype(Exception):
    """The document has a DOCTYPE."""


@dataclass(frozen=True)
class XmlFile:
    """The objects of one image in an XML file; without a file there are none. ids: class name -> class id."""

    file: Path | None
    image: Path
    ids: Mapping[str, int]
    turned: bool = True

    def content(self) -> bytes:
        """The bytes of the file, for a fingerprint."""
        return self.file.read_bytes() if self.file else b"None\n"

    def read(self) -> Objects:
        """The objects of the file, with its faults."""
        objects = Objects()
        if self.file is None:
            return objects
        root, objects.faults = parse(self.file)
        if objects.faults:
            return objects
        with self.file.open("rb") as opened:
            objects.repairs[BYTE_ORDER_MARK] += opened.read(3) == b"\xef\xbb\xbf"
        size = self._size(root, objects)
        if size is not None:
            for item in root.all("object"):
                self._add(objects, item, size)
        return without_copies(objects)

    def _fault(self, objects: Objects, element: Element, got: str, allowed: str) -> None:
        assert self.file is not None
        objects.faults.append(Fault(self.file, f"line {element.line}", got, allowed))

    def _size(self, root: Element, objects: Objects) -> tuple[int, int] | None:
        """(width, height) that the file states, else that of the image: some tools state none, or 0 x 0."""
        stated = root.all("size")
        if stated and (stated[0].text("width"), stated[0].text("height")) not in ((None, None), ("0", "0"), ("", "")):
            width, height = stated[0].number("width") or 0, stated[0].number("height") or 0
            if len(stated) == 1 and all(side >= 1 and side == int(side) for side in (width, height)):
                objects.size = int(width), int(height)
                return objects.size
            got = f"the size {shown(stated[0].text('width'))} x {shown(stated[0].text('height'))}"
            self._fault(objects, stated[0], got, "one <size> with whole numbers of pixels from 1")
            return None
        size = header_size(self.image, self.turned)
        objects.repairs[NO_SIZE] += size is not None
        if size is None:
            self._fault(objects, root, "no <size>, and an image that cannot be read", "images that can be decoded")
        return size

    def _add(self, objects: Objects, item: Element, size: tuple[int, int]) -> None:
        """Adds one object, or what is wrong with it."""
        before = len(objects.faults)
        name, difficult = item.text("name") or "", item.text("difficult") or "0"
        if name not in self.ids:
            got = f"the object {shown(name)}" if name else "an object without a <name>"
            self._fault(objects, item, got, f"the classes of {CLASSES_FILE} or of the train split: {_some(self.ids)}")
        if difficult not in ("0", "1"):
            self._fault(objects, item, f"difficult {shown(difficult)}", "difficult 0 or 1")
        frames = item.all("bndbox")
        corners = [corner for tag in CORNERS for frame in frames if (corner := frame.number(tag)) is not None]
        if len(frames) != 1 or len(corners) != len(CORNERS):
            got = f"{len(frames) or 'no'} <bndbox>"
            if len(frames) == 1:
                got = ", ".join(f"{tag} {shown(frames[0].text(tag))}" for tag in CORNERS)
            self._fault(objects, item, got, "one <bndbox> with finite numbers xmin, ymin, xmax, ymax")
            return
        box = self._relative_box(objects, item, corners, size)
        if box is not None and len(objects.faults) == before:
            objects.boxes.append(Box(f"line {item.line}", self.ids[name], box, difficult == "1"))

    def _relative_box(
        self, objects: Objects, item: Element, corners: list[float], size: tuple[int, int]
    ) -> Corners | None:
        """The box relative to the image, clipped to it; None if it is wrong, which is a fault."""
        x1, y1, x2, y2 = corners
        shares = ((x1 - 1) / size[0], (y1 - 1) / size[1], x2 / size[0], y2 / size[1])
        got = f"the box {' '.join(f'{value:g}' for value in corners)} in an image of {size[0]} x {size[1]}"
        if x2 < x1 or y2 < y1 or is_empty(shares):
            self._fault(objects, item, got, AREA)
            return None
        inside = clip_box(shares, (PIXELS / size[0], PIXELS / size[1]), objects.repairs)
        if inside is None:
            self._fault(objects, item, got, INSIDE)
        return inside


def _some(names: Mapping[str, int]) -> str:
    return ", ".join(list(names)[:20]) + (", ..." if len(names) > 20 else "") or "none"
