"""What the transforms get of images that are no plain 8-bit RGB: turned by EXIF, cut from 16 bits, without a palette.

Counted over an evenly spread sample, so that the user can see where what was trained on may have been another image.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gemel.datasets.records import ORIENTATION

MAX_HEADERS = 2000  # images of a split whose headers are read
FEW_LEVELS = 64  # of 256: fewer are worth a word
MODES = {
    "I": "16-bit or 32-bit grey was scaled to 8 bits, 65535 to 255",
    "F": "float grey was clipped to whole numbers from 0 to 255",
    "P": "colours of a palette were replaced by RGB",
    "RGBA": "the alpha channel was dropped",
    "LA": "the alpha channel was dropped",
    "CMYK": "CMYK was converted to RGB",
}


def image_notes(images: Sequence[Path], turned: bool) -> Counter:
    """What is to be said of the images of one split, with how many it concerns; turned: whether EXIF is followed."""
    sample = images[:: -(-len(images) // MAX_HEADERS) or 1]
    of = "" if len(sample) == len(images) else f", of {len(sample)} of {len(images)} images looked at"
    found: Counter[str] = Counter()
    few: list[tuple[int, int, int]] = []  # levels, lowest and highest value of images of more than 8 bits
    for path in sample:
        try:
            with Image.open(path) as image:
                if image.getexif().get(ORIENTATION, 1) in range(2, 9):
                    done = "was turned as it says" if turned else "was not turned"
                    found[f"an image with an EXIF orientation {done} (exif_orientation){of}"] += 1
                mode = "I" if image.mode.startswith("I") else image.mode
                if mode in MODES:
                    found[f"{MODES[mode]}{of}"] += 1
                if mode == "I" and len(few) < 8:
                    few.append(_levels(image))
        except Exception:  # Pillow raises many types on broken files; the check of images reports them
            continue
    if few and max(levels for levels, _, _ in few) < FEW_LEVELS:
        levels, low, high = max(few)
        found[
            f"of the 256 levels of 8 bits an image has {levels} or fewer, as its 16-bit values lie between {low} and "
            f"{high}; a model that was trained on other values sees nothing{of}"
        ] += len(few)
    return found


def _levels(image: Image.Image) -> tuple[int, int, int]:
    """(levels that are left in 8 bits, lowest, highest value) of an image with more bits."""
    values = np.asarray(image)
    return len(np.unique((values.astype(np.float32) / 257).round())), int(values.min()), int(values.max())
