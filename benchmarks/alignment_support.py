"""Which models' channels can be lined up: every classifier and detector of torchvision, by family.

python -m benchmarks.alignment_support            # a minute or two; prints a table
python -m benchmarks.alignment_support resnet50 swin_t
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torchvision import models
from tqdm import tqdm

from gemel.alignment.permutation import ChannelSpaces, find_channel_spaces
from gemel.merging.console import table
from gemel.sharing.signatures import find_layers

END = "output"  # why the last layer of a model, or of a part of one, is fixed: no loss of alignment


class Support(NamedTuple):
    """How much of one model can be lined up."""

    num_spaces: int
    touched_bytes: int  # of layers whose output or input channels can be permuted
    aligned_bytes: int  # of those among them whose output channels nothing but the model's output fixes
    total_bytes: int
    reasons: Counter


def support_of(model: nn.Module) -> Support:
    """Counted over the layers that can be shared: normalisation is left out."""
    found = find_channel_spaces(model)
    free = {(member.key.rpartition(".")[0], member.axis) for space in found.spaces for member in space.members}
    sizes = {layer.name: layer.bytes for layer in find_layers(model)}
    touched = {name for name, _ in free}
    fixed = {name for name, reason in found.unaligned if reason != END}
    return Support(
        len(found.spaces),
        sum(size for name, size in sizes.items() if name in touched),
        sum(size for name, size in sizes.items() if name in touched and name not in fixed),
        sum(sizes.values()),
        _reasons(found),
    )


def _reasons(found: ChannelSpaces) -> Counter:
    return Counter(reason for _, reason in found.unaligned if reason != END)


def build(name: str) -> nn.Module:
    """Without weights, on the meta device where the model's own code allows: only its structure matters."""
    detector = name in models.list_models(module=models.detection)
    arguments = {"weights": None, **({"weights_backbone": None} if detector else {})}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    try:
        with torch.device("meta"):
            return models.get_model(name, **arguments)
    except (NotImplementedError, RuntimeError):  # its constructor reads values, such as drop rates from linspace
        return models.get_model(name, **arguments)


def family_of(name: str) -> str:
    """The architecture without its size: resnet50 -> resnet, swin_v2_t -> swin_v2."""
    for family in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", "ssdlite", "ssd", "wide_resnet"):
        if name.startswith(family):
            return family
    parts = re.match(r"([a-z]+)(_v\d|_[xy](?=_\d))?", name)
    return parts.group() if parts else name


def verdict(support: Support) -> str:
    if not support.num_spaces:
        return "left unaligned"
    return "partly" if support.reasons else "aligned"


def rows_of(names: list[str]) -> list[list[str]]:
    """One row per family: how many models, the verdict, shares of the layers' bytes, reasons."""
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    everything = [*models.list_models(module=models), *models.list_models(module=models.detection)]
    parser.add_argument("names", nargs="*", help="models of torchvision; default: all classifiers and detectors")
    names = parser.parse_args().names or everything
    if unknown := set(names) - set(everything):
        parser.error(f"names: got {', '.join(sorted(unknown))}; allowed: those of torchvision.models.list_models()")
    print(
        table(["family", "models", "channels", "% touched", "% aligned", "left as they are because of"], rows_of(names))
    )


if __name__ == "__main__":
    main()
