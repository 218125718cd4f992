"""The type of the weights in a results folder, and whether they are loaded as they were judged.

`precision` of the manifest says it: `weights` (the type they are stored in), `arithmetic` (the type that was computed
in when tasks were judged) and `device`. Results of earlier versions have float32 weights.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from gemel.forward.arithmetic import STORE_DTYPES, arithmetic_on
from gemel.sharing import adapters, affine
from gemel.sharing.adapters import adapter_part, affine_part, own_part, plain_state

FLOAT32 = {"weights": "float32", "arithmetic": "float32", "device": "cpu"}


def precision_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The `precision` part of a valid manifest."""
    return manifest.get("precision", FLOAT32)


def weights_dtype(manifest: Mapping[str, Any]) -> torch.dtype:
    """The type in which the weights are stored."""
    return STORE_DTYPES[precision_of(manifest)["weights"]]


def loaded_dtype(manifest: Mapping[str, Any]) -> torch.dtype:
    """The type in which models hold the weights after loading: that of the store, or float32 where it has 8 bits."""
    stored = weights_dtype(manifest)
    return torch.float32 if stored == torch.int8 else stored


def unjudged(manifest: Mapping[str, Any], weights: str, device_type: str) -> str | None:
    """How running with weights of that type on that device differs from how the tasks were judged; None if it does not.

    float32 weights that were rounded to the type of the store are the same numbers.
    """
    judged, arithmetic = precision_of(manifest), arithmetic_on(device_type, weights)
    if weights not in ("float32", judged["weights"]):
        return f"weights are loaded in {weights}, and were judged in {judged['weights']}"
    if arithmetic != judged["arithmetic"]:
        return f"on {device_type} they are computed in {arithmetic}, and were judged in {judged['arithmetic']}"
    return None


def warn_if_unjudged(results: object, manifest: Mapping[str, Any], weights: str, device_type: str) -> None:
    """Warns (UserWarning) where the accuracies in the manifest are not those of the models as they will run."""
    if (why := unjudged(manifest, weights, device_type)) is not None:
        warnings.warn(f"{results}: {why}: accuracies may differ from those in the manifest", stacklevel=3)


def plain_tensors(
    tensors: Mapping[str, Tensor], layers: Collection[str], manifest: Mapping[str, Any]
) -> dict[str, Tensor]:
    """`plain_state` of a task's tensors; in float32 where layers' adapters, scales and biases go into their weights.

    Rounded to the type of the store, such weights would not be those that were judged.
    """
    dtype, wide = weights_dtype(manifest), dict(tensors)
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        for part, child in (
            (own_part, ""),
            (adapter_part, f"{adapters.ATTRIBUTE}."),
            (affine_part, f"{affine.ATTRIBUTE}."),
        ):
            for name, tensor in part(tensors, layer).items():
                wide[prefix + child + name] = tensor.float() if tensor.dtype == dtype else tensor
    return plain_state(wide, layers)
