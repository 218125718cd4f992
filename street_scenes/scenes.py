"""Street scenes as a fixed camera sees them: drawing only, nothing of models or files.

`draw_scene` gives one moment in front of a camera, with the boxes of what can be seen; `frame` and `crop` are what is
stored of it, as JPEG. The same generator gives the same picture.
"""

import functools
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from street_scenes.camera import (
    CANVAS,
    CROSSING,
    LAMP_FIRST,
    LAMP_STEP,
    Camera,
    axes,
    empty_street,
    eye,
    hazed,
    light_on,
    project,
)
from street_scenes.objects import BUILD, KINDS, Face, Limb, Part, street_lamp, tree

MIN_SIDES = (12, 24)  # canvas pixels, shorter and longer side: what is smaller is not labelled
EMPTY = 0.08  # share of scenes without traffic
MIN_VISIBLE = 0.35  # share of an object that must not be hidden for it to be labelled


class Thing(NamedTuple):
    """An object in a scene: its box on the canvas (left, top, right, bottom) covers what can be seen of it."""

    kind: str
    box: tuple[float, float, float, float]


class Scene(NamedTuple):
    image: Image.Image
    things: list[Thing]


class _Placed(NamedTuple):
    """An object at its place: parts in world coordinates. kind None: street furniture, which only hides things."""

    kind: str | None
    parts: list[Part]
    spot: np.ndarray


class _Stroke(NamedTuple):
    """One movement of the pen in canvas pixels: a polygon, or a line with round ends where there is a reach."""

    corners: list[tuple[float, float]]
    reach: float
    ink: tuple[int, int, int]
    lamp: float  # radius of a lamp that shines at the camera, else 0


def draw_scene(camera: Camera, rng: np.random.Generator) -> Scene:
    """One moment in front of the camera: the canvas and what can be seen on it. About one in twelve shows nobody."""
    street, furniture = _stage(camera)
    traffic = _traffic(camera, rng) if rng.random() > EMPTY else []
    image = _shade_ground(camera, street, traffic)
    layers = [*furniture, *((one, _strokes(camera, one.parts)) for one in traffic)]
    layers.sort(key=lambda layer: -(axes(camera)[2] @ (layer[0].spot - eye(camera))))
    image, owners, counts = _draw(camera, image, [strokes for _, strokes in layers])
    gain = rng.uniform(0.75, 1.12) * rng.uniform(0.95, 1.05, 3)  # clouds, exposure, white balance
    image = Image.fromarray(np.clip(np.asarray(image) * gain, 0, 255).astype(np.uint8))
    return Scene(image, _seen([one for one, _ in layers], owners, counts))


def _draw(camera: Camera, image: Image.Image, layers: list[list[_Stroke]]) -> tuple[Image.Image, np.ndarray, list[int]]:
    """The layers on the image, back to front; which layer (from 1) each pixel shows; pixels of each if none hid it."""
    owners = Image.new("L", image.size)
    pen, owner_pen, counts, lamps = ImageDraw.Draw(image), ImageDraw.Draw(owners), [], []
    for number, strokes in enumerate(layers, start=1):
        for stroke in strokes:
            _apply(pen, stroke.corners, stroke.reach, stroke.ink)
            _apply(owner_pen, stroke.corners, stroke.reach, number)
            if stroke.lamp:
                lamps.append((number, stroke))
        counts.append(owners.histogram()[number])
    owner_map = np.asarray(owners)
    if camera.night:
        image = _glow(image, [lamp for number, lamp in lamps if _shows(owner_map, number, lamp)])
    return image, owner_map, counts


def _shows(owner_map: np.ndarray, number: int, lamp: _Stroke) -> bool:
    column, row = np.mean(lamp.corners, axis=0).astype(int)
    return 0 <= row < CANVAS and 0 <= column < CANVAS and owner_map[row, column] == number


def _seen(placed: list[_Placed], owners: np.ndarray, counts: list[int]) -> list[Thing]:
    things = []
    for number, (one, count) in enumerate(zip(placed, counts, strict=True), start=1):
        if one.kind is None:
            continue
        rows, columns = np.nonzero(owners == number)
        if len(rows) < max(1, MIN_VISIBLE * count):
            continue
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        shorter, longer = sorted((box[2] - box[0], box[3] - box[1]))
        if shorter >= MIN_SIDES[0] and longer >= MIN_SIDES[1]:
            things.append(Thing(one.kind, box))
    return things


def _traffic(camera: Camera, rng: np.random.Generator) -> list[_Placed]:
    """Objects that do not stand in one another, most of them in view."""
    placed: list[tuple[_Placed, float, float]] = []
    for _ in range(rng.integers(3, 10)):
        kind = str(rng.choice(KINDS, p=(0.26, 0.24, 0.32, 0.18)))
        parts = BUILD[kind](rng)
        length, width = {"car": (5.0, 2.1), "truck": (7.2, 2.5), "motorcycle": (2.4, 0.9), "person": (0.8, 0.8)}[kind]
        for _ in range(8):
            spot, heading = _spot(camera, kind, rng)
            free = all(
                abs(spot[0] - other.spot[0]) > (length + other_length) / 2
                or abs(spot[1] - other.spot[1]) > (width + other_width) / 2
                for other, other_length, other_width in placed
            )
            pixel, depth = project(camera, spot[None] + (0, 0, 0.8))
            if free and depth[0] > 5 and (np.abs(pixel - CANVAS / 2) < CANVAS * 0.47).all():
                placed.append((_place(kind, parts, spot, heading), length, width))
                break
    return [one for one, _, _ in placed]


def _spot(camera: Camera, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A place and a heading that suit the kind: lanes, parked at the kerb, pavements, the crossing."""
    along, side = rng.uniform(camera.first, camera.last), rng.choice((-1, 1))
    if kind == "person":
        if rng.random() < 0.35:  # crosses the road
            return np.array(
                [CROSSING + rng.uniform(-1.5, 1.5), rng.uniform(-1, 1) * camera.road, 0]
            ), side * math.pi / 2
        across = side * rng.uniform(camera.road + 0.5, min(camera.houses - 0.6, camera.road + 3))
        return np.array([along, across, 0]), rng.choice((0, math.pi)) + rng.normal(0, 0.4)
    lane = rng.uniform(0.3, 0.5) if rng.random() < 0.75 else 0.78  # parked
    across = side * (camera.road * lane + rng.normal(0, 0.25))
    return np.array([along, across, 0]), (0 if side < 0 else math.pi) + rng.normal(0, 0.06)


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
    turn = np.array([[math.cos(heading), math.sin(heading), 0], [-math.sin(heading), math.cos(heading), 0], [0, 0, 1]])

    def moved(shape: Face | Limb) -> Face | Limb:
        if isinstance(shape, Face):
            return shape._replace(points=shape.points @ turn + spot)
        return shape._replace(start=np.asarray(shape.start) @ turn + spot, end=np.asarray(shape.end) @ turn + spot)

    return _Placed(kind, [Part([moved(shape) for shape in part.shapes], part.layer) for part in parts], spot)


def _points(shape: Face | Limb) -> np.ndarray:
    return shape.points if isinstance(shape, Face) else np.stack([shape.start, shape.end])


@functools.cache
def _stage(camera: Camera) -> tuple[Image.Image, list[tuple[_Placed, list[_Stroke]]]]:
    """What is the same in all scenes of a camera: the street, the furniture and its shadows."""
    furniture = _furniture(camera)
    street = _shade_ground(camera, empty_street(camera), furniture)
    return street, [(one, _strokes(camera, one.parts)) for one in furniture]


def _shade_ground(camera: Camera, image: Image.Image, placed: list[_Placed]) -> Image.Image:
    """A copy of the image with the shadows of the objects on the ground."""
    shapes = [shape for one in placed for part in one.parts for shape in part.shapes]
    if not shapes:
        return image.copy()
    mask = Image.new("L", image.size)
    pen = ImageDraw.Draw(mask)
    points = np.concatenate([_points(shape) for shape in shapes])
    pixels, depth = project(camera, points - points[:, 2:] * np.array(camera.sun) / camera.sun[2])
    first = 0
    for shape in shapes:
        last = first + (len(shape.points) if isinstance(shape, Face) else 2)
        _apply(pen, _corners(pixels[first:last]), _reach(camera, shape, depth[first]), 130)
        first = last
    mask = mask.filter(ImageFilter.GaussianBlur(5 if camera.night else 2))
    dark = (np.asarray(image) * np.array(camera.sky_light) * 0.9).astype(np.uint8)
    return Image.composite(Image.fromarray(dark), image, mask)


def _strokes(camera: Camera, parts: list[Part]) -> list[_Stroke]:
    """The pen's movements for one object, back to front, without the faces that look away."""
    shapes, normals = [], []
    middles = {id(part): np.concatenate([_points(shape) for shape in part.shapes]).mean(0) for part in parts}
    for part in sorted(parts, key=lambda p: (p.layer, -np.linalg.norm(middles[id(p)] - eye(camera)))):
        shapes += part.shapes
        normals += [_normal(shape, middles[id(part)]) for shape in part.shapes]
    points, normals = [_points(shape) for shape in shapes], np.array(normals)
    ends = np.cumsum([len(corners) for corners in points])
    starts = ends - [len(corners) for corners in points]
    points = np.concatenate(points)
    pixels, depth = project(camera, points)
    shines = np.array([camera.night and isinstance(shape, Face) and shape.lamp for shape in shapes])
    light = np.where(shines[:, None], 1.0, light_on(camera, normals, points[starts]))
    inks = hazed(camera, np.array([shape.colour for shape in shapes]) * light, depth[starts])
    inks = np.clip(inks, 0, 255).astype(int).tolist()
    faces_us = (normals * (eye(camera) - points[starts])).sum(1) > 0
    strokes = []
    for number, (shape, start, end) in enumerate(zip(shapes, starts, ends, strict=True)):
        if depth[start:end].min() > 1 and (isinstance(shape, Limb) or faces_us[number]):
            lamp = 0.35 * camera.focal * CANVAS / depth[start] if shines[number] else 0.0
            reach = _reach(camera, shape, depth[start])
            strokes.append(_Stroke(_corners(pixels[start:end]), reach, tuple(inks[number]), lamp))
    return strokes


def _corners(pixels: np.ndarray) -> list[tuple[float, float]]:
    return [tuple(pixel) for pixel in pixels.tolist()]


def _reach(camera: Camera, shape: Face | Limb, depth: float) -> float:
    """Half the width of a limb in canvas pixels; 0 for a face."""
    return max(0.6, shape.radius * camera.focal * CANVAS / max(depth, 1.0)) if isinstance(shape, Limb) else 0.0


def _apply(pen: ImageDraw.ImageDraw, corners: list[tuple[float, float]], reach: float, ink: tuple | int) -> None:
    if not reach:
        pen.polygon(corners, fill=ink)
        return
    pen.line(corners, fill=ink, width=max(1, round(2 * reach)))
    for x, y in corners:
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=ink)


def _normal(shape: Face | Limb, middle: np.ndarray) -> np.ndarray:
    """The unit normal that points away from the middle of the part; for a limb, one that is lit from most sides."""
    if isinstance(shape, Limb):
        return np.array([0.0, -0.5, 0.75])
    points = shape.points
    (ax, ay, az), (bx, by, bz) = points[1] - points[0], points[2] - points[0]
    normal = np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])
    normal /= max(math.sqrt(normal @ normal), 1e-9)
    return -normal if normal @ (points.mean(0) - middle) < 0 else normal


def _glow(image: Image.Image, lamps: list[_Stroke]) -> Image.Image:
    """Light that spreads around lamps."""
    spread = Image.new("RGB", (CANVAS // 4, CANVAS // 4))
    pen = ImageDraw.Draw(spread)
    for lamp in lamps:
        (x, y), reach = np.mean(lamp.corners, axis=0) / 4, max(1.0, lamp.lamp / 4)
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=lamp.ink)
    return ImageChops.screen(image, spread.filter(ImageFilter.GaussianBlur(3)).resize(image.size))


def frame(scene: Scene, camera: Camera, size: int, rng: np.random.Generator) -> bytes:
    """The whole scene as a JPEG of size x size pixels."""
    return _record(scene.image.resize((size, size), Image.Resampling.BOX), camera, rng)


def crop(scene: Scene, thing: Thing, camera: Camera, size: int, rng: np.random.Generator) -> bytes:
    """One object and a little of what is around it, not quite in the middle, as a JPEG of size x size pixels."""
    left, top, right, bottom = thing.box
    side = min(max(right - left, bottom - top) * rng.uniform(1.0, 1.4), CANVAS)
    middle = np.array([left + right, top + bottom]) / 2 + side * rng.normal(0, 0.05, 2)
    x, y = np.clip(middle - side / 2, 0, CANVAS - side)
    box = (x, y, x + side, y + side)
    cut = scene.image.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return _record(cut, camera, rng)


def _record(image: Image.Image, camera: Camera, rng: np.random.Generator) -> bytes:
    """What the sensor makes of it: blur, noise, the loss of JPEG."""
    blurred = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.5, 1.6)))
    pixels = np.asarray(blurred, dtype=np.float64)
    grain = rng.normal(0, camera.noise, pixels.shape) * np.sqrt(0.3 + pixels / 255)
    file = io.BytesIO()
    noisy = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    noisy.save(file, "JPEG", quality=int(rng.integers(*camera.quality)))
    return file.getvalue()
