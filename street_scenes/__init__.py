"""Drawn street scenes, the pictures of the embedded sample workload. Drawing only: numpy and PIL, no models."""

from street_scenes.camera import CAMERAS, CANVAS, Camera
from street_scenes.files import Crops, Frames, write_scenes
from street_scenes.objects import KINDS
from street_scenes.scenes import Scene, Thing, crop, draw_scene, frame

__all__ = [
    "CAMERAS",
    "CANVAS",
    "Camera",
    "Crops",
    "Frames",
    "KINDS",
    "Scene",
    "Thing",
    "crop",
    "draw_scene",
    "frame",
    "write_scenes",
]
