"""Frames: images of a folder, of a video, drawn at random, or any iterable; and how they become a model's input.

A source is a sequence of images, or an iterable that is read as its frames are asked for, in order. An image is what
the transform takes: a uint8 tensor [3, H, W] where it comes from a folder or a video.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from gemel.workload import CLASSIFICATION

SUFFIXES = (".jpg", ".jpeg", ".png")
KEPT = 64  # images and inputs that are kept for the tasks that take them later
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Any], Tensor]


class FolderFrames(Sequence):
    """The images below a folder, in the order of their names, decoded when they are asked for.

    Raises ValueError if there are none.
    """

    def __init__(self, folder: str | Path):
        self.files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ValueError(f"frames: got the folder {folder}; allowed: one with images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.files[index]) as image:
                return F.pil_to_tensor(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self.files[index]}: cannot be read: {error}") from None


class RandomFrames(Sequence):
    """A few images of random colours, for measuring without a camera."""

    def __init__(self, height: int = 256, width: int = 256, count: int = 8):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, height, width), generator=generator).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]


def video_frames(source: str) -> Iterator[Tensor]:
    """The frames of a video file, a device or a stream: whatever PyAV, that is FFmpeg, opens.

    Raises ValueError if PyAV is not installed, or cannot open the source.
    """
    try:
        import av
    except ImportError:
        raise ValueError(f"frames: {source} needs PyAV: pip install 'gemel-merging[edge]'") from None
    try:
        container = av.open(source)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"frames: got {source!r}, which PyAV cannot open: {error}") from None
    with container:
        for frame in container.decode(video=0):
            yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


def frames_from(source: str | None) -> Iterable:
    """The frames that --frames names: a folder, or what PyAV opens; random ones without it."""
    if source is None:
        return RandomFrames()
    return FolderFrames(source) if Path(source).is_dir() else video_frames(source)


def default_transform(kind: str, size: int | None) -> Transform:
    """uint8 [3, H, W] -> float32: in [0, 1] for a detector, normalised as torchvision's classifiers for the others.

    size: pixels a side to resize to; None keeps the size of the image.
    """
    steps: list[Callable] = [] if size is None else [v2.Resize([size, size])]
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if kind == CLASSIFICATION:
        steps.append(v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)))
    return v2.Compose(steps)


class Frames:
    """Hands out frame k of a source as the input of a task's model.

    source: a sequence, which is repeated, or an iterable. transforms: by task, image -> float tensor [3, H, W]. One
    transform that several tasks name is applied once a frame.
    """

    def __init__(self, source: Iterable, transforms: Mapping[str, Transform]):
        self.transforms = transforms
        self.sequence = source if isinstance(source, Sequence) else None
        self._iterator = iter(()) if isinstance(source, Sequence) else iter(source)
        self._read: dict[int, Any] = {}  # images of an iterable that a task may still take
        self._num_read = 0
        self._kept: OrderedDict[tuple, Any] = OrderedDict()  # what can be made again

    def input(self, task: str, k: int) -> Tensor:
        """The input of a task for frame k, which must have been read, if the source is an iterable."""
        transform = self.transforms[task]
        return self._remembered((id(transform), k), lambda: transform(self.image(k)))

    def forget(self, before: int) -> None:
        """Gives back the images of all frames before this one, which no task will take."""
        for k in [k for k in self._read if k < before]:
            del self._read[k]

    def read_until(self, count: int) -> int:
        """Reads an iterable until that many frames are there; how many frames there are: fewer if it ended."""
        if self.sequence is not None:
            return count
        while self._num_read < count:
            try:
                self._read[self._num_read] = next(self._iterator)
            except StopIteration:
                break
            self._num_read += 1
        return min(count, self._num_read)

    def image(self, k: int) -> Any:
        """Image k of the source, which must have been read, if it is an iterable."""
        if self.sequence is None:
            return self._read[k]
        images, index = self.sequence, k % len(self.sequence)
        return self._remembered((None, index), lambda: images[index])

    def _remembered(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            value = make()
            self._kept[key] = value
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]
