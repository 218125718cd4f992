"""Low-rank residuals: what a tied layer computes besides for one task alone, so that it can be shared at a price.

With a residual of rank r the layer computes shared(x) + up(down(x)): `down` is a layer of the same kind with r outputs
(per group of a grouped convolution), `up` brings these to the outputs of the layer. The layer's own parameters stay the
shared ones; the residual is a child of the layer, which a forward hook adds, and moves, copies and saves with it.
Source: Hu et al., "LoRA", ICLR 2022; one factor pair per task beside shared weights, as here, is theirs as well.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

ATTRIBUTE = "low_rank"  # the child's name; its tensors are <layer>.low_rank.down.weight and so on
PARTS = ("down.weight", "down.bias", "up.weight")
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of layers that can have one


class Adapter(nn.Module):
    """The residual of one layer, on its device and of its dtype; nothing is added until `up` gets values."""

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__()
        bias, kwargs = layer.bias is not None, {"device": "meta", "dtype": layer.weight.dtype}  # draws no numbers
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias, **kwargs)
            self.up = nn.Linear(rank, layer.out_features, bias=False, **kwargs)
        else:
            kind = next(kind for kind in KINDS if isinstance(layer, kind))
            width, groups = rank * layer.groups, layer.groups
            places = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            self.down = kind(layer.in_channels, width, *places, groups, bias, layer.padding_mode, **kwargs)
            self.up = kind(width, layer.out_channels, 1, groups=groups, bias=False, **kwargs)
        self.to_empty(device=layer.weight.device)
        nn.init.zeros_(self.up.weight)
        if bias:
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
        """The forward hook of the layer; a bound method, so that a copy of the layer calls the residual's copy."""
        return output + self(inputs[0])


def adapter_of(layer: nn.Module) -> Adapter | None:
    residual = layer._modules.get(ATTRIBUTE)
    return residual if isinstance(residual, Adapter) else None


def set_adapter(layer: nn.Module, residual: Adapter | None) -> None:
    """Gives the layer this residual in the place of the one that it has; None: takes it away."""
    if (old := adapter_of(layer)) is not None:
        for number, hook in list(layer._forward_hooks.items()):
            if hook == old.add:
                del layer._forward_hooks[number]
        delattr(layer, ATTRIBUTE)
    if residual is not None:
        setattr(layer, ATTRIBUTE, residual)
        layer.register_forward_hook(residual.add)


def set_rank(layer: nn.Module, rank: int) -> None:
    """Gives the layer a new residual of that rank (0: none), unless it has one; raises ValueError if it cannot."""
    old = adapter_of(layer)
    if rank == (old.rank if old else 0):
        return
    if rank and not 0 < rank <= max_rank(layer):
        raise ValueError(f"a residual of rank {rank} for {layer}; allowed: 0 to {max_rank(layer)}")
    set_adapter(layer, Adapter(layer, rank) if rank else None)


def max_rank(layer: nn.Module) -> int:
    """The rank that its weight can have; 0 for a layer that can have no residual."""
    if not any(type(layer).forward is kind.forward for kind in KINDS):
        return 0
    if adapter_of(layer) is None and hasattr(layer, ATTRIBUTE):
        return 0
    groups = getattr(layer, "groups", 1)
    return min(len(layer.weight) // groups, layer.weight[0].numel())


def adapter_bytes(layer: nn.Module, rank: int) -> int:
    """Bytes of a residual of that rank."""
    groups = getattr(layer, "groups", 1)
    inputs, outputs = layer.weight[0].numel() + (layer.bias is not None), len(layer.weight)
    return rank * (groups * inputs + outputs) * layer.weight.element_size()


def rank_within(layer: nn.Module, price: float) -> int:
    """The largest rank whose bytes are at most this share of the layer's; 0 if there is none."""
    if max_rank(layer) == 0:
        return 0
    own = sum(parameter.nbytes for parameter in layer.parameters(recurse=False))
    return min(max_rank(layer), int(price * own / adapter_bytes(layer, 1)))


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules() without residuals and what is in them: the modules that the model had from the start."""
    residuals: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            residuals.append(name + ".")
        elif not name.startswith(tuple(residuals)):
            yield name, module


def fold(layer: nn.Module) -> None:
    """Writes the residual into the layer's own parameters, which must not be shared, and takes it away."""
    residual = adapter_of(layer)
    if residual is None:
        return
    own = {name: p.detach() for name, p in layer.named_parameters(recurse=False)}
    for name, values in folded(own, residual.state_dict()).items():
        getattr(layer, name).data.copy_(values)
    set_adapter(layer, None)


def is_sound(own: Mapping[str, tuple[int, ...]], residual: Mapping[str, tuple[int, ...]], rank: int) -> bool:
    """Whether shapes are those of a layer and its residual of that rank, so that `folded` works on such tensors."""
    if "weight" not in own or set(residual) != {PARTS[0], PARTS[2], *(["down.bias"] if "bias" in own else [])}:
        return False
    (outputs, *inputs), (width, *taps), up = own["weight"], residual["down.weight"], residual["up.weight"]
    ones = [1] * (len(inputs) - 1)
    fits = taps == inputs and list(up) == [outputs, rank, *ones] and 0 < rank <= width and width % rank == 0
    if not fits or outputs % (width // rank):
        return False
    return "bias" not in own or (tuple(own["bias"]), tuple(residual["down.bias"])) == ((outputs,), (width,))


def folded(own: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight (and bias) of the one layer that computes what a layer and its residual do.

    own: "weight" and, if there is one, "bias"; residual: state dict of a Adapter. Summed rank by rank, element by
    element, so that every machine gets the same bits.
    """
    down, up = residual["down.weight"], residual["up.weight"].flatten(1)
    rank = up.shape[1]
    groups = len(down) // rank
    down, up = down.reshape(groups, rank, 1, -1), up.reshape(groups, -1, rank, 1)
    weight = own["weight"].reshape(groups, up.shape[1], -1).clone()
    for k in range(rank):
        weight += up[:, :, k] * down[:, k]
    found = {"weight": weight.reshape(own["weight"].shape)}
    if "bias" in own:
        bias, shift = own["bias"].reshape(groups, -1).clone(), residual["down.bias"].reshape(groups, rank)
        for k in range(rank):
            bias += up[:, :, k, 0] * shift[:, k : k + 1]
        found["bias"] = bias.reshape(-1)
    return found


def plain_state(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """A state dict without residuals: those of these layers are folded into their weights."""
    found = dict(tensors)
    for layer in layers:
        residual, at = adapter_part(tensors, layer), f"{layer}." if layer else ""
        found |= {at + key: values for key, values in folded(own_part(tensors, layer), residual).items()}
        for part in residual:
            del found[f"{at}{ATTRIBUTE}.{part}"]
    return found


def own_part(tensors: Mapping[str, T], layer: str) -> dict[str, T]:
    """Of a mapping from the names of a model's tensors: weight and bias of a layer, by these names."""
    at = f"{layer}." if layer else ""
    return {part: tensors[at + part] for part in ("weight", "bias") if at + part in tensors}


def adapter_part(tensors: Mapping[str, T], layer: str) -> dict[str, T]:
    """The same of a layer's residual, by the names within it."""
    at = f"{layer}.{ATTRIBUTE}." if layer else f"{ATTRIBUTE}."
    return {part: tensors[at + part] for part in PARTS if at + part in tensors}
