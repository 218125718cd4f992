"""Shows for which models channels can be aligned: every classifier and detector of torchvision, by family.

python -m benchmarks.alignment_support            # a minute or two; prints a table
python -m benchmarks.alignment_support resnet50 swin_t
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision import models
from tqdm import tqdm

from gemel.alignment.permutation import ChannelSpaces, find_channel_spaces
from gemel.console.tables import table
from gemel.sharing.signatures import find_layers

OUTPUT = "output"  # reason why the last layer of a model, or of a traced part, is fixed: not counted as unaligned


class Support(NamedTuple):
    """How much of one model can be aligned."""

    num_spaces: int
    touched_bytes: int  # of layers whose output or input channels can be permuted
    aligned_bytes: int  # of touched layers whose output channels are free, or fixed only as the model's output
    total_bytes: int
    reasons: Counter[str]  # why output channels are fixed -> number of layers


def support_of(model: nn.Module) -> Support:
    """Counts the layers of a model that can be shared, which excludes normalisation."""
    found = find_channel_spaces(model)
    free = {(member.key.rpartition(".")[0], member.axis) for space in found.spaces for member in space.members}
    sizes = {layer.name: layer.bytes for layer in find_layers(model)}
    touched = {name for name, _ in free}
    fixed = {name for name, reason in found.unaligned if reason != OUTPUT}
    return Support(
        len(found.spaces),
        sum(size for name, size in sizes.items() if name in touched),
        sum(size for name, size in sizes.items() if name in touched and name not in fixed),
        sum(sizes.values()),
        _reasons(found),
    )


def _reasons(found: ChannelSpaces) -> Counter[str]:
    return Counter(reason for _, reason in found.unaligned if reason != OUTPUT)


def build(name: str) -> nn.Module:
    """A torchvision model without weights, on the meta device if its constructor allows that."""
    detector = name in models.list_models(module=models.detection)
    arguments: dict[str, Any] = {"weights": None, **({"weights_backbone": None} if detector else {})}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    try:
        with torch.device("meta"):
            return models.get_model(name, **arguments)
    except (NotImplementedError, RuntimeError):  # the constructor reads values of tensors
        return models.get_model(name, **arguments)


def family_of(name: str) -> str:
    """The architecture without its size: resnet50 -> resnet, swin_v2_t -> swin_v2."""
    for family in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", "ssdlite", "ssd", "wide_resnet"):
        if name.startswith(family):
            return family
    parts = re.match(r"([a-z]+)(_v\d|_[xy](?=_\d))?", name)
    return parts.group() if parts else name


def verdict(support: Support) -> str:
    """Whether the channels of a model can be aligned: all, partly or none."""
    if not support.num_spaces:
        return "unaligned"
    return "partly" if support.reasons else "aligned"


def rows_of(names: list[str]) -> list[list[str]]:
    """One row per family: number of models, verdict, shares of the layers' bytes, the commonest reasons."""
    families: dict[str, list[Support]] = defaultdict(list)
    for name in tqdm(names, unit="model", leave=False, disable=None):
        families[family_of(name)].append(support_of(build(name)))
    rows = []
    for family, found in families.items():
        verdicts = " / ".join(sorted({verdict(support) for support in found}))
        touched = _range(100 * support.touched_bytes / support.total_bytes for support in found)
        aligned = _range(100 * support.aligned_bytes / support.total_bytes for support in found)
        reasons = sum((support.reasons for support in found), Counter())
        why = ", ".join(reason for reason, _ in reasons.most_common(3))
        rows.append([family, str(len(found)), verdicts, touched, aligned, why or "-"])
    return rows


def _range(shares: Iterable[float]) -> str:
    low, *_, high = [f"{share:.0f}" for share in sorted([*shares] * 2)]
    return low if low == high else f"{low}-{high}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    everything = [*models.list_models(module=models), *models.list_models(module=models.detection)]
    parser.add_argument("names", nargs="*", help="models of torchvision; default: all classifiers and detectors")
    names = parser.parse_args().names or everything
    if unknown := set(names) - set(everything):
        parser.error(f"names: got {', '.join(sorted(unknown))}; allowed: those of torchvision.models.list_models()")
    header = ["family", "models", "channels", "% touched", "% aligned", "reasons for unaligned layers"]
    print(table(header, rows_of(names)))


if __name__ == "__main__":
    main()
