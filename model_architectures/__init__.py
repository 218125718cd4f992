"""Builds classifiers and detectors by name, `build("resnet18", 2)`, and loads their weights; `names()` lists the names.

Open registry.py first: it defines what a builder is and how a model is rebuilt from its recorded architecture. The
names of the published Gemel repository and the small models for a CPU are functions as well, such as
`frcnn_model(2, backbone="resnet18")`; their arguments are documented in classifiers.py, detectors.py and yolov3.py, and
all take `weights` and `weights_backbone` as build() does.
"""

from functools import partial

from model_architectures.darknet_weights import load_darknet
from model_architectures.detectors import num_classes_of
from model_architectures.registry import architecture_of, build, names, rebuild, register
from model_architectures.weights import load_weights

resnet18 = partial(build, "resnet18")
resnet50 = partial(build, "resnet50")
resnet101 = partial(build, "resnet101")
resnet152 = partial(build, "resnet152")
vgg16 = partial(build, "vgg16")
inceptionv3 = partial(build, "inceptionv3")
mobilenetv3 = partial(build, "mobilenetv3")
slim_resnet = partial(build, "slim_resnet")

ssd_vgg_model = partial(build, "ssd_vgg_model")
ssd_mobilenet_model = partial(build, "ssd_mobilenet_model")
frcnn_model = partial(build, "frcnn_model")
fcos_model = partial(build, "fcos_model")
yolov3_model = partial(build, "yolov3")
yolov3_tiny_model = partial(build, "yolov3_tiny")

__all__ = [
    "architecture_of",
    "build",
    "fcos_model",
    "frcnn_model",
    "inceptionv3",
    "load_darknet",
    "load_weights",
    "mobilenetv3",
    "names",
    "num_classes_of",
    "rebuild",
    "register",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet50",
    "slim_resnet",
    "ssd_mobilenet_model",
    "ssd_vgg_model",
    "vgg16",
    "yolov3_model",
    "yolov3_tiny_model",
]
