"""The checks of `python -m gemel verify`: one line each; nothing in the folder is changed.

ok: as it must be. skip: could not be checked, and why. FAIL: the result is damaged, or contradicts its manifest.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gemel.results_store import files
from gemel.results_store.checkpoint import open_checkpoint
from gemel.results_store.files import ResultsError, first_line, sha256_of, size_of
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import adapted_layers, read_manifest, read_result
from gemel.results_store.precision import loaded_dtype, plain_tensors, precision_of, unjudged
from gemel.results_store.tensors import Store, entries_as_loaded, raw_bytes, read_tensors, sizes_with_scales
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.precision import weights_of
from gemel.sharing.signatures import has_signature

OK, SKIP, FAIL = "ok", "skip", "FAIL"
ACCURACY_MARGIN = 0.005  # another device or number of threads rounds differently, and an image or two may flip
INTERRUPTED = "of a commit that was interrupted; the next run rebuilds it"


class Check(NamedTuple):
    """One line of the output."""

    status: str
    what: str


def print_checks(checks: Iterable[Check]) -> int:
    """Prints each check as soon as it is done; returns 1 if any failed, else 0."""
    failed = False
    for check in checks:
        print(f"{check.status:4}  {check.what}", flush=True)
        failed |= check.status == FAIL
    return int(failed)


class DatasetMissing(Exception):
    """A task cannot be evaluated, because its dataset was not found."""


class Evaluation(NamedTuple):
    """How a task of the results folder is evaluated again."""

    model: nn.Module  # to load into
    accuracy: Callable[[nn.Module, Mapping], float]  # (loaded model, manifest); may raise DatasetMissing


def verify(
    results_path: str | Path,
    evaluations: Mapping[str, Evaluation] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Check]:
    """Checks a results folder; evaluations: by task, for those that are evaluated again. Raises nothing."""
    return _checks(Path(results_path).expanduser(), evaluations or {}, torch.device(device))


def _checks(path: Path, evaluations: Mapping[str, Evaluation], device: torch.device) -> Iterator[Check]:
    try:
        manifest = read_manifest(path)
    except ResultsError as error:
        yield Check(FAIL, str(error))
        return
    sharing = f"{len(manifest['tasks'])} tasks, {len(manifest['shared_layers'])} shared layers"
    yield Check(OK, f"{path / files.MANIFEST}: valid, {sharing}")
    damaged: set[str] = set()  # names of files whose sha256 is not the one in the manifest
    yield from _file_checks(path, manifest, damaged)
    yield from _other_files(path, manifest)
    try:
        store = read_result(path)[1]
    except ResultsError as error:
        yield Check(FAIL, str(error))
        store = None
    if store is None or store.file.name in damaged:
        yield Check(SKIP, "tensors, ties and accuracies: the manifest or the store is damaged")
        return
    for task in manifest["tasks"]:
        yield _same_tensors(path, manifest, store, task, damaged)
    yield from _loaded_checks(path, manifest, store, evaluations, device)


# ---- files ----------------------------------------------------------------------------------------------


def _file_checks(path: Path, manifest: dict, damaged: set[str]) -> Iterator[Check]:
    pending = _pending(path)
    for name, digest in manifest["files"].items():
        size = size_of(path / name)
        found = None if size is None else sha256_of(path / name)
        if found == digest:
            yield Check(OK, f"{path / name}: sha256")
            continue
        damaged.add(name)
        if found is not None and found == pending.get(name):
            yield Check(OK, f"{path / name}: {INTERRUPTED}")
        elif found is None:
            yield Check(FAIL, f"{path / name}: the manifest names it, but it is missing")
        else:
            got = "" if size == manifest["file_bytes"][name] else f" ({size} bytes of {manifest['file_bytes'][name]})"
            yield Check(FAIL, f"{path / name}: its sha256 is not the one in the manifest: the file is damaged{got}")


def _pending(path: Path) -> dict[str, str]:
    """The files of a commit under way, or of one that was interrupted, by their sha256."""
    if not (path / files.PENDING).is_file():
        return {}
    try:
        return read_manifest(path, files.PENDING)["files"]
    except ResultsError:  # cut short while it was written; then no other file had been renamed yet
        return {}


def _other_files(path: Path, manifest: dict) -> Iterator[Check]:
    """Files in the folder that are not in the manifest."""
    left = {*files.leftovers(path), *(set(files.stores(path)) - set(manifest["files"]))}
    left |= {name for name in manifest["stale"] if size_of(path / name) is not None}
    for name in sorted(left):
        yield Check(OK, f"{path / name}: left by a run that was interrupted; the next one removes it")
    if size_of(path / files.IN_FLIGHT) is not None:
        yield _checkpoint_check(path, manifest)
    known = {*left, *manifest["files"], files.MANIFEST, files.IN_FLIGHT, files.LOG, files.EXAMPLES, files.REPORT}
    present = [*path.iterdir(), *((path / files.WEIGHTS).iterdir() if (path / files.WEIGHTS).is_dir() else ())]
    others = {str(file.relative_to(path)) for file in present} - known - {files.WEIGHTS}
    for name in sorted(others):
        yield Check(SKIP, f"{str(path / name)!r}: not a file of the result; not checked")


def _checkpoint_check(path: Path, manifest: dict) -> Check:
    file = path / files.IN_FLIGHT
    try:
        bound_to, _ = open_checkpoint(file)
    except ResultsError as error:
        return Check(FAIL, str(error))
    if bound_to != manifest["store"]["file"]:
        return Check(OK, f"{file}: the round in flight of another result; the next run removes it")
    return Check(OK, f"{file}: the round in flight")


def _same_tensors(path: Path, manifest: dict, store: Store, task: str, damaged: set[str]) -> Check:
    """The .pt file holds the task's tensors, bit for bit."""
    name, keys = f"{files.WEIGHTS}/{task}.pt", manifest["tensors"][task]
    if name in damaged:
        return Check(SKIP, f"{path / name}: not compared with the store, as its sha256 is not the manifest's")
    try:
        state = torch.load(path / name, map_location="cpu", weights_only=True)
        tensors = read_tensors(store, keys.values(), manifest["store"])
    except ResultsError as error:
        return Check(FAIL, str(error))
    except Exception as error:  # a damaged file can make the unpickler raise nearly anything
        return Check(FAIL, f"{path / name}: cannot be read: {first_line(error)}")
    layers = adapted_layers(manifest["shared_layers"], task)
    stored = plain_tensors({name: tensors[key] for name, key in keys.items()}, layers, manifest)
    if not isinstance(state, dict) or set(state) != set(stored):
        return Check(FAIL, f"{path / name}: its names are not those of the manifest")
    for key, tensor in stored.items():
        if not _same_bits(state[key], tensor):
            return Check(FAIL, f"{path / name}: {key!r} is not the tensor in the store")
    folded = f", {len(layers)} layers with their adapters, scales and biases folded in" if layers else ""
    return Check(OK, f"{path / name}: {len(stored)} tensors, all as in the store{folded}")


def _same_bits(value: object, stored: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.shape != stored.shape or value.dtype != stored.dtype:
        return False
    return raw_bytes(value.contiguous()) == raw_bytes(stored)


# ---- loaded models --------------------------------------------------------------------------------------


def _loaded_checks(
    path: Path,
    manifest: dict,
    store: Store,
    evaluations: Mapping[str, Evaluation],
    device: torch.device,
) -> Iterator[Check]:
    possible = []
    for name, record in manifest["tasks"].items():
        if name in evaluations or record["architecture"] is not None:
            possible.append(name)
        else:
            yield Check(SKIP, f"{name}: not loaded: no architecture is recorded, and no --workload has the task")
    if not possible:
        return
    try:
        handed_in = {name: evaluations[name].model for name in possible if name in evaluations}
        loaded = load_merged(path, handed_in, device if evaluations else torch.device("cpu"), possible)
    except ResultsError as error:
        yield Check(FAIL, str(error))
        return
    yield _precision_check(path, manifest, loaded, device if evaluations else torch.device("cpu"))
    yield from _tie_checks(path, manifest, loaded)
    yield _bytes_check(path, manifest, store, loaded)
    for name, model in loaded.items():
        yield _evaluated(manifest, name, model, evaluations.get(name))


def _bytes_check(path: Path, manifest: dict, store: Store, loaded: Mapping[str, nn.Module]) -> Check:
    """Models hold every stored tensor once, those of 8 bits in float32."""
    keys = {key for name in loaded for key in manifest["tensors"][name].values()}
    sizes, entries = sizes_with_scales(store.entries), entries_as_loaded(store.entries)
    on_disk, in_memory = sum(sizes[key] for key in keys), distinct_bytes(loaded)
    expected = sum(math.prod(entries[key].shape, start=entries[key].dtype.itemsize) for key in keys)
    which = "all tasks" if len(loaded) == len(manifest["tasks"]) else f"{len(loaded)} tasks"
    said = f"{path}: {which}: {on_disk} bytes of tensors on disk, {in_memory} distinct bytes in memory"
    if expected != on_disk:
        said += f", {expected} with weights of 8 bits in float32"
    return Check(OK if expected == in_memory else FAIL, said)


def _precision_check(path: Path, manifest: dict, loaded: Mapping[str, nn.Module], device: torch.device) -> Check:
    """Weights are of the type that the manifest names, and compute on this device in the one they were judged in."""
    judged, dtype = precision_of(manifest), loaded_dtype(manifest)
    said = f"{path}: weights in {judged['weights']}, judged in {judged['arithmetic']} on {judged['device']}"
    if dtype != torch.float32:
        others = {p.dtype for model in loaded.values() for p in weights_of(model) if p.is_floating_point()} - {dtype}
        if others:
            return Check(FAIL, f"{said}, but loaded in {', '.join(sorted(map(str, others)))}")
    if (why := unjudged(manifest, judged["weights"], device.type)) is not None:
        return Check(SKIP, f"{path}: not run as judged: {why}")
    return Check(OK, said)


def _tie_checks(path: Path, manifest: dict, loaded: Mapping[str, nn.Module]) -> Iterator[Check]:
    """Every shared layer is the same parameter object in all its tasks; no other parameter or buffer is shared."""
    explained: set[int] = set()
    wrong: list[str] = []
    checked = 0
    for group in manifest["shared_layers"]:
        places = [(o["task"], o["layer"]) for o in group["occurrences"] if o["task"] in loaded]
        layers = [loaded[task].get_submodule(layer) for task, layer in places]
        if len(layers) < 2:
            continue
        checked += 1
        tensors = [tuple(map(id, layer.parameters(recurse=False))) for layer in layers]
        explained.update(tensors[0])
        stored_in = precision_of(manifest)["weights"]
        agree = all(has_signature(loaded[task], layer, group["signature"], stored_in) for task, layer in places)
        if len(set(tensors)) != 1 or not agree:
            wrong.append(", ".join(f"{task}: {layer}" for task, layer in places))
    for where in wrong:
        yield Check(FAIL, f"{path}: not one and the same layer after loading: {where}")
    owner: dict[int, str] = {}
    for task, model in loaded.items():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if owner.setdefault(id(tensor), task) != task and id(tensor) not in explained:
                wrong.append(name)
                yield Check(FAIL, f"{path}: {task}: {name} is shared with {owner[id(tensor)]}, but in no shared layer")
    if not wrong:
        left = len(manifest["shared_layers"]) - checked
        rest = f"; {left} more could not be loaded" if left else ""
        yield Check(OK, f"{path}: {checked} shared layers are one parameter each after loading, and only those{rest}")


def _evaluated(manifest: dict, name: str, model: nn.Module, evaluation: Evaluation | None) -> Check:
    record = manifest["tasks"][name]
    if evaluation is None:
        return Check(SKIP, f"{name}: not evaluated: no --workload with this task was given")
    try:
        accuracy = evaluation.accuracy(model, manifest)
    except DatasetMissing as error:
        return Check(SKIP, f"{name}: not evaluated: {error}")
    except Exception as error:  # the user's own code and data: whatever they raise is a check that failed
        return Check(FAIL, f"{name}: cannot be evaluated: {type(error).__name__}: {first_line(error)}")
    merged, target = record["merged_acc"], record["target_acc"]
    good = abs(accuracy - merged) <= ACCURACY_MARGIN and accuracy >= target
    said = f"{name}: reaches {accuracy:.4f}, the manifest says {merged:.4f}, target {target:.4f}"
    return Check(OK if good else FAIL, said)
