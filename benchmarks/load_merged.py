"""What load_merged costs, against reading the same distinct bytes with safetensors alone.

    python benchmarks/load_merged.py [--models 4] [--architectures resnet50 vgg16] [--repeats 9]    about two minutes

k models of one architecture, all identical layers tied, are written once; then every way to read them is timed in turn,
`repeats` times over, in one process with one thread and the file in the disk's cache. CPU time (process_time, kernel
included), medians. Memory is the growth of proportional set size in a fresh process for each way. Prints two tables.
"""

import argparse
import gc
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open
from torch import nn

from gemel.console.tables import table
from gemel.results_store.load import build_empty, load_merged
from gemel.results_store.manifest import read_manifest
from gemel.results_store.write import write_results
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import tie
from model_architectures import build, rebuild

NUM_CLASSES = 1000
PAGE = 4096
MIB = 1 << 20


def write_workload(path: Path, architecture: str, num_models: int) -> None:
    """A result of k models with everything tied that can be."""
    torch.manual_seed(0)
    models = nn.ModuleDict({f"task{i}_{architecture}": build(architecture, NUM_CLASSES) for i in range(num_models)})
    groups = find_groups(models)
    tie(models, groups, "first")
    merged, saved = distinct_bytes(models), saved_bytes(groups)
    record = {"unmerged_acc": 1.0, "measured_unmerged_acc": 1.0, "target_acc": 0.9, "merged_acc": 1.0, "met": True}
    manifest = {
        "tasks": {
            name: {"task": "image_classification", "architecture": model.architecture, **record}
            for name, model in models.items()
        },
        "shared_layers": [
            {"signature": g.signature, "bytes": g.bytes, "occurrences": [o._asdict() for o in g.occurrences]}
            for g in groups
        ],
        "memory": {
            "unmerged_bytes": merged + saved,
            "merged_bytes": merged,
            "saved_bytes": saved,
            "optimal_saved_bytes": saved,
        },
        "run": {},
    }
    write_results(path, dict(models.items()), manifest, {"history": []})


# ---- the ways to read -----------------------------------------------------------------------------------


def safetensors_tensors(path: Path) -> list[torch.Tensor]:
    file = str(path / read_manifest_store(path))
    with safe_open(file, framework="pt") as store:
        return [store.get_tensor(key).reshape(-1).view(torch.uint8) for key in store.keys()]  # noqa: SIM118


def read_manifest_store(path: Path) -> str:
    (file,) = path.glob("merged-*.safetensors")
    return file.name


def every_page(path: Path) -> list[torch.Tensor]:
    tensors = safetensors_tensors(path)
    for tensor in tensors:
        tensor[::PAGE].sum()
    return tensors


def every_byte(path: Path) -> list[torch.Tensor]:
    tensors = safetensors_tensors(path)
    for tensor in tensors:
        tensor[: tensor.numel() // 8 * 8].view(torch.int64).sum()
    return tensors


def state_dicts(path: Path) -> dict[str, nn.Module]:
    """What everybody does: k models, each with a file and weights of its own."""
    models = {}
    for task, record in read_manifest(path)["tasks"].items():
        models[task] = rebuild(record["architecture"])
        models[task].load_state_dict(torch.load(path / "weights" / f"{task}.pt", weights_only=True))
    return models


def modules_of(path: Path) -> dict[str, nn.Module]:
    tasks, tensors = read_manifest(path)["tasks"], read_manifest(path)["tensors"]
    return {task: build_empty(record["architecture"], len(tensors[task])) for task, record in tasks.items()}


def ways(path: Path) -> dict[str, Callable[[dict], object]]:
    """By name, as functions of the modules to be handed in."""
    return {
        "safetensors alone, one byte of every page": lambda modules: every_page(path),
        "safetensors alone, every byte": lambda modules: every_byte(path),
        "load_merged into modules handed in": lambda modules: load_merged(path, modules),
        "load_merged from the architectures": lambda modules: load_merged(path),
        "of that, building the models": lambda modules: modules_of(path),
        "load_merged, verify=True, from architectures": lambda modules: load_merged(path, verify=True),
    }


def timed(path: Path, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way; the ways take turns, so that a disturbance does not fall on one alone.

    No way is charged for letting go of what was read before: modules handed in are new ones every time.
    """
    all_ways = ways(path)
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    for _ in range(repeats + 1):
        for name, read in all_ways.items():
            modules = modules_of(path)
            gc.collect()
            began = time.process_time()
            result = read(modules)
            seconds[name].append(time.process_time() - began)
            del result, modules
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first one warms up


# ---- memory, in a fresh process -------------------------------------------------------------------------

MEMORY_WAYS: dict[str, Callable[[Path], object]] = {
    "safetensors alone, every byte": every_byte,
    "load_merged into modules handed in": lambda path: load_merged(path, modules_of(path)),
    "load_merged from the architectures": load_merged,
    "k state dicts, torch.load": state_dicts,
}


def proportional_set_size() -> int:
    found = re.search(r"^Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None, "/proc/self/smaps_rollup has no line Pss"
    return 1024 * int(found[1])


def print_growth(way: str, small: Path, path: Path) -> None:
    """In the child process: grows once for what the libraries need, and then for the workload."""
    warm = MEMORY_WAYS[way](small)
    gc.collect()
    before = proportional_set_size()
    result = MEMORY_WAYS[way](path)
    gc.collect()
    print(proportional_set_size() - before)
    del warm, result


def growth(way: str, small: Path, path: Path) -> int:
    command = [sys.executable, __file__, "--grow", way, str(small), str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# ---- the tables -----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--architectures", nargs="+", default=["resnet50", "vgg16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--grow", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if flags.grow:
        print_growth(flags.grow[0], *map(Path, flags.grow[1:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        write_workload(small, "squeezenet1_1", 2)
        for architecture in flags.architectures:
            path = Path(folder) / architecture
            write_workload(path, architecture, flags.models)
            print_tables(path, small, architecture, flags.models, flags.repeats)


def print_tables(path: Path, small: Path, architecture: str, num_models: int, repeats: int) -> None:
    memory = read_manifest(path)["memory"]
    distinct, whole = memory["merged_bytes"], memory["unmerged_bytes"]
    print(f"\n{num_models} x {architecture}: {distinct / MIB:.1f} MiB distinct of {whole / MIB:.1f} MiB")
    seconds = timed(path, repeats)
    pages, data = seconds["safetensors alone, one byte of every page"], seconds["safetensors alone, every byte"]
    rows = [(name, f"{1e3 * s:.1f}", f"{s / data:.2f}", f"{s / pages:.2f}") for name, s in seconds.items()]
    print(table(("way to read, file in cache", "CPU ms", "x every byte", "x every page"), rows), end="\n\n", flush=True)
    growths = []
    for way in MEMORY_WAYS:
        grown = growth(way, small, path)
        growths.append((way, f"{grown / MIB:.1f}", f"{grown / distinct:.2f}"))
    print(table(("way to read, fresh process", "PSS grows, MiB", "x distinct bytes"), growths), flush=True)


if __name__ == "__main__":
    main()
