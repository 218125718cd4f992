"""Results folders of pico models that the tests of the results store share."""

from pathlib import Path

import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.results_store.load import load_merged
from gemel.results_store.write import statistics_of, write_results
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import tie
from model_architectures import architecture_of, build

HISTORY = [{"seconds": 1.5, "round": 1, "saved_bytes": 10, "tasks_met": 2}]


def pico_models(seed: int = 0) -> nn.ModuleDict:
    """Three tasks without a recorded architecture; all groups are tied."""
    torch.manual_seed(seed)
    models = nn.ModuleDict({"a_x": PicoNet(3, extra=1), "b_x": PicoNet(4), "c_x": PicoDetector()}).eval()
    tie(models, find_groups(models))
    return models


def fresh_models() -> dict[str, nn.Module]:
    return {"a_x": PicoNet(3, extra=1), "b_x": PicoNet(4), "c_x": PicoDetector()}


def slim_models(seed: int = 0, tied: bool = True) -> nn.ModuleDict:
    """Two tasks that can be rebuilt from their recorded architecture."""
    torch.manual_seed(seed)
    kwargs = {"width": 4, "layers": [1, 1]}
    models = nn.ModuleDict({"a_slim": build("slim_resnet", 3, **kwargs), "b_slim": build("slim_resnet", 5, **kwargs)})
    if tied:
        tie(models, find_groups(models))
    return models.eval()


def manifest_of(models: nn.ModuleDict) -> dict:
    """The manifest that the merger gives to write_results, for models with all groups tied or none."""
    groups = find_groups(models)
    tied = [g for g in groups if _same_parameters(models, g)]
    merged = distinct_bytes(models)
    saved = saved_bytes(tied)
    record = {"unmerged_acc": 0.9, "measured_unmerged_acc": 0.9, "target_acc": 0.8, "merged_acc": 0.85}
    return {
        "tasks": {
            name: {
                "task": "object_detection" if isinstance(model, PicoDetector) else "image_classification",
                "architecture": architecture_of(model),
                **record,
                "unmerged_test_acc": None,
                "test_acc": None,
                "met": True,
            }
            for name, model in models.items()
        },
        "shared_layers": [
            {"signature": g.signature, "bytes": g.bytes, "occurrences": [o._asdict() for o in g.occurrences]}
            for g in tied
        ],
        "memory": {
            "unmerged_bytes": merged + saved,
            "merged_bytes": merged,
            "saved_bytes": saved,
            "optimal_saved_bytes": saved_bytes(groups),
        },
        "run": {"history": HISTORY},
    }


def _same_parameters(models: nn.ModuleDict, group) -> bool:
    layers = [models[o.task].get_submodule(o.layer) for o in group.occurrences]
    return len({tuple(map(id, layer.parameters(recurse=False))) for layer in layers}) == 1


def write(path: Path, models: nn.ModuleDict) -> dict:
    manifest = manifest_of(models)
    return write_results(path, models, manifest, statistics_of(manifest))


def same_state(models, others) -> bool:
    return all(
        torch.equal(value, others[name].state_dict()[key])
        for name, model in models.items()
        for key, value in model.state_dict().items()
    )


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, and every folder."""
    return {str(f.relative_to(path)): f.read_bytes() if f.is_file() else b"" for f in sorted(path.rglob("*"))}


def assert_loaded_as_written(path, models) -> None:
    """Into modules as they are built, and into modules that were loaded before: the same state, bytes and outputs."""
    loaded = load_merged(path, fresh_models(), verify=True)
    assert same_state(models, loaded) and distinct_bytes(loaded) == distinct_bytes(models)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded["b_x"](images), models["b_x"].eval()(images))
    again = load_merged(path, loaded)
    assert same_state(models, again) and torch.equal(again["b_x"](images), models["b_x"](images))


def assert_plain_files_compute_the_same(path, models) -> None:
    """weights/<task>.pt, loaded into modules as they are built."""
    images = torch.rand(2, 3, 16, 16)
    for name in ("a_x", "b_x"):
        plain = fresh_models()[name].eval()
        plain.load_state_dict(torch.load(path / "weights" / f"{name}.pt", weights_only=True))
        assert torch.allclose(plain(images), models[name].eval()(images), atol=1e-4)
