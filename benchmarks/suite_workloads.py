"""The suite as data: cameras, datasets, models, workloads. see benchmarks.suite.

Everything is small: images of 32 to 128 px, a few hundred of them to train on, models that train in seconds. A model is
named as a task is: its dataset, then its architecture; a mark behind a hyphen tells models apart that differ in their
start alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gemel.sample_workload.camera import CAMERAS, Camera
from gemel.sample_workload.objects import KINDS
from gemel.workload import CLASSIFICATION, DETECTION

FASHION, SHARED, MOBILENET = "--fashion-mnist", "--shared-datasets", "--mobilenet-v2"  # the sources, by their flags


class Drawn(NamedTuple):
    """Drawn scenes: crops of objects by class, or frames with boxes. Numbers are for train and val."""

    cameras: tuple[str, ...]
    classes: tuple[str, ...]  # in the order of the class ids
    kind: str
    scenes: tuple[int, int]  # per camera
    per_class: tuple[int, int] = (80, 50)  # at most, per camera; crops only
    size: int = 48  # pixels a side


class Fashion(NamedTuple):
    """Images of Fashion-MNIST: train from its train part, val from its test part."""

    classes: tuple[str, ...]
    per_class: tuple[int, int]
    noise: float = 0.0  # standard deviation of noise that is added, of 255


class Subset(NamedTuple):
    """A random part of a set of photographs below --shared-datasets."""

    folder: str
    kind: str
    classes: tuple[str, ...]  # of a detector's set: names of the ids, from 0
    images: tuple[int, int]  # at most, per class (classification) or in all (detection)


class Model(NamedTuple):
    """A model, the dataset that it is trained and judged on, and how it is trained."""

    dataset: str
    builder: str  # of model_architectures, or of benchmarks.suite_prepare.OWN_BUILDERS
    kwargs: dict[str, Any]
    size: int  # pixels a side of what the model sees
    epochs: int
    learning_rate: float
    parent: str | None = None  # the ancestor: a name in MODELS, or MOBILENET; None: a random start of its own


class Workload(NamedTuple):
    """Models that are merged together."""

    models: tuple[str, ...]
    tolerance: float
    about: str


class Suite(NamedTuple):
    """Everything that workloads are made of, by name."""

    cameras: Mapping[str, Camera]
    datasets: Mapping[str, "Drawn | Fashion | Subset"]
    models: Mapping[str, Model]
    workloads: Mapping[str, Workload]


# ---- cameras --------------------------------------------------------------------------------------------

_DAY, _NIGHT = CAMERAS["main_2nd"], CAMERAS["elm_1st"]
_GREY = ((196, 198, 200), (172, 176, 182))
SUITE_CAMERAS: dict[str, Camera] = {
    "noon": _DAY._replace(
        across=-3.0, height=8.0, yaw=12.0, pitch=18.0, focal=1.7, sun=(0.2, -0.3, 0.93), noise=3.0, blur=0.4
    ),
    "fog": _DAY._replace(
        across=-2.0, height=5.5, yaw=3.0, pitch=13.0, haze=30.0, sun_light=(0.3, 0.3, 0.3), sky=_GREY, noise=7.0
    ),
    "dusk": _NIGHT._replace(across=-14.0, height=5.0, yaw=52.0, noise=13.0, blur=0.8, quality=(30, 60)),
    "rain": _DAY._replace(
        across=-5.5, height=7.0, yaw=20.0, pitch=17.0, first=10.0, last=28.0, sun_light=(0.22, 0.23, 0.26)
    )._replace(sky=_GREY, haze=75.0, noise=9.0, blur=1.2),
    "junction": _DAY._replace(
        across=-12.0, height=9.0, yaw=38.0, pitch=21.0, focal=1.5, houses=15.0, sun=(-0.6, 0.4, 0.5)
    ),
    "yard": _NIGHT._replace(across=-11.0, height=7.5, yaw=40.0, pitch=19.0, noise=26.0, blur=1.3, quality=(20, 45)),
}

# ---- datasets -------------------------------------------------------------------------------------------

_ALL, _VEHICLES = tuple(SUITE_CAMERAS), ("car", "motorcycle", "truck")
_SCENES, _FRAMES = (150, 90), (160, 60)
_CITY = tuple(camera for camera in _ALL if camera != "yard")
_TOPS = ("t-shirt", "pullover", "dress", "coat", "shirt")
FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)  # in the order of the label ids
DATASETS: dict[str, Drawn | Fashion | Subset] = {
    "city_street": Drawn(_CITY, KINDS, CLASSIFICATION, (80, 20), (45, 12)),
    "city_traffic": Drawn(_CITY, KINDS, DETECTION, (40, 8), size=128),
    **{f"{camera}_street": Drawn((camera,), KINDS, CLASSIFICATION, _SCENES) for camera in _ALL},
    **{f"{camera}_vehicles": Drawn((camera,), _VEHICLES, CLASSIFICATION, _SCENES, (100, 60)) for camera in _ALL},
    **{f"{camera}_traffic": Drawn((camera,), KINDS, DETECTION, _FRAMES, size=128) for camera in _ALL},
    "fashion_all": Fashion(FASHION_CLASSES, (60, 30)),
    "fashion_tops": Fashion(_TOPS, (90, 50)),
    "fashion_shoes": Fashion(("sandal", "sneaker", "boot"), (110, 80)),
    "fashion_easy": Fashion(("trouser", "bag", "boot"), (110, 80)),
    "fashion_noisy": Fashion(FASHION_CLASSES, (60, 30), noise=60.0),
    "photo_signs": Subset("ring_signs_CL", CLASSIFICATION, ("priority_road", "speed30", "stop", "yield"), (90, 60)),
    "photo_people": Subset("manaus_street_CL", CLASSIFICATION, ("biker", "car", "people"), (110, 60)),
    "photo_cars": Subset("main_2nd_cars_trucks_CL", CLASSIFICATION, ("automobile", "truck"), (200, 120)),
    "photo_day": Subset("fork_day_vehicles_OD", DETECTION, ("car", "truck"), (160, 70)),
    "photo_night": Subset("night_highway_vehicles_OD", DETECTION, ("car", "truck"), (160, 70)),
}

# ---- models ---------------------------------------------------------------------------------------------

_SHALLOW, _DEEP = (1, 1, 1, 1), (2, 2, 2, 2)
_STREET, _DETECTOR = "city_street_slim18", "city_traffic_fcos"  # ancestors


def _slim(dataset: str, layers: tuple, parent: str | None = None, width: int = 32, size: int = 48) -> Model:
    epochs = 5 if parent else 9
    return Model(dataset, "slim_resnet", {"layers": layers, "width": width}, size, epochs, 2e-3, parent)


def _fcos(dataset: str, parent: str | None, epochs: int) -> Model:
    kwargs = {"backbone": "slim_resnet", "layers": _SHALLOW, "width": 32, "out_channels": 64, "min_size": 128}
    return Model(dataset, "fcos_model", kwargs, 128, epochs, 2e-3, parent)


def _net(dataset: str, builder: str, size: int, epochs: int, parent: str | None = None, **kwargs: Any) -> Model:
    return Model(dataset, builder, kwargs, size, epochs, 1e-3, parent)


MODELS: dict[str, Model] = {
    # ancestors: all cameras
    _STREET: _slim("city_street", _DEEP)._replace(epochs=5),
    _DETECTOR: _fcos("city_traffic", _STREET, 10),
    "city_street_plain": _net("city_street", "plain_cnn", 48, 5, width=24),
    # of the street ancestor
    "noon_street_slim18": _slim("noon_street", _DEEP, _STREET),
    "dusk_street_slim18": _slim("dusk_street", _DEEP, _STREET),
    "rain_street_slim18": _slim("rain_street", _DEEP, _STREET),
    "yard_street_slim18": _slim("yard_street", _DEEP, _STREET),
    "fog_vehicles_slim18": _slim("fog_vehicles", _DEEP, _STREET),
    "noon_street_slim10": _slim("noon_street", _SHALLOW, _STREET),
    "noon_vehicles_slim10": _slim("noon_vehicles", _SHALLOW, _STREET),
    "fog_vehicles_slim10": _slim("fog_vehicles", _SHALLOW, _STREET),
    "dusk_street_slim10": _slim("dusk_street", _SHALLOW, _STREET),
    "rain_vehicles_slim10": _slim("rain_vehicles", _SHALLOW, _STREET),
    "junction_street_slim10": _slim("junction_street", _SHALLOW, _STREET),
    # detectors
    "noon_traffic_fcos": _fcos("noon_traffic", _DETECTOR, 8),
    "fog_traffic_fcos": _fcos("fog_traffic", _DETECTOR, 8),
    "rain_traffic_fcos": _fcos("rain_traffic", _DETECTOR, 8),
    "photo_day_fcos": _fcos("photo_day", _DETECTOR, 11),
    "photo_night_fcos": _fcos("photo_night", _DETECTOR, 12),
    # each from a random start of its own
    "fashion_tops_slim18": _slim("fashion_tops", _DEEP, size=32),
    "fashion_shoes_slim18": _slim("fashion_shoes", _DEEP, size=32),
    "fashion_shoes_slim10": _slim("fashion_shoes", _SHALLOW, size=32),
    "fashion_easy_slim10": _slim("fashion_easy", _SHALLOW, size=32),
    "fashion_noisy_slim18": _slim("fashion_noisy", _DEEP, size=32),
    "yard_street_slim18-apart": _slim("yard_street", _DEEP),
    "rain_street_slim18-apart": _slim("rain_street", _DEEP),
    "noon_vehicles_slim18w48": _slim("noon_vehicles", _DEEP, width=48),
    "junction_street_slim8w64": _slim("junction_street", (1, 1, 1), width=64),
    "fashion_all_resnet18": _net("fashion_all", "resnet18", 32, 3),
    "fashion_shoes_resnet34": _net("fashion_shoes", "resnet34", 32, 3),
    "fashion_easy_resnet50": _net("fashion_easy", "resnet50", 32, 3),
    "fashion_shoes_mobilenet": _net("fashion_shoes", "mobilenet_v2", 32, 14),
    "fashion_easy_mobilenet75": _net("fashion_easy", "mobilenet_v2", 32, 14, width_mult=0.75),
    "fashion_tops_mobilenet50": _net("fashion_tops", "mobilenet_v2", 32, 12, width_mult=0.5),
    "photo_signs_squeezenet": _net("photo_signs", "squeezenet1_1", 64, 12),
    "photo_people_squeezenet": _net("photo_people", "squeezenet1_1", 64, 12),
    # of the other ancestors
    "noon_street_plain": _net("noon_street", "plain_cnn", 48, 7, "city_street_plain", width=24),
    "dusk_vehicles_plain": _net("dusk_vehicles", "plain_cnn", 48, 7, "city_street_plain", width=24),
    "photo_signs_mobilenet": _net("photo_signs", "mobilenet_v2", 96, 3, MOBILENET),
    "photo_people_mobilenet": _net("photo_people", "mobilenet_v2", 96, 3, MOBILENET),
    "photo_cars_mobilenet": _net("photo_cars", "mobilenet_v2", 96, 3, MOBILENET),
}

# ---- workloads ------------------------------------------------------------------------------------------

WORKLOADS: dict[str, Workload] = {
    "two_cameras": Workload(("noon_street_slim18", "fog_vehicles_slim18"), 0.95, "one ancestor, other classes"),
    "three_cameras_99": Workload(
        ("noon_vehicles_slim10", "dusk_street_slim18", "rain_street_slim18"), 0.99, "one ancestor, two depths"
    ),
    "three_cameras_90": Workload(
        ("noon_street_slim18", "yard_street_slim18", "fog_vehicles_slim10"), 0.9, "one ancestor, one hard camera"
    ),
    "five_cameras": Workload(
        (
            *("noon_street_slim10", "fog_vehicles_slim10", "dusk_street_slim10"),
            *("rain_vehicles_slim10", "junction_street_slim10"),
        ),
        0.95,
        "five of one ancestor",
    ),
    "fashion_apart": Workload(("fashion_tops_slim18", "fashion_shoes_slim18"), 0.95, "apart, hard and easy"),
    "easy_99": Workload(("fashion_shoes_slim10", "fashion_easy_slim10"), 0.99, "apart, both easy"),
    "hard_apart": Workload(("fashion_noisy_slim18", "yard_street_slim18-apart"), 0.95, "apart, both noisy"),
    "resnets": Workload(
        ("fashion_all_resnet18", "fashion_shoes_resnet34", "fashion_easy_resnet50"), 0.95, "apart, three depths"
    ),
    "mobilenets": Workload(
        ("fashion_shoes_mobilenet", "fashion_easy_mobilenet75", "fashion_tops_mobilenet50"), 0.95, "apart, other widths"
    ),
    "widths": Workload(
        ("rain_street_slim18-apart", "noon_vehicles_slim18w48", "junction_street_slim8w64"), 0.95, "apart, other widths"
    ),
    "plain_cnns": Workload(("noon_street_plain", "dusk_vehicles_plain"), 0.95, "one ancestor, no normalisation"),
    "squeezenets_90": Workload(
        ("photo_signs_squeezenet", "photo_people_squeezenet"), 0.9, "apart, photographs, no normalisation"
    ),
    "photo_mobilenets": Workload(
        ("photo_signs_mobilenet", "photo_people_mobilenet", "photo_cars_mobilenet"), 0.95, "one ancestor, photographs"
    ),
    "detector_classifier": Workload(("noon_traffic_fcos", "noon_street_slim10"), 0.95, "one ancestor, two tasks"),
    "two_detectors_90": Workload(("fog_traffic_fcos", "rain_traffic_fcos"), 0.9, "one ancestor, other cameras"),
    "photo_detectors": Workload(("photo_day_fcos", "photo_night_fcos"), 0.95, "one ancestor, photographs"),
}

SUITE = Suite(SUITE_CAMERAS, DATASETS, MODELS, WORKLOADS)
