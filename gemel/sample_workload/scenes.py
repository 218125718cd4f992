"""Random street scenes of a camera, as images with boxes; this file knows nothing of models and files.

`draw_scene` draws one scene; `frame` and `crop` give the whole scene or one object of it as JPEG. All randomness comes
from the generator that is passed in.
"""

import functools
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from gemel.sample_workload.camera import (
    CANVAS,
    CROSSING,
    LAMP_FIRST,
    LAMP_STEP,
    Camera,
    axes,
    empty_street,
    eye,
    project,
)
from gemel.sample_workload.objects import BUILDERS, Face, Limb, Part, street_lamp, tree
from gemel.sample_workload.renderer import Stroke, brightened, render, shade_ground, strokes_of

MIN_SIDES = (24, 44)  # canvas pixels, shorter and longer side: smaller objects are not labelled
MIN_VISIBLE = 0.5  # share of an object that must be visible for it to be labelled
EMPTY = 0.08  # share of scenes without traffic
SHARES = {"car": 0.22, "motorcycle": 0.22, "person": 0.38, "truck": 0.18}
FOOTPRINTS = {"car": (5.0, 2.1), "motorcycle": (2.4, 0.9), "person": (0.8, 0.8), "truck": (7.2, 2.5)}  # along, across
ATTEMPTS = 8  # to find a free place for an object, else it is left out


class SceneObject(NamedTuple):
    """A labelled object of a scene: the box (left, top, right, bottom, in canvas pixels) of its visible part."""

    kind: str
    box: tuple[float, float, float, float]


class Scene(NamedTuple):
    """A drawn scene and its labelled objects."""

    camera: Camera
    image: Image.Image
    objects: list[SceneObject]


class _Placed(NamedTuple):
    """An object with its parts in world coordinates. kind None: street furniture, which hides objects only."""

    kind: str | None
    parts: list[Part]
    spot: np.ndarray


def draw_scene(camera: Camera, rng: np.random.Generator) -> Scene:
    """Draws one scene of the camera; a share of EMPTY has no traffic."""
    street, furniture = _background(camera)
    traffic = _traffic(camera, rng) if rng.random() > EMPTY else []
    image = shade_ground(camera, street, [one.parts for one in traffic])
    layers = [*furniture, *((one, strokes_of(camera, one.parts)) for one in traffic)]
    layers.sort(key=lambda layer: -(axes(camera)[2] @ (layer[0].spot - eye(camera))))
    image, owners, counts = render(camera, image, [strokes for _, strokes in layers])
    gain = rng.uniform(0.75, 1.12) * rng.uniform(0.95, 1.05, 3)  # random exposure and white balance
    return Scene(camera, brightened(image, gain), _visible_objects([one for one, _ in layers], owners, counts))


def frame(scene: Scene, size: int, rng: np.random.Generator) -> bytes:
    """The whole scene as a JPEG of size x size pixels."""
    return _as_jpeg(scene.image.resize((size, size), Image.Resampling.BOX), scene.camera, rng)


def crop(scene: Scene, item: SceneObject, size: int, rng: np.random.Generator) -> bytes:
    """One object with a margin, roughly centred, as a JPEG of size x size pixels."""
    left, top, right, bottom = item.box
    side = min(max(right - left, bottom - top) * rng.uniform(1.0, 1.25), CANVAS)
    middle = np.array([left + right, top + bottom]) / 2 + side * rng.normal(0, 0.05, 2)
    x, y = np.clip(middle - side / 2, 0, CANVAS - side)
    box = (x, y, x + side, y + side)
    cut = scene.image.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return _as_jpeg(cut, scene.camera, rng)


def _as_jpeg(image: Image.Image, camera: Camera, rng: np.random.Generator) -> bytes:
    """The image as the camera records it: with blur, noise and JPEG compression."""
    blurred = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.5, 1.6)))
    pixels = np.asarray(blurred, dtype=np.float64)
    grain = rng.normal(0, camera.noise, pixels.shape) * np.sqrt(0.3 + pixels / 255)
    file = io.BytesIO()
    noisy = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    noisy.save(file, "JPEG", quality=int(rng.integers(*camera.quality)))
    return file.getvalue()


def _visible_objects(placed: list[_Placed], owners: np.ndarray, counts: list[int]) -> list[SceneObject]:
    """The objects that are large and visible enough, with the boxes of their visible pixels."""
    objects = []
    for number, (one, count) in enumerate(zip(placed, counts, strict=True), start=1):
        if one.kind is None:
            continue
        visible = owners == number
        if np.count_nonzero(visible) < max(1, MIN_VISIBLE * count):
            continue
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        shorter, longer = sorted((box[2] - box[0], box[3] - box[1]))
        if shorter >= MIN_SIDES[0] and longer >= MIN_SIDES[1]:
            objects.append(SceneObject(one.kind, box))
    return objects


@functools.cache
def _background(camera: Camera) -> tuple[Image.Image, list[tuple[_Placed, list[Stroke]]]]:
    """The same for all scenes of a camera: the street with shadows of the furniture, and the furniture."""
    furniture = _furniture(camera)
    street = shade_ground(camera, empty_street(camera), [one.parts for one in furniture])
    return street, [(one, strokes_of(camera, one.parts)) for one in furniture]


def _traffic(camera: Camera, rng: np.random.Generator) -> list[_Placed]:
    """Random objects in view that do not overlap on the ground."""
    placed: list[_Placed] = []
    for _ in range(rng.integers(4, 11)):
        kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        parts = BUILDERS[kind](rng)
        for _ in range(ATTEMPTS):
            spot, heading = _spot(camera, kind, rng)
            if _in_view(camera, spot) and not any(_overlap(kind, spot, other) for other in placed):
                placed.append(_place(kind, parts, spot, heading))
                break
    return placed


def _in_view(camera: Camera, spot: np.ndarray) -> bool:
    """Whether an object at this place is in front of the camera and within the image."""
    pixel, depth = project(camera, spot[None] + (0, 0, 0.8))
    return bool(depth[0] > 5 and (np.abs(pixel - CANVAS / 2) < CANVAS * 0.47).all())


def _overlap(kind: str, spot: np.ndarray, other: _Placed) -> bool:
    """Whether the footprints of two objects overlap."""
    assert other.kind is not None, "traffic only"
    room = (np.array(FOOTPRINTS[kind]) + np.array(FOOTPRINTS[other.kind])) / 2
    return bool((np.abs(spot - other.spot)[:2] <= room).all())


def _spot(camera: Camera, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A random place and heading for the kind: in a lane, parked at the kerb, on the pavement, on the crossing."""
    along, side = rng.uniform(camera.first, camera.last), rng.choice((-1, 1))
    if kind != "person":
        lane = rng.uniform(0.3, 0.5) if rng.random() < 0.75 else 0.78  # parked
        across = side * (camera.road * lane + rng.normal(0, 0.25))
        return np.array([along, across, 0]), (0 if side < 0 else math.pi) + rng.normal(0, 0.06)
    if rng.random() < 0.35:  # crosses the road
        along, across = CROSSING + rng.uniform(-1.5, 1.5), rng.uniform(-1, 1) * camera.road
        return np.array([along, across, 0]), side * math.pi / 2
    across = side * rng.uniform(camera.road + 0.5, min(camera.houses - 0.6, camera.road + 3))
    return np.array([along, across, 0]), rng.choice((0, math.pi)) + rng.normal(0, 0.4)


def _furniture(camera: Camera) -> list[_Placed]:
    """Street lamps and trees along the kerbs."""
    placed = []
    for number, along in enumerate(np.arange(LAMP_FIRST - 2 * LAMP_STEP, camera.last + 20, LAMP_STEP / 2)):
        side = 1 if number // 2 % 2 else -1
        spot = np.array([along, side * (camera.road + 0.7), 0.0])
        parts = street_lamp(side) if number % 2 else tree(number)
        if project(camera, spot[None])[1][0] > 6:
            placed.append(_place(None, parts, spot, 0.0))
    return placed


def _place(kind: str | None, parts: list[Part], spot: np.ndarray, heading: float) -> _Placed:
    """Rotates an object by its heading (radians) and moves it to its place."""
    turn = np.array([[math.cos(heading), math.sin(heading), 0], [-math.sin(heading), math.cos(heading), 0], [0, 0, 1]])

    def moved(shape: Face | Limb) -> Face | Limb:
        if isinstance(shape, Face):
            return shape._replace(points=shape.points @ turn + spot)
        return shape._replace(start=np.asarray(shape.start) @ turn + spot, end=np.asarray(shape.end) @ turn + spot)

    return _Placed(kind, [Part([moved(shape) for shape in part.shapes], part.layer) for part in parts], spot)
