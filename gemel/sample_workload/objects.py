"""Random solid objects of a street, in metres: cars, trucks, motorcycles, people, street lamps and trees.

Object coordinates: x forward, y left, z up, the origin on the ground below the centre. An object consists of parts, a
part of faces and round limbs. Sizes, shapes and colours are random.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Colour = tuple[int, int, int]
Point = tuple[float, float, float] | np.ndarray  # x, y, z in metres
TYRE, GLASS, STEEL, SKIN = (24, 24, 27), (52, 66, 80), (125, 128, 132), (201, 152, 122)
PAINTS = [(188, 38, 36), (36, 70, 150), (226, 226, 222), (58, 60, 64), (150, 154, 158), (20, 21, 24), (214, 172, 52)]
PAINTS += [(44, 104, 74), (112, 60, 40), (120, 150, 182)]
HEADLIGHT, TAIL_LIGHT = (255, 244, 214), (205, 24, 20)
LEAVES = [(62, 92, 44), (80, 110, 54), (46, 74, 38)]
CLOTHES = [*PAINTS, (92, 70, 120), (210, 120, 150), (70, 84, 60), (40, 46, 70)]


class Face(NamedTuple):
    """A flat polygon. points: [n, 3] in metres; lamp: whether it shines by night."""

    points: np.ndarray
    colour: Colour
    lamp: bool = False


class Limb(NamedTuple):
    """A cylinder with round ends. Metres."""

    start: Point
    end: Point
    radius: float
    colour: Colour


class Part(NamedTuple):
    """A convex part of an object: shapes in drawing order; parts of a higher layer are drawn over lower ones."""

    shapes: Sequence[Face | Limb]
    layer: int = 0


def _prism(profile: list, width: float, top_width: float, colour: Colour, colours: dict | None = None) -> list[Face]:
    """A body with the side view `profile`: points (x, z) from the rear bottom over the top to the front bottom.

    width, top_width: at the bottom and at the top. colours: index of an edge of the profile -> colour of its face.
    """
    low, high = min(z for _, z in profile), max(z for _, z in profile)
    half = [(width + (top_width - width) * (z - low) / (high - low)) / 2 for _, z in profile]
    left = np.array([(x, y, z) for (x, z), y in zip(profile, half, strict=True)])
    right = left * (1, -1, 1)
    strips = [
        Face(np.stack([left[i], left[i + 1], right[i + 1], right[i]]), (colours or {}).get(i, colour))
        for i in range(len(profile) - 1)
    ]
    return [Face(left, colour), Face(right, colour), *strips]


def _inset(face: Face, colour: Colour, share: float) -> Face:
    """A window: the same face, scaled around its centre."""
    middle = face.points.mean(0)
    return Face(middle + (face.points - middle) * share, colour)


def _on_sides(points: np.ndarray, half_width: float, colour: Colour) -> list[Face]:
    """The polygon of points [n, 2] (x, z) on both sides of a body."""
    return [Face(np.insert(points, 1, side * half_width, axis=1), colour) for side in (1.01, -1.01)]


def _wheel(x: float, radius: float, half_width: float) -> list[Face]:
    """A wheel with a rim on both sides."""
    angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    rim = np.stack([np.cos(angles), np.sin(angles)], 1)
    middle = np.array([x, radius])
    tyre = _on_sides(middle + rim * radius, half_width, TYRE)
    return tyre + _on_sides(middle + rim * radius * 0.55, half_width * 1.005, STEEL)


def _lamps(x: float, z: float, y: float, size: float, colour: Colour) -> list[Face]:
    """A pair of lamps at the front or the rear."""
    corners = np.array([(0, -1, -0.6), (0, 1, -0.6), (0, 1, 0.6), (0, -1, 0.6)]) * size
    return [Face(corners + (x * 1.005, side * y, z), colour, lamp=True) for side in (1, -1)]


def _car(rng: np.random.Generator) -> list[Part]:
    paint = _vary(rng, PAINTS)
    half, width, belt = rng.uniform(1.9, 2.35), rng.uniform(1.65, 1.9), rng.uniform(0.85, 1.05)
    roof = belt + rng.uniform(0.42, 0.75)
    rear = -half * rng.uniform(0.62, 0.97)  # from saloon to estate car
    body = [(-half, 0.3), (-half, belt - 0.1), (-half + 0.15, belt), (half * 0.55, belt)]
    body += [(half - 0.1, belt - 0.16), (half, belt - 0.35), (half, 0.3)]
    cabin = [(rear, belt), (rear + 0.35, roof), (half * 0.1, roof), (half * 0.55, belt)]
    lower = _prism(body, width, width * 0.97, paint)
    for x in (-half * 0.64, half * 0.66):
        lower += _wheel(x, 0.33, width / 2)
    lower += _lamps(half, belt - 0.42, width * 0.36, 0.17, HEADLIGHT)
    lower += _lamps(-half, belt - 0.25, width * 0.38, 0.15, TAIL_LIGHT)
    upper = _prism(cabin, width * 0.94, width * 0.74, paint, {0: GLASS, 2: GLASS})
    upper += [_inset(face, GLASS, 0.8) for face in upper[:2]]
    return [Part(lower), Part(upper, 1)]


def _truck(rng: np.random.Generator) -> list[Part]:
    paint, load = _vary(rng, PAINTS), _vary(rng, [*PAINTS, (222, 220, 212), (222, 220, 212), (160, 168, 172)])
    half, width = rng.uniform(2.4, 3.6), rng.uniform(1.85, 2.3)
    cab_top = rng.uniform(1.8, 2.6)
    cab_end = half - rng.uniform(1.5, 1.9)
    nose = half - rng.choice([0.1, 0.25, 0.8])
    cab = [(cab_end, 0.45), (cab_end, cab_top), (nose - 0.35, cab_top), (nose, 1.25), (half, 1.1), (half, 0.4)]
    front = _prism(cab, width * 0.96, width * 0.9, paint, {2: GLASS})
    window = [(cab_end + 0.4, 1.3), (cab_end + 0.4, cab_top - 0.15), (nose - 0.4, cab_top - 0.15), (nose - 0.1, 1.3)]
    front += _on_sides(np.array(window), width * 0.47, GLASS)
    front += _lamps(half, 0.7, width * 0.36, 0.17, HEADLIGHT) + _wheel(half - 0.85, 0.42, width / 2)
    floor, top = 0.75, (rng.uniform(1.1, 1.35) if rng.random() < 0.25 else rng.uniform(2.0, 3.3))  # flat bed or box
    box = [(-half, floor), (-half, top), (cab_end - 0.12, top), (cab_end - 0.12, floor)]
    cargo = _prism(box, width, width, load)
    cargo += _on_sides(np.array([(-half, 0.45), (-half, floor), (cab_end, floor), (cab_end, 0.45)]), width * 0.46, TYRE)
    cargo += _lamps(-half, floor - 0.12, width * 0.4, 0.14, TAIL_LIGHT)
    for x in (-half * 0.55, -half * 0.55 + 0.9)[: rng.integers(1, 3)]:
        cargo += _wheel(x, 0.44, width / 2)
    return [Part(front, 1), Part(cargo, 1)]


def _body(rng: np.random.Generator, joints: Mapping[str, Point], size: float = 1.0) -> list[Part]:
    """A person with the given joints: hip, shoulder, head, and left_ and right_ knee, foot, elbow and hand."""
    top, trousers, skin = _vary(rng, CLOTHES), _vary(rng, CLOTHES), _vary(rng, [SKIN, (140, 96, 70), (230, 190, 165)])
    hair = _vary(rng, [(40, 30, 24), (90, 62, 36), (150, 120, 70), (30, 30, 34)])
    at = {name: np.array(point) * size for name, point in joints.items()}
    limbs = []
    for side, y in (("left", 0.11), ("right", -0.11)):
        hip, shoulder = at["hip"] + (0, y, 0), at["shoulder"] + (0, y * 1.75, 0)
        limbs += [
            Limb(hip, at[f"{side}_knee"], 0.085, trousers),
            Limb(at[f"{side}_knee"], at[f"{side}_foot"], 0.065, trousers),
            Limb(at[f"{side}_foot"], at[f"{side}_foot"] + (0.12, 0, 0), 0.06, TYRE),
            Limb(shoulder, at[f"{side}_elbow"], 0.06, top),
            Limb(at[f"{side}_elbow"], at[f"{side}_hand"], 0.05, skin if rng.random() < 0.3 else top),
            Limb(hip + (0, -y * 0.3, 0.05), shoulder - (0, y * 0.5, 0.06), 0.14, top),
        ]
    head = [Limb(at["shoulder"], at["head"], 0.06, skin), Limb(at["head"], at["head"] + (0.02, 0, 0.03), 0.115, skin)]
    head += [Limb(at["head"] + (-0.04, 0, 0.06), at["head"] + (-0.02, 0, 0.08), 0.105, hair)]
    return [Part([limb]) for limb in limbs] + [Part(head)]


def _person(rng: np.random.Generator) -> list[Part]:
    swing = rng.uniform(-0.34, 0.34)
    joints: dict[str, Point] = {"hip": (0, 0, 0.9), "shoulder": (0.03, 0, 1.42), "head": (0.05, 0, 1.62)}
    for side, sign, y in (("left", 1, 0.12), ("right", -1, -0.12)):
        step, arm = sign * swing, -sign * swing * rng.uniform(0.5, 1.1)
        joints[f"{side}_knee"] = (step * 0.65 + 0.05, y, 0.49)
        joints[f"{side}_foot"] = (step * 1.15 - 0.03, y, 0.07 + max(0.0, -step) * 0.2)
        joints[f"{side}_elbow"] = (arm * 0.6 - 0.04, y * 2.1, 1.12)
        joints[f"{side}_hand"] = (arm * 1.2 + 0.06, y * 2.0, 0.88)
    parts = _body(rng, joints, rng.choice([rng.uniform(0.92, 1.1), rng.uniform(0.68, 0.8)], p=[0.85, 0.15]))
    if rng.random() < 0.3:  # a bag
        parts.append(Part([Limb((-0.05, 0.3, 0.55), (0.1, 0.3, 0.55), 0.14, _vary(rng, CLOTHES))]))
    return parts


def _motorcycle(rng: np.random.Generator) -> list[Part]:
    paint, lean = _vary(rng, PAINTS), rng.uniform(-0.1, 0.25)
    wheels = [Part([*_wheel(x, 0.33, 0.08)]) for x in (-0.68, 0.7)]
    frame = [(-0.75, 0.62), (-0.6, 0.86), (0.05, 0.8), (0.4, 0.98), (0.5, 0.6), (0.1, 0.35), (-0.3, 0.38)]
    shapes = _prism(frame, 0.36, 0.28, paint) + _lamps(-0.76, 0.7, 0.0, 0.1, TAIL_LIGHT)[:1]
    handlebar = Limb((0.42, 0.3, 1.05), (0.42, -0.3, 1.05), 0.04, TYRE)
    fork = Part([Limb((0.7, 0, 0.32), (0.45, 0, 1.0), 0.05, STEEL), handlebar])
    lamp = Part(_lamps(0.56, 0.86, 0.0, 0.12, HEADLIGHT)[:1], 1)
    joints: dict[str, Point] = {
        "hip": (-0.25, 0, 0.9),
        "shoulder": (lean - 0.05, 0, 1.38),
        "head": (lean + 0.06, 0, 1.6),
    }
    for side, y in (("left", 0.2), ("right", -0.2)):
        joints |= {f"{side}_knee": (0.22, y, 0.72), f"{side}_foot": (-0.02, y, 0.34)}
        joints |= {f"{side}_elbow": (lean + 0.1, y * 1.5, 1.12), f"{side}_hand": (0.42, y * 1.3, 1.08)}
    rider = _body(rng, joints)
    head = rider[-1].shapes[1]
    assert isinstance(head, Limb)
    helmet = Part([Limb(head.start, head.end, 0.15, _vary(rng, PAINTS))], 1)
    machine = [*wheels, Part(shapes), fork, lamp]
    return [*machine, *rider, helmet] if rng.random() < 0.93 else machine


BUILDERS = {"car": _car, "motorcycle": _motorcycle, "person": _person, "truck": _truck}
KINDS = tuple(BUILDERS)


def _vary(rng: np.random.Generator, colours: list[Colour]) -> Colour:
    """One of the colours, slightly changed."""
    varied = np.clip(np.array(colours[rng.integers(len(colours))]) + rng.normal(0, 12, 3), 8, 250)
    red, green, blue = (int(channel) for channel in varied)
    return red, green, blue


def street_lamp(side: int) -> list[Part]:
    """A street lamp on the left (1) or right (-1) of the road, with its arm over the road."""
    arm = [Limb((0, 0, 6.0), (0, -side * 1.3, 6.3), 0.06, STEEL), Limb((0, 0, 0), (0, 0, 6.0), 0.08, STEEL)]
    bulb = np.array([(-0.2, 0, 6.2), (0.2, 0, 6.2), (0.2, 0, 6.35), (-0.2, 0, 6.35)]) - (0, side * 1.3, 0)
    return [Part(arm), Part([Face(bulb, (255, 236, 190), lamp=True)], 1)]


def tree(seed: int) -> list[Part]:
    """A young tree; its shape depends on the seed alone."""
    rng = np.random.default_rng(seed)
    crown = []
    for _ in range(16):
        point, radius = rng.normal(0, 0.55, 3) + (0, 0, 3.9), rng.uniform(0.3, 0.55)
        crown.append(Part([Limb(point, point + 0.1, radius, _vary(rng, LEAVES))], 1))
    return [Part([Limb((0, 0, 0), (0, 0, 3.4), 0.11, (84, 66, 50))]), *crown]
