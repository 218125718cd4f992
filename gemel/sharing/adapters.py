"""Adapters: low-rank layers, private to one task, whose outputs are added to those of a tied layer.

With an adapter of rank r the layer computes shared(x) + up(down(x)), where shared(x) is with the private scale and bias
if it has these as well (affine.py): `down` is a layer of the same kind with r outputs
(per group of a grouped convolution), `up` maps these to the outputs of the layer. The layer's own parameters stay the
shared ones; the adapter is a child of the layer, which a forward hook calls, and is moved, copied and saved with it.
Source: Hu et al., "LoRA", ICLR 2022, who also have one pair of factors for each task beside shared weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gemel.sharing import affine
from gemel.sharing.affine import Affine, affine_of, set_affine

T = TypeVar("T")
LinearMap = nn.Linear | _ConvNd  # layers that multiply rows of their inputs by a matrix

ATTRIBUTE = "low_rank"  # the child's name; its tensors are <layer>.low_rank.down.weight and so on
PARTS = ("down.weight", "down.bias", "up.weight")
PARAMETERS = ("weight", "bias")  # of a layer that can have an adapter, or a scale and bias
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = (nn.Linear, *CONVOLUTIONS)  # of layers that can have an adapter


class Adapter(nn.Module):
    """The adapter of one layer, on its device and of its dtype; its output is zero until `up` gets values."""

    down: LinearMap
    up: LinearMap

    def __init__(self, layer: LinearMap, rank: int):
        super().__init__()
        bias = layer.bias is not None
        kwargs: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}  # draws no numbers
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias, **kwargs)
            self.up = nn.Linear(rank, layer.out_features, bias=False, **kwargs)
        else:
            kind: Callable[..., _ConvNd] = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
            width, groups = rank * layer.groups, layer.groups
            places = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            self.down = kind(layer.in_channels, width, *places, groups, bias, layer.padding_mode, **kwargs)
            self.up = kind(width, layer.out_channels, 1, groups=groups, bias=False, **kwargs)
        self.to_empty(device=layer.weight.device)
        nn.init.zeros_(self.up.weight)
        if self.down.bias is not None:
            nn.init.zeros_(self.down.bias)
        if not layer.weight.is_meta:
            drawn = torch.empty_like(self.down.weight, device="cpu")
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
            self.down.weight.data.copy_(drawn)

    @property
    def rank(self) -> int:
        return self.up.weight.shape[1]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.up(self.down(inputs))

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook of the layer; a bound method, so that a copy of the layer calls the copy of the adapter."""
        return output + self(inputs[0])


def as_linear_map(layer: nn.Module) -> LinearMap:
    """The layer itself, which the caller knows to be linear or a convolution."""
    assert isinstance(layer, LinearMap), f"{type(layer).__name__} is no linear map"
    return layer


def adapter_of(layer: nn.Module) -> Adapter | None:
    """The layer's adapter, or None."""
    adapter = layer._modules.get(ATTRIBUTE)
    return adapter if isinstance(adapter, Adapter) else None


def set_adapter(layer: nn.Module, adapter: Adapter | None) -> None:
    """Replaces the layer's adapter; None removes it."""
    if (old := adapter_of(layer)) is not None:
        for number, hook in list(layer._forward_hooks.items()):
            if hook == old.add:
                del layer._forward_hooks[number]
        delattr(layer, ATTRIBUTE)
    if adapter is not None:
        setattr(layer, ATTRIBUTE, adapter)
        layer.register_forward_hook(adapter.add)


def set_rank(layer: nn.Module, rank: int) -> None:
    """Gives the layer a new adapter of that rank (0: none), unless it has one. Raises ValueError for a wrong rank."""
    old = adapter_of(layer)
    if rank == (old.rank if old else 0):
        return
    if rank and not 0 < rank <= max_rank(layer):
        raise ValueError(f"an adapter of rank {rank} for {layer}; allowed: 0 to {max_rank(layer)}")
    set_adapter(layer, Adapter(as_linear_map(layer), rank) if rank else None)


def give_affine(layer: nn.Module, wanted: bool) -> None:
    """Gives the layer a private scale and bias without effect, unless it has one; not wanted: removes it.

    Raises ValueError for a layer that cannot have one.
    """
    if wanted == (affine_of(layer) is not None):
        return
    if wanted and not can_have_affine(layer):
        raise ValueError(f"a private scale and bias for {layer}; allowed: linear layers and convolutions")
    set_affine(layer, Affine(as_linear_map(layer)) if wanted else None)


def owns_its_weight(layer: nn.Module) -> bool:
    """Whether the layer's weight and bias are parameters of its own, not computed from others."""
    weight, bias = (vars(layer).get("_parameters", {}).get(key) for key in PARAMETERS)
    return weight is not None and (bias is not None or getattr(layer, "bias", None) is None)


def can_have_affine(layer: nn.Module) -> bool:
    """Whether the layer computes torch's own linear map or convolution, so that a scale can be folded into it."""
    is_kind = owns_its_weight(layer) and any(type(layer).forward is kind.forward for kind in KINDS)
    return is_kind and (affine_of(layer) is not None or not hasattr(layer, affine.ATTRIBUTE))


def max_rank(layer: nn.Module) -> int:
    """The largest rank of an adapter: that of the layer's weight; 0 for a layer that cannot have one."""
    if not owns_its_weight(layer) or not any(type(layer).forward is kind.forward for kind in KINDS):
        return 0
    if adapter_of(layer) is None and hasattr(layer, ATTRIBUTE):
        return 0
    weight = as_linear_map(layer).weight
    return min(len(weight) // _num_groups(layer), weight[0].numel())


def adapter_bytes(layer: nn.Module, rank: int) -> int:
    """Bytes of an adapter of that rank."""
    weight, has_bias = as_linear_map(layer).weight, layer.bias is not None
    inputs, outputs = weight[0].numel() + has_bias, len(weight)
    return rank * (_num_groups(layer) * inputs + outputs) * weight.element_size()


def _num_groups(layer: nn.Module) -> int:
    """Groups of a grouped convolution; 1 for other layers."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def rank_within(layer: nn.Module, adapter_budget: float) -> int:
    """The largest rank of an adapter whose bytes are at most this share of the layer's; 0 if there is none."""
    if max_rank(layer) == 0:
        return 0
    own = sum(parameter.nbytes for parameter in layer.parameters(recurse=False))
    return min(max_rank(layer), int(adapter_budget * own / adapter_bytes(layer, 1)))


def is_addition(module: nn.Module) -> bool:
    """Whether the module is no part of a model as it was built, but was added to a tied layer."""
    return isinstance(module, Adapter | Affine)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules() without adapters, private scales and biases: the modules that the model was built with."""
    added: list[str] = []
    for name, module in model.named_modules():
        if is_addition(module):
            added.append(name + ".")
        elif not name.startswith(tuple(added)):
            yield name, module


def has_additions(layer: nn.Module) -> bool:
    """Whether a layer has an adapter, or a private scale and bias."""
    return adapter_of(layer) is not None or affine_of(layer) is not None


def fold(layer: nn.Module) -> None:
    """Writes scale, bias and adapter into the layer's own parameters, which must not be shared, and removes them."""
    if not has_additions(layer):
        return
    for name, values in plain_state(layer.state_dict(), [""]).items():
        if name in PARAMETERS:
            getattr(layer, name).data.copy_(values)
    set_adapter(layer, None)
    set_affine(layer, None)


def is_sound(own: Mapping[str, tuple[int, ...]], adapter: Mapping[str, tuple[int, ...]], rank: int) -> bool:
    """Whether the shapes are those of a layer and an adapter of that rank, so that `folded` works on such tensors."""
    if "weight" not in own or set(adapter) != {PARTS[0], PARTS[2], *(["down.bias"] if "bias" in own else [])}:
        return False
    (outputs, *inputs), (width, *taps), up = own["weight"], adapter["down.weight"], adapter["up.weight"]
    ones = [1] * (len(inputs) - 1)
    fits = taps == inputs and list(up) == [outputs, rank, *ones] and 0 < rank <= width and width % rank == 0
    if not fits or outputs % (width // rank):
        return False
    return "bias" not in own or (tuple(own["bias"]), tuple(adapter["down.bias"])) == ((outputs,), (width,))


def folded(own: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight (and bias) of a layer that computes the same as a layer with its adapter.

    own: "weight" and, if there is one, "bias"; adapter: state dict of an Adapter. Summed rank by rank, element by
    element, so that every machine gets the same bits.
    """
    down, up = adapter["down.weight"], adapter["up.weight"].flatten(1)
    rank = up.shape[1]
    groups = len(down) // rank
    down, up = down.reshape(groups, rank, 1, -1), up.reshape(groups, -1, rank, 1)
    weight = own["weight"].reshape(groups, up.shape[1], -1).clone()
    for k in range(rank):
        weight += up[:, :, k] * down[:, k]
    found = {"weight": weight.reshape(own["weight"].shape)}
    if "bias" in own:
        bias, shift = own["bias"].reshape(groups, -1).clone(), adapter["down.bias"].reshape(groups, rank)
        for k in range(rank):
            bias += up[:, :, k, 0] * shift[:, k : k + 1]
        found["bias"] = bias.reshape(-1)
    return found


def plain_state(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """A state dict in which the private scales, biases and adapters of these layers are in the layers' weights."""
    found = dict(tensors)
    for layer in layers:
        scale_and_bias, adapter = affine_part(tensors, layer), adapter_part(tensors, layer)
        own, prefix = own_part(tensors, layer), f"{layer}." if layer else ""
        if scale_and_bias:
            own = affine.folded(own, scale_and_bias)
        if adapter:
            own = folded(own, adapter)
        found |= {prefix + key: values for key, values in own.items()}
        for attribute, parts in ((affine.ATTRIBUTE, scale_and_bias), (ATTRIBUTE, adapter)):
            for part in parts:
                del found[f"{prefix}{attribute}.{part}"]
    return found


def own_part(tensors: Mapping[str, T], layer: str) -> dict[str, T]:
    """The entries of a layer's weight and bias, by these names, in a mapping by the names of a model's tensors."""
    prefix = f"{layer}." if layer else ""
    return {part: tensors[prefix + part] for part in PARAMETERS if prefix + part in tensors}


def adapter_part(tensors: Mapping[str, T], layer: str) -> dict[str, T]:
    """The same of a layer's adapter, by the names within the adapter."""
    return _child_part(tensors, layer, ATTRIBUTE, PARTS)


def affine_part(tensors: Mapping[str, T], layer: str) -> dict[str, T]:
    """The same of a layer's private scale and bias."""
    return _child_part(tensors, layer, affine.ATTRIBUTE, affine.PARTS)


def _child_part(tensors: Mapping[str, T], layer: str, attribute: str, parts: Iterable[str]) -> dict[str, T]:
    prefix = f"{layer}.{attribute}." if layer else f"{attribute}."
    return {part: tensors[prefix + part] for part in parts if prefix + part in tensors}
