"""What libraries cost where the results store has code of its own; docs/architecture.md says what was decided.

    python -m benchmarks.store_libraries [codec checksum schema build]    about four minutes for all of them

Workloads are those of benchmarks/load_merged.py, one thread, files in the disk's cache, medians of CPU time
(process_time). `checksum` needs xxhash, `schema` needs jsonschema and fastjsonschema (pip install; the project does not
use them). Prints a table for each part.
"""

import argparse
import gc
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from benchmarks.load_merged import MIB, every_byte, modules_of, write_workload
from gemel.console.tables import table
from gemel.results_store import files, tensors, write
from gemel.results_store.load import build_empty, load_merged
from gemel.results_store.manifest import read_manifest, read_result
from gemel.results_store.schema import entry_problems
from gemel.results_store.tensors import checksum, open_store, raw_bytes, read_tensors, store_chunks
from model_architectures import names, rebuild

REPEATS = 9
LOADED = {"4 x resnet50": ("resnet50", 4), "4 x vgg16": ("vgg16", 4)}
Way = Callable[[dict[str, nn.Module]], object]  # of modules to load into, which are new ones every time


def medians(path: Path, ways: dict[str, Way]) -> dict[str, float]:
    """Median CPU milliseconds of each way; the ways take turns, so that a disturbance does not fall on one alone."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, act in ways.items():
            modules = modules_of(path)
            gc.collect()
            began = time.process_time()
            result = act(modules)
            seconds[name].append(time.process_time() - began)
            del result, modules
    return {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}  # the first one warms up


def print_rows(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    print(f"\n{title}\n{table(header, rows)}", flush=True)


def workloads(folder: Path, wanted: dict[str, tuple[str, int]]) -> Iterator[tuple[str, Path]]:
    """(title, results folder) of each, written when it is first asked for."""
    for title, (architecture, num_models) in wanted.items():
        path = folder / title.replace(" ", "")
        if not path.exists():
            write_workload(path, architecture, num_models)
        yield title, path


# ---- the safetensors codec ------------------------------------------------------------------------------


def library_tensors(store: tensors.Store, keys: list[str], record: dict) -> dict[str, Tensor]:
    """read_tensors on safe_open."""
    with safe_open(store.file, framework="pt") as opened:
        found = {key: opened.get_tensor(key) for key in keys}
    assert all(checksum(raw_bytes(value)) == record["checksums"][key] for key, value in found.items())
    return found


def library_write(target: Path, values: dict[str, Tensor]) -> str:
    """files.stage on save_file: made readable, synced, and read again for its sha256."""
    save_file(values, target)
    umask = os.umask(0)
    os.umask(umask)
    target.chmod(0o666 & ~umask)
    with open(target, "r+b") as file:
        os.fsync(file.fileno())
    return files.sha256_of(target)


def print_codec(folder: Path) -> None:
    for title, path in workloads(folder, LOADED):
        print_reading(title, path)
        print_writing(folder, title, path)


def print_writing(folder: Path, title: str, path: Path) -> None:
    values = {key: value.clone() for key, value in load_file(read_result(path)[1].file).items()}
    ways: dict[str, Callable[[], object]] = {
        "files.stage, store_chunks": lambda: files.stage(folder / "own.tmp", store_chunks(values)),
        "safetensors.torch.save_file": lambda: library_write(folder / "library.tmp", values),
    }
    shown = [(name, *written(act)) for name, act in ways.items()]
    print_rows(f"writing {title}, synced, with sha256", ("way", "wall s", "CPU s", "peak grows, MiB"), shown)


def print_reading(title: str, path: Path) -> None:
    manifest, store = read_result(path)
    keys, record = list(store.entries), manifest["store"]

    def load_with_library(modules: dict[str, nn.Module]) -> object:
        with mock.patch("gemel.results_store.load.read_tensors", library_tensors):
            return load_merged(path, modules)

    ways: dict[str, Way] = {
        "safetensors alone, every byte": lambda _: every_byte(path),
        "open_store: header by safetensors, its sha256": lambda _: open_store(store.file),
        "read_tensors: own map": lambda _: read_tensors(store, keys, record),
        "read_tensors on safe_open.get_tensor": lambda _: library_tensors(store, keys, record),
        "load_merged: own map": lambda modules: load_merged(path, modules),
        "load_merged on safe_open.get_tensor": load_with_library,
    }
    found = medians(path, ways)
    base = found["safetensors alone, every byte"]
    rows = [(name, f"{ms:.1f}", f"{ms / base:.2f}") for name, ms in found.items()]
    print_rows(f"reading {title}: {len(keys)} tensors", ("way", "CPU ms", "x every byte"), rows)


def written(act: Callable[[], object]) -> tuple[str, str, str]:
    """(wall seconds, CPU seconds, growth of the peak of resident memory) of writing, the least of five."""
    wall, cpu, grown = [], [], []
    for _ in range(5):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is reset
        before, began, cpu_began = peak_memory(), time.perf_counter(), time.process_time()
        act()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
        grown.append(peak_memory() - before)
    return f"{min(wall):.2f}", f"{min(cpu):.2f}", f"{min(grown) / MIB:.0f}"


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---- the checksum ---------------------------------------------------------------------------------------


def print_checksums(folder: Path) -> None:
    xxhash = importlib.import_module("xxhash")
    hashes: dict[str, Callable[..., str]] = {
        "checksum (sums of blocks)": checksum,
        "xxhash.xxh3_64": lambda data, *_: xxhash.xxh3_64_hexdigest(data),
        "xxhash.xxh64": lambda data, *_: xxhash.xxh64_hexdigest(data),
    }
    for title, (architecture, num_models) in LOADED.items():
        ways: dict[str, Way] = {}
        for number, (name, function) in enumerate(hashes.items()):
            path = folder / f"{architecture}-{number}"
            with mock.patch.object(write, "checksum", function):
                write_workload(path, architecture, num_models)
            share_store(folder / f"{architecture}-0", path)
            ways[name] = partial(load_with, path, function)
        found = medians(path, {"safetensors alone, every byte": partial(load_alone, path), **ways})
        base = found["safetensors alone, every byte"]
        rows = [(name, f"{ms:.1f}", f"{ms / base:.2f}") for name, ms in found.items()]
        print_rows(f"load_merged of {title} by checksum", ("checksum", "CPU ms", "x every byte"), rows)


def share_store(first: Path, other: Path) -> None:
    """Equal stores become one file: how a file lies in the disk's cache changes what it costs to map it."""
    if first != other:
        (store,) = other.glob("merged-*.safetensors")
        store.unlink()
        os.link(first / store.name, store)


def load_alone(path: Path, _: dict[str, nn.Module]) -> object:
    return every_byte(path)


def load_with(path: Path, function: Callable[..., str], modules: dict[str, nn.Module]) -> object:
    """load_merged with another checksum."""
    with mock.patch.object(tensors, "checksum", function):
        return load_merged(path, modules)


# ---- the schema of the manifest -------------------------------------------------------------------------

SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
BYTES = {"type": "integer", "minimum": 0, "exclusiveMaximum": 1 << 62}
ACCURACY = {"type": "number", "minimum": 0, "maximum": 1}
MAYBE_ACCURACY = {"anyOf": [ACCURACY, {"type": "null"}]}
STORE_KEY = "^[0-9a-f]{32}(\\.[0-9]{1,9})?$"
NAME_IN_STORE = {"type": "string", "pattern": STORE_KEY}
TASK = {
    "type": "object",
    "required": ["task", "architecture", "unmerged_acc", "measured_unmerged_acc", "target_acc", "merged_acc", "met"],
    "properties": {
        "task": {"enum": ["image_classification", "object_detection"]},
        "architecture": {"type": ["object", "null"]},
        **dict.fromkeys(("unmerged_acc", "measured_unmerged_acc", "target_acc", "merged_acc"), ACCURACY),
        **dict.fromkeys(("test_acc", "unmerged_test_acc"), MAYBE_ACCURACY),
        "class_names": {"type": ["array", "null"], "items": {"type": "string"}},
        "frozen_normalisation": {"enum": [None, "kept", "refitted"]},
        "met": {"type": "boolean"},
    },
}
OCCURRENCE = {
    "type": "object",
    "required": ["task", "layer"],
    "properties": {"task": {"type": "string"}, "layer": {"type": "string"}},
}
GROUP = {
    "type": "object",
    "required": ["signature", "bytes", "occurrences"],
    "properties": {
        "signature": {"type": "string", "minLength": 1},
        "bytes": BYTES,
        "rank": BYTES,
        "adapter_bytes": BYTES,
        "affine_bytes": {**BYTES, "minimum": 1},
        "occurrences": {"type": "array", "minItems": 2, "items": OCCURRENCE},
    },
}
STORE = {
    "type": "object",
    "required": ["file", "bytes", "header_sha256", "checksums"],
    "properties": {
        "file": {"type": "string", "pattern": "^merged-[0-9a-f]{16}\\.safetensors$"},
        "bytes": BYTES,
        "header_sha256": SHA256,
        "checksum_block": {"enum": [4096, 16384]},
        "checksums": {
            "type": "object",
            "patternProperties": {STORE_KEY: {"type": "string", "pattern": "^[0-9a-f]{16}$"}},
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "required": ["format", "normalisation", "tasks", "shared_layers", "tensors", "store", "files", "memory", "run"],
    "properties": {
        "format": {"const": 1},
        "normalisation": {"const": "private"},
        "tasks": {
            "type": "object",
            "minProperties": 1,
            "patternProperties": {"^[A-Za-z0-9][A-Za-z0-9_-]*$": TASK},
            "additionalProperties": False,
        },
        "shared_layers": {"type": "array", "items": GROUP},
        "tensors": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": {"type": "string", "pattern": STORE_KEY},
            },
        },
        "store": STORE,
        "files": {"type": "object", "additionalProperties": SHA256},
        "file_bytes": {"type": "object", "additionalProperties": BYTES},
        "memory": {"type": "object", "additionalProperties": BYTES},
        "run": {"type": "object"},
    },
}


def print_schema(folder: Path) -> None:
    validator = importlib.import_module("jsonschema").Draft202012Validator(SCHEMA)
    compiled = importlib.import_module("fastjsonschema").compile(SCHEMA)
    for title, path in workloads(folder, {**LOADED, "20 x resnet50": ("resnet50", 20)}):
        print_checking(title, path, validator, compiled)


def print_checking(title: str, path: Path, validator: Any, compiled: Callable) -> None:
    manifest = read_manifest(path)
    assert not [*entry_problems(manifest), *validator.iter_errors(manifest)] and compiled(manifest)
    ways: dict[str, Way] = {
        "load_merged, all of it": lambda modules: load_merged(path, modules),
        "read_manifest, all of it": lambda _: read_manifest(path),
        "schema.entry_problems": lambda _: list(entry_problems(manifest)),
        "jsonschema": lambda _: list(validator.iter_errors(manifest)),
        "fastjsonschema": lambda _: compiled(manifest),
    }
    num_names = sum(map(len, manifest["tensors"].values()))
    rows = [(name, f"{ms:.1f}") for name, ms in medians(path, ways).items()]
    print_rows(f"manifest of {title}: {num_names} names of tensors", ("check", "CPU ms"), rows)


# ---- building without initialisation --------------------------------------------------------------------


def built_on_meta(architecture: dict) -> nn.Module:
    with torch.device("meta"):
        return rebuild(architecture).to_empty(device="cpu")


def built_with_a_hook(architecture: dict) -> nn.Module:
    """As accelerate's init_empty_weights: parameters move to the meta device as they are registered."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return parameter if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may return a parameter
    try:
        return rebuild(architecture)
    finally:
        hook.remove()


def computed(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a builder computes and a state dict lacks: attributes, and buffers that are not persistent."""
    saved = set(model.state_dict())
    found = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith(("_parameters", "_buffers", "_modules")):
                found.update((f"{path}.{attribute}.{name}", tensor) for name, tensor in nested(value))
    return found


def nested(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from nested(item, f"{name}.{key}")


def is_right(model: nn.Module, whole: nn.Module) -> bool:
    found, wanted = computed(model), computed(whole)
    return found.keys() == wanted.keys() and all(
        not found[name].is_meta and torch.equal(found[name], wanted[name]) for name in wanted
    )


def print_building(folder: Path) -> None:
    ways: dict[str, Callable[[dict], nn.Module]] = {
        "build_empty": lambda architecture: build_empty(architecture, 10**6),
        'torch.device("meta"), to_empty': built_on_meta,
        "registration hook alone": built_with_a_hook,
        "rebuild, with random weights": rebuild,
    }
    seconds = dict.fromkeys(ways, 0.0)
    wrong: dict[str, list[str]] = {name: [] for name in ways}
    for name in names():
        architecture = {"name": name, "num_classes": 7, "kwargs": {}}
        whole = rebuild(architecture)
        for way, make in ways.items():
            times = []
            try:
                for _ in range(1 if make is rebuild else 3):
                    began = time.process_time()
                    model = make(architecture)
                    times.append(time.process_time() - began)
            except ValueError:
                wrong[way].append(name)
            else:
                seconds[way] += min(times)
                wrong[way] += [] if is_right(model, whole) else [name]
    rows = [(way, f"{seconds[way]:.1f}", str(len(wrong[way])), ", ".join(wrong[way][:4])) for way in ways]
    header = ("way", "CPU s", "wrong or refused", "such as")
    print_rows(f"building all {len(names())} architectures", header, rows)


PARTS = {"codec": print_codec, "checksum": print_checksums, "schema": print_schema, "build": print_building}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parts = parser.parse_args(arguments).parts
    if unknown := set(parts) - set(PARTS):
        parser.error(f"parts: got {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            PARTS[part](Path(folder))


if __name__ == "__main__":
    main()
