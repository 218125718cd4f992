"""Drawn street scenes, the pictures of the embedded sample workload. Drawing only: numpy and PIL, no models."""

from street_scenes.camera import CAMERAS as CAMERAS
from street_scenes.camera import CANVAS as CANVAS
from street_scenes.camera import Camera as Camera
from street_scenes.objects import KINDS as KINDS
from street_scenes.scenes import Scene as Scene
from street_scenes.scenes import Thing as Thing
from street_scenes.scenes import crop as crop
from street_scenes.scenes import draw_scene as draw_scene
from street_scenes.scenes import frame as frame
