"""The two street cameras: their position, projection and light, and the image of the empty street.

World coordinates in metres: u along the road, v across it (left when looking along it), z up; the camera is at u = 0.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

CANVAS = 384  # pixels a side in which a scene is drawn; frames and crops are scaled from it
LAMP_FIRST, LAMP_STEP = 7.0, 14.0  # metres along the road: the first street lamp, and between lamps
CROSSING, HOUSE_WIDTH = 16.0, 11.0  # metres: position along the road, width of a house front


class Camera(NamedTuple):
    """Position and direction of a camera, the street and its light, and the defects of the sensor. Metres, degrees."""

    across: float  # from the middle of the road
    height: float
    yaw: float  # between the road and the line of sight
    pitch: float  # below the horizon
    focal: float  # in widths of the image
    road: float  # half the width of the road
    houses: float  # from the middle of the road to the house fronts
    first: float  # along the road, to `last`: range in which objects stand
    last: float
    sun: tuple[float, float, float]  # direction towards the sun or, by night, the street lamps
    sun_light: tuple[float, float, float]  # red, green, blue
    sky_light: tuple[float, float, float]
    sky: tuple[tuple[int, int, int], tuple[int, int, int]]  # colours at the horizon and above it
    haze: float  # distance at which a third (1 / e) of the contrast is left
    night: bool
    noise: float  # standard deviation of the sensor's noise, of 255
    blur: float  # pixels
    quality: tuple[int, int]  # of JPEG compression, range


CAMERAS = {
    "main_2nd": Camera(  # by day, high above the pavement, looking along the road
        across=-4.0,
        height=6.5,
        yaw=7.0,
        pitch=17.0,
        focal=2.0,
        road=6.6,
        houses=12.0,
        first=10.5,
        last=21.0,
        sun=(-0.35, -0.55, 0.75),
        sun_light=(0.72, 0.68, 0.58),
        sky_light=(0.46, 0.49, 0.54),
        sky=((214, 222, 228), (120, 164, 214)),
        haze=120.0,
        night=False,
        noise=5.0,
        blur=0.5,
        quality=(45, 85),
    ),
    "elm_1st": Camera(  # at nightfall, low, looking across the road
        across=-15.0,
        height=4.2,
        yaw=62.0,
        pitch=11.0,
        focal=1.6,
        road=4.6,
        houses=8.5,
        first=-3.0,
        last=18.0,
        sun=(0.25, -0.3, 0.9),
        sun_light=(0.50, 0.40, 0.26),
        sky_light=(0.22, 0.25, 0.34),
        sky=((118, 84, 92), (26, 32, 62)),
        haze=140.0,
        night=True,
        noise=6.0,
        blur=0.55,
        quality=(35, 75),
    ),
}


@functools.cache
def axes(camera: Camera) -> np.ndarray:
    """[3, 3]: unit vectors right, up and forward of the camera, in world coordinates."""
    yaw, pitch = math.radians(camera.yaw), math.radians(camera.pitch)
    forward = np.array([math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), -math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    return np.stack([right, np.cross(right, forward), forward])


def eye(camera: Camera) -> np.ndarray:
    """[3]: the position of the camera in world coordinates."""
    return np.array([0.0, camera.across, camera.height])


def project(camera: Camera, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(canvas pixels [n, 2], depth [n] in metres) of world points [n, 3]."""
    right, up, depth = axes(camera) @ (points - eye(camera)).T
    scale = camera.focal * CANVAS / np.maximum(depth, 0.5)
    return np.stack([CANVAS / 2 + right * scale, CANVAS / 2 - up * scale], 1), depth


def light_on(camera: Camera, normal: np.ndarray, spot: np.ndarray) -> np.ndarray:
    """Red, green and blue [..., 3] of the light on surfaces, from their normals and positions, both [..., 3]."""
    sun = np.array(camera.sun) / np.linalg.norm(camera.sun)
    direct = np.clip(normal @ sun, 0, None)[..., None] * np.array(camera.sun_light)
    if camera.night:  # brighter below each street lamp
        along = (spot[..., 0] - LAMP_FIRST + LAMP_STEP / 2) % LAMP_STEP - LAMP_STEP / 2
        across = np.abs(spot[..., 1]) - camera.road
        direct = direct * (0.35 + 1.5 * np.exp(-(along**2 + across**2) / 18.0))[..., None]
    return np.array(camera.sky_light) + direct


def hazed(camera: Camera, colour: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Colours [..., 3] as seen from distances [...] in metres, mixed with that of the horizon."""
    clear = np.exp(-np.clip(distance, 0, None) / camera.haze)[..., None]
    return colour * clear + np.array(camera.sky[0]) * (1 - clear)


@functools.cache
def empty_street(camera: Camera) -> Image.Image:
    """The street without objects: one ray per pixel of the canvas, to the ground, a house front or the sky."""
    rng = np.random.default_rng(len(camera.sky) + int(camera.yaw))
    axis = (np.arange(CANVAS) + 0.5) / CANVAS - 0.5
    right, down = np.meshgrid(axis / camera.focal, axis / camera.focal)
    rays = np.stack([right, -down, np.ones_like(right)], -1) @ axes(camera)
    image = _sky(camera, rays)
    nearest = np.full(right.shape, 400.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        surfaces = [(-camera.height / rays[..., 2], _ground, (0.0, 0.0, 1.0))]
        for side in (1, -1):
            if side * camera.across < camera.houses:
                to_wall = (side * camera.houses - camera.across) / rays[..., 1]
                surfaces.append((to_wall, _houses, (0.0, -float(side), 0.0)))
    for reach, paint, normal in surfaces:
        spot = eye(camera) + rays * np.nan_to_num(reach, nan=0, posinf=0, neginf=0)[..., None]
        colour, solid = paint(camera, spot, rng)
        seen = (reach > 0) & (reach < nearest) & solid
        lit = colour * (light_on(camera, np.array(normal), spot) if paint is _ground else 1)
        image[seen] = hazed(camera, lit, reach)[seen]
        nearest[seen] = reach[seen]
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def _sky(camera: Camera, rays: np.ndarray) -> np.ndarray:
    """A gradient from the colour of the horizon upwards."""
    height = np.clip(rays[..., 2:] * 2.5, 0, 1)
    return np.array(camera.sky[0]) * (1 - height) + np.array(camera.sky[1]) * height


def _ground(camera: Camera, spot: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(colours, mask): asphalt with markings and stains, kerbs, paving slabs."""
    u, v = spot[..., 0], spot[..., 1]
    grain = rng.normal(0, 5, u.shape) + 7 * np.sin(u * 0.9 + 2 * np.sin(v * 0.7)) * np.sin(v * 1.3 + np.sin(u * 0.5))
    grey = np.where(np.abs(v) < camera.road, 92.0, 150.0)
    grey = np.where((np.abs(v) > camera.road) & (((u % 1.6) < 0.06) | ((v % 1.6) < 0.06)), 118.0, grey)
    grey = np.where(np.abs(np.abs(v) - camera.road) < 0.14, 186.0, grey)
    dashes = (np.abs(v) < 0.1) & (u % 6 < 3)
    crossing = (np.abs(u - CROSSING) < 1.6) & (v % 1.1 < 0.55) & (np.abs(v) < camera.road - 0.3)
    edge = np.abs(np.abs(v) - camera.road + 0.5) < 0.07
    grey = np.where(dashes | crossing | edge, 214.0, grey) + grain
    return grey[..., None] * np.array([1.0, 0.99, 0.96]), np.ones(u.shape, bool)


def _houses(camera: Camera, spot: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(colours, mask): house fronts of several colours and heights with windows, by night partly lit."""
    u, z = spot[..., 0], spot[..., 2]
    house = np.clip(np.floor(u / HOUSE_WIDTH), -20, 60).astype(int) + 20
    colours = rng.integers(70, 190, (81, 1)) + rng.integers(-22, 22, (81, 3))
    top = rng.uniform(7, 17, 81)[house]
    front = colours[house] * (0.62 if not camera.night else 0.3) * (1 + 0.04 * np.sin(z * 12))[..., None]
    column, storey = np.floor(u / 2.4).astype(int), np.floor(z / 3.1).astype(int)
    window = (u % 2.4 > 0.6) & (u % 2.4 < 1.8) & (z % 3.1 > 0.9) & (z % 3.1 < 2.5)
    window = np.where(storey == 0, (u % 4.8 > 0.5) & (u % 4.8 < 4.2) & (z < 2.4) & (z > 0.5), window)
    lit = rng.random((97, 11)) < (0.4 if camera.night else 0.0)
    glass = np.where(lit[column % 97, storey % 11][..., None], (214, 172, 104), (44, 54, 66))
    sill = (z % 3.1 > 0.75) & (z % 3.1 < 0.9)
    front = np.where(window[..., None], glass, np.where(sill[..., None], front * 1.25, front))
    return front, (z < top) & (z > 0)
