"""Renders solid objects on a canvas, with their light, shadows and the glow of lamps."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from gemel.sample_workload.camera import CANVAS, Camera, eye, hazed, light_on, project
from gemel.sample_workload.objects import Face, Limb, Part

SHADOW = 130  # darkness of a shadow, of 255
LIMB_NORMAL = (0.0, -0.5, 0.75)  # one normal for round limbs, which are lit from most sides


class Stroke(NamedTuple):
    """A filled polygon in canvas pixels, or a line with round ends if half_width is not 0."""

    corners: list[tuple[float, float]]
    half_width: float
    colour: tuple[int, int, int]
    lamp: float  # radius of the glow of a lamp that is on, else 0


def render(
    camera: Camera, image: Image.Image, layers: Sequence[Sequence[Stroke]]
) -> tuple[Image.Image, np.ndarray, list[int]]:
    """Paints the layers on the image, from back to front.

    Returns the image, the number of the visible layer (from 1; 0: none) of each pixel, and the number of pixels of each
    layer before others were painted over it.
    """
    owners = Image.new("L", image.size)
    pen, owner_pen, counts, lamps = ImageDraw.Draw(image), ImageDraw.Draw(owners), [], []
    for number, strokes in enumerate(layers, start=1):
        for stroke in strokes:
            _paint(pen, stroke.corners, stroke.half_width, stroke.colour)
            _paint(owner_pen, stroke.corners, stroke.half_width, number)
            if stroke.lamp:
                lamps.append((number, stroke))
        counts.append(owners.histogram()[number])
    owner_map = np.asarray(owners)
    if camera.night:
        image = _glow(image, [lamp for number, lamp in lamps if _shows(owner_map, number, lamp)])
    return image, owner_map, counts


def shade_ground(camera: Camera, image: Image.Image, objects: list[list[Part]]) -> Image.Image:
    """A copy of the image with the shadows of the objects on the ground."""
    shapes = [shape for parts in objects for part in parts for shape in part.shapes]
    if not shapes:
        return image.copy()
    mask = Image.new("L", image.size)
    pen = ImageDraw.Draw(mask)
    points = np.concatenate([_points(shape) for shape in shapes])
    pixels, depth = project(camera, points - points[:, 2:] * np.array(camera.sun) / camera.sun[2])
    first = 0
    for shape in shapes:
        last = first + (len(shape.points) if isinstance(shape, Face) else 2)
        _paint(pen, _corners(pixels[first:last]), _half_width(camera, shape, depth[first]), SHADOW)
        first = last
    mask = mask.filter(ImageFilter.GaussianBlur(5 if camera.night else 2))
    return Image.composite(brightened(image, 0.9 * np.array(camera.sky_light)), image, mask)


def brightened(image: Image.Image, gain: np.ndarray) -> Image.Image:
    """The image with its channels times gain [3]."""
    return image.point(np.clip(np.arange(256) * gain[:, None], 0, 255).astype(int).ravel().tolist())


def strokes_of(camera: Camera, parts: list[Part]) -> list[Stroke]:
    """The strokes of one object in world coordinates, from back to front, without faces turned away from the camera."""
    shapes, normals = _back_to_front(camera, parts)
    corners = [_points(shape) for shape in shapes]
    ends = np.cumsum([len(points) for points in corners])
    starts = ends - [len(points) for points in corners]
    points = np.concatenate(corners)
    pixels, depth = project(camera, points)
    shines = np.array([camera.night and isinstance(shape, Face) and shape.lamp for shape in shapes])
    light = np.where(shines[:, None], 1.0, light_on(camera, normals, points[starts]))
    colours = hazed(camera, np.array([shape.colour for shape in shapes]) * light, depth[starts])
    colours = np.clip(colours, 0, 255).astype(int).tolist()
    faces_us = (normals * (eye(camera) - points[starts])).sum(1) > 0
    strokes = []
    for number, (shape, start, end) in enumerate(zip(shapes, starts, ends, strict=True)):
        if depth[start:end].min() > 1 and (isinstance(shape, Limb) or faces_us[number]):
            lamp = 0.35 * camera.focal * CANVAS / depth[start] if shines[number] else 0.0
            half_width = _half_width(camera, shape, depth[start])
            strokes.append(Stroke(_corners(pixels[start:end]), half_width, tuple(colours[number]), lamp))
    return strokes


def _back_to_front(camera: Camera, parts: list[Part]) -> tuple[list[Face | Limb], np.ndarray]:
    """The shapes of an object in drawing order, and their normals [n, 3]."""
    middles = [np.concatenate([_points(shape) for shape in part.shapes]).mean(0) for part in parts]
    order = [(part.layer, -np.linalg.norm(middle - eye(camera))) for part, middle in zip(parts, middles, strict=True)]
    shapes: list[Face | Limb] = []
    normals: list[np.ndarray] = []
    for index in sorted(range(len(parts)), key=order.__getitem__):
        shapes += parts[index].shapes
        normals += [_normal(shape, middles[index]) for shape in parts[index].shapes]
    return shapes, np.array(normals)


def _normal(shape: Face | Limb, middle: np.ndarray) -> np.ndarray:
    """The unit normal that points away from the centre of the part."""
    if isinstance(shape, Limb):
        return np.array(LIMB_NORMAL)
    points = shape.points
    (ax, ay, az), (bx, by, bz) = points[1] - points[0], points[2] - points[0]
    normal = np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])
    normal /= max(math.sqrt(normal @ normal), 1e-9)
    return -normal if normal @ (points.mean(0) - middle) < 0 else normal


def _points(shape: Face | Limb) -> np.ndarray:
    """The corners of a face, or the ends of a limb."""
    return shape.points if isinstance(shape, Face) else np.stack([shape.start, shape.end])


def _corners(pixels: np.ndarray) -> list[tuple[float, float]]:
    return [(x, y) for x, y in pixels.tolist()]


def _half_width(camera: Camera, shape: Face | Limb, depth: float) -> float:
    """Half the width of a limb in canvas pixels; 0 for a face."""
    return max(0.6, shape.radius * camera.focal * CANVAS / max(depth, 1.0)) if isinstance(shape, Limb) else 0.0


def _paint(
    pen: ImageDraw.ImageDraw, corners: list[tuple[float, float]], half_width: float, colour: tuple | int
) -> None:
    """Paints one stroke."""
    if not half_width:
        pen.polygon(corners, fill=colour)
        return
    pen.line(corners, fill=colour, width=max(1, round(2 * half_width)))
    for x, y in corners:
        pen.ellipse((x - half_width, y - half_width, x + half_width, y + half_width), fill=colour)


def _shows(owner_map: np.ndarray, number: int, lamp: Stroke) -> bool:
    """Whether the centre of a lamp is visible."""
    column, row = np.mean(lamp.corners, axis=0).astype(int)
    return 0 <= row < CANVAS and 0 <= column < CANVAS and owner_map[row, column] == number


def _glow(image: Image.Image, lamps: list[Stroke]) -> Image.Image:
    """Adds a glow around the lamps."""
    spread = Image.new("RGB", (CANVAS // 4, CANVAS // 4))
    pen = ImageDraw.Draw(spread)
    for lamp in lamps:
        (x, y), half_width = np.mean(lamp.corners, axis=0) / 4, max(1.0, lamp.lamp / 4)
        pen.ellipse((x - half_width, y - half_width, x + half_width, y + half_width), fill=lamp.colour)
    return ImageChops.screen(image, spread.filter(ImageFilter.GaussianBlur(3)).resize(image.size))
