"""Do models of other libraries merge? Pairs of small untrained models of timm and transformers, one printed line each.

    python -m benchmarks.other_libraries                # all pairs, about 15 minutes on one core
    python -m benchmarks.other_libraries vit swin       # those whose names contain one of these words

Needs timm and transformers, which are no dependencies: `pip install timm transformers` in an environment of your own.
Each pair has two and three classes of random images of 64 x 64 pixels, and is merged with the default strategy. The
line says whether the run came to its normal end, what was saved, and whether the models that are loaded from the folder
put out what the merged ones do, up to the rounding of another memory layout.
"""

import argparse
import contextlib
import io
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from eval_methods import classification_eval
from gemel.results_store.load import load_merged
from merge_workloads import merge_workload

SIZE = 64
IMAGES = 4  # of each class and split
CLASSES = {"north": 2, "south": 3}
ROUNDING = 1e-4  # of the largest output


def of_timm(name: str, **kwargs: Any) -> Callable[[int], nn.Module]:
    """A maker of models of timm, by number of classes."""

    def make(num_classes: int) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=num_classes, **kwargs)

    return make


def of_transformers(name: str, **sizes: Any) -> Callable[[int], nn.Module]:
    """A maker of models of transformers, by number of classes; name: that of its classes, such as "ViT"."""

    def make(num_classes: int) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=num_classes, **sizes)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return make


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {**SMALL, "image_size": SIZE, "patch_size": 16}
VIT = {"img_size": SIZE, "depth": 2}
MAKERS = {
    "timm resnet10t": of_timm("resnet10t"),
    "timm convnext_atto": of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)),
    "timm vit_tiny": of_timm("vit_tiny_patch16_224", **VIT),
    "timm deit_tiny_distilled": of_timm("deit_tiny_distilled_patch16_224", **VIT),
    "timm swin_tiny": of_timm(
        "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, embed_dim=24, depths=(1, 1)
    ),
    "timm efficientnet_b0": of_timm("efficientnet_b0"),
    "timm mobilenetv4_conv_small": of_timm("mobilenetv4_conv_small_050"),
    "timm mobilenetv3_small": of_timm("mobilenetv3_small_050"),
    "timm tf_mobilenetv3 (Conv2dSame)": of_timm("tf_mobilenetv3_small_minimal_100"),
    "timm ghostnet": of_timm("ghostnet_050"),
    "timm nf_regnet (ScaledStdConv)": of_timm("nf_regnet_b0"),
    "timm mobileone": of_timm("mobileone_s0"),
    "timm regnetx": of_timm("regnetx_002"),
    "timm edgenext": of_timm("edgenext_xx_small"),
    "transformers ViT": of_transformers("ViT", **PATCHES),
    "transformers DeiT": of_transformers("DeiT", **PATCHES),
    "transformers Swin": of_transformers(
        "Swin", image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "transformers ResNet": of_transformers(
        "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
    "transformers ConvNext": of_transformers(
        "ConvNext", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], image_size=SIZE
    ),
    "transformers MobileNetV2": of_transformers("MobileNetV2", depth_multiplier=0.25, image_size=SIZE),
    "transformers BEiT": of_transformers("Beit", **PATCHES),
}


def to_tensor(image: Image.Image) -> torch.Tensor:
    """[3, SIZE, SIZE] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_images(root: Path) -> None:
    """Random images by class; nothing can be learnt from them, and any accuracy will do."""
    random = np.random.default_rng(0)
    for name, num_classes in CLASSES.items():
        for split in ("train", "val"):
            for label in range(num_classes):
                folder = root / f"{name}_CL" / split / f"class{label}"
                folder.mkdir(parents=True)
                for i in range(IMAGES):
                    pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")


def entry_of(model: nn.Module, unmerged_acc: float) -> dict:
    """A task of the workload."""
    return {
        "model": model,
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": {"train": to_tensor, "val": to_tensor},
        "unmerged_acc": unmerged_acc,
        "batch_size": 4,
    }


def line_of(make: Callable[[int], nn.Module], root: Path, results: Path) -> str:
    """Merges a pair and says what came of it."""
    torch.manual_seed(0)
    models = {f"{name}_model": make(num_classes).eval() for name, num_classes in CLASSES.items()}
    entries = {name: entry_of(model, 0.05) for name, model in models.items()}
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        manifest = merge_workload(entries, results, datasets=root, device="cpu", max_epochs=1.0)
    seconds, memory = time.process_time() - began, manifest["memory"]
    fresh = {f"{name}_model": make(num_classes).eval() for name, num_classes in CLASSES.items()}
    loaded = load_merged(results, fresh)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        pairs = [tuple(_logits(m[name].eval()(images)) for m in (models, loaded)) for name in models]
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in pairs)
    end = "normal end" if manifest["run"]["finished"] else "not finished"
    reloaded = "reloaded equal" if worst <= ROUNDING else f"RELOADED DIFFERENT by {worst:.2g}"
    saved = memory["saved_bytes"] / max(1, memory["optimal_saved_bytes"])
    rounds = len(manifest["run"]["rounds"])
    return f"{end}, {rounds} rounds, saved {saved:.1%} of the optimal, {reloaded}, {seconds:.0f} CPU s"


def _logits(output: Any) -> torch.Tensor:
    return getattr(output, "logits", output)


def main(arguments: list[str] | None = None) -> None:
    """Prints one line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the names of the pairs to merge (default: all)")
    words = parser.parse_args(arguments).words
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root)
        for i, (name, make) in enumerate(MAKERS.items()):
            if words and not any(word.lower() in name.lower() for word in words):
                continue
            try:
                line = line_of(make, root, root / f"results{i}")
            except Exception as error:  # the next pair is merged as well
                frames = traceback.extract_tb(error.__traceback__)[-3:]
                where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
                line = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]} ({where})"
            print(f"{name:34s} {line}", flush=True)


if __name__ == "__main__":
    main()
