"""Images of val with what the unmerged and the merged model say of them, the worst disagreements first."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from gemel.report.html import Html, as_html, paragraph, section
from gemel.report.record import Record
from gemel.workload import CLASSIFICATION

MAX_IMAGE = 60_000  # characters


def examples(record: Record, most: int) -> Html:
    """Cards by task, at most so many each; nothing where the folder has no examples, as those of earlier versions."""
    if record.examples and not most:
        return section("What the models say", paragraph("Left out, as this page would be too large with images."))
    parts = []
    for name, found in record.examples.items():
        task = record.manifest["tasks"][name]
        try:
            draw = _classified if task["task"] == CLASSIFICATION else _detected
            cards = "".join(draw(example, task.get("class_names") or ()) for example in found["shown"][:most])
            looked_at = int(found["looked_at"])
        except (KeyError, TypeError, ValueError, IndexError):  # not what a merge writes
            continue
        text = f"{name}: the largest disagreements among {looked_at} images"
        parts.append(f'<h3>{as_html(text)}</h3><div class="cards">{cards}</div>')
    intro = "Images as the models get them, brightness stretched. Boxes: dashed unmerged, solid merged."
    missing = "This folder holds no examples: a merge writes them when it ends."
    return section("What the models say", paragraph(intro if parts else missing), *parts)


def _classified(example: Mapping[str, Any], names: Sequence[str]) -> str:
    said = [
        f"{what}: {_name(example[what]['class'], names)} ({float(example[what]['probability']):.2f})"
        for what in ("unmerged", "merged")
    ]
    truth = f"it is {_name(example['label'], names)}"
    return _card(picture(example, truth, ""), [truth, *said], example)


def _detected(example: Mapping[str, Any], names: Sequence[str]) -> str:
    boxes = "".join(
        _box(found, what, f"{what}: {_name(found['class'], names)} {float(found['score']):.2f}", _size(example))
        for what in ("unmerged", "merged")
        for found in example[what]
    )
    said = [f"{what}: {_counted(example[what], names)}" for what in ("unmerged", "merged")]
    return _card(picture(example, "; ".join(said), boxes), said, example)


def _counted(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    called = [_name(one["class"], names) for one in found]
    return ", ".join(f"{called.count(name)} {name}" for name in dict.fromkeys(called)) or "nothing"


def _card(drawn: str, lines: Sequence[str], example: Mapping[str, Any]) -> Html:
    text = "<br>".join(as_html(line) for line in (*lines, f"disagreement {float(example['disagreement']):.2f}"))
    return Html(f'<div class="card">{drawn}<p>{text}</p></div>')


def picture(example: Mapping[str, Any], label: str, boxes: str) -> str:
    """The image with boxes over it; raises ValueError if it is no JPEG in base64."""
    encoded, (width, height) = example["image"], _size(example)
    try:
        content = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
    if len(encoded) > MAX_IMAGE or content[:2] != b"\xff\xd8":
        raise ValueError("not a small JPEG")
    image = f'<image href="data:image/jpeg;base64,{encoded}" width="{width}" height="{height}"/>'
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{as_html(label)}">{image}{boxes}</svg>'


def label_box(found: Mapping[str, Any], names: Sequence[str], example: Mapping[str, Any]) -> str:
    """A labelled box over an image; found: its box, relative to the image, and its class."""
    return _box(found, "labelled", _name(found["class"], names), _size(example))


def _size(example: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height in pixels."""
    return max(1, int(example["width"])), max(1, int(example["height"]))


def _box(found: Mapping[str, Any], what: str, said: str, size: tuple[int, int]) -> str:
    x1, y1, x2, y2 = (float(value) * size[i % 2] for i, value in enumerate(found["box"]))
    dashes = ' stroke-dasharray="3 2"' if what == "unmerged" else ""
    colour = "#ffd60a" if what == "unmerged" else "#00e5ff"
    place = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"'
    return f'<rect {place} fill="none" stroke="{colour}" stroke-width="1"{dashes}><title>{as_html(said)}</title></rect>'


def _name(class_id: Any, names: Sequence[str]) -> str:
    number = int(class_id)
    return names[number] if 0 <= number < len(names) else f"class {number}"
