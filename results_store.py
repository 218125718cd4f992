"""The results folder: every distinct tensor once, a manifest that says which model uses which, and loading it back.

    merged-<sha>.safetensors   the store; keys are named by content, one key per tensor object
    weights/<task>.pt          full state_dict of every task, for whoever wants plain PyTorch files
    workload_stats.json        memory saved over time
    merged.json                the manifest, replaced last: a folder without it is not a result

Two state-dict entries with the same store key are one tensor in memory: that alone is the record of what is shared.
Files are written under a temporary name, synced and renamed; a new store never replaces an old one, which is removed
only after the manifest has been switched.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from model_architectures import rebuild
from sharing.memory import named_tensors

FORMAT = 1
MANIFEST = "merged.json"
STATISTICS = "workload_stats.json"
STORE_PATTERN = re.compile(r"merged-[0-9a-f]{16}\.safetensors")
WEIGHTS_PATTERN = re.compile(r"weights/[A-Za-z0-9][A-Za-z0-9_-]*\.pt")
TEMPORARY = ".tmp"


class ResultsError(ValueError):
    """A results folder cannot be used; the message names the file."""


# ---- writing --------------------------------------------------------------------------------------------


def write_results(path: str | Path, models: Mapping[str, nn.Module], manifest: dict, statistics: dict) -> dict:
    """Writes a complete result and returns the manifest as written (with `format`, `tensors` and `files` filled in).

    Until the last step, the replacement of merged.json, a reader of the folder sees the result that was there before.
    """
    path = Path(path)
    (path / "weights").mkdir(parents=True, exist_ok=True)
    keys, tensors = name_by_content(models)
    files = {}
    store_digest, store_name = _write_store(path, tensors)
    files[store_name] = store_digest
    for task, task_keys in keys.items():
        state = {key: tensors[store_key] for key, store_key in task_keys.items()}
        name = f"weights/{task}.pt"
        files[name] = _replace(path / name, lambda temporary, state=state: torch.save(state, temporary))
    files[STATISTICS] = _replace_json(path / STATISTICS, statistics)
    manifest = {"format": FORMAT, **manifest, "tensors": keys, "files": files}
    before = read_manifest(path)["files"] if has_results(path) else {}
    _replace_json(path / MANIFEST, manifest)
    _remove_stale(path, before, files)
    return manifest


def update_run(path: str | Path, run: dict) -> dict:
    """Replaces the `run` part of the manifest, atomically, and returns the manifest."""
    manifest = {**read_manifest(path), "run": run}
    _replace_json(Path(path) / MANIFEST, manifest)
    return manifest


def name_by_content(models: Mapping[str, nn.Module]) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """({task: {state-dict key: store key}}, {store key: CPU tensor}); one store key per tensor object.

    Distinct objects of equal content (two zero biases, say) get a suffix, so that loading never ties what was not tied.
    """
    key_of: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    keys: dict[str, dict[str, str]] = {}
    for task, model in models.items():
        keys[task] = {}
        for name, tensor in named_tensors(model).items():
            if id(tensor) not in key_of:
                values = tensor.detach().to("cpu").contiguous()
                key_of[id(tensor)] = _unused(_content_name(values), tensors)
                tensors[key_of[id(tensor)]] = values
            keys[task][name] = key_of[id(tensor)]
    return keys, tensors


def _content_name(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _unused(name: str, taken: Mapping) -> str:
    copies = 0
    while (key := name if not copies else f"{name}.{copies}") in taken:
        copies += 1
    return key


def _write_store(path: Path, tensors: dict[str, Tensor]) -> tuple[str, str]:
    # Cloned, because safetensors refuses tensors that overlap in memory, as views of one buffer may.
    blob = save({key: tensor.clone() for key, tensor in tensors.items()})
    name = f"merged-{hashlib.sha256(blob).hexdigest()[:16]}.safetensors"
    return _replace(path / name, lambda temporary: temporary.write_bytes(blob)), name


def _replace(target: Path, write) -> str:
    temporary = target.with_name(target.name + TEMPORARY)
    try:
        write(temporary)
        digest = file_sha256(temporary)
        _commit(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest


def _replace_json(target: Path, value: dict) -> str:
    text = json.dumps(value, indent=1)
    return _replace(target, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def _commit(temporary: Path, target: Path) -> None:
    """fsync, permissions by the user's umask (safetensors writes 0600), rename, fsync of the folder."""
    umask = os.umask(0)
    os.umask(umask)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_stale(path: Path, before: Iterable[str], now: Iterable[str]) -> None:
    """Removes what the replaced manifest named and this one does not, and stores and leftovers of a killed run.

    Only names that are ours: whatever else a user keeps in the folder stays.
    """
    stores = {file.name for file in path.glob("merged-*.safetensors") if STORE_PATTERN.fullmatch(file.name)}
    weights = {name for name in before if WEIGHTS_PATTERN.fullmatch(name)}
    leftovers = {name + TEMPORARY for name in (*now, *weights, *stores, MANIFEST)}
    for name in (stores | weights | leftovers) - set(now):
        (path / name).unlink(missing_ok=True)


def foreign_files(path: str | Path, tasks: Iterable[str]) -> list[str]:
    """Files that a result would overwrite although no run of ours wrote them; ours write the store first."""
    path = Path(path)
    if has_results(path) or any(STORE_PATTERN.fullmatch(file.name) for file in path.glob("merged-*.safetensors")):
        return []
    names = [STATISTICS, *(f"weights/{task}.pt" for task in tasks)]
    return [name for name in names if (path / name).exists()]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- reading --------------------------------------------------------------------------------------------


def has_results(path: str | Path) -> bool:
    """Whether the folder holds a result, that is, a manifest."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path) -> dict:
    """The manifest of a results folder. Raises ResultsError if there is none or its format is unknown."""
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{file}: not found, so this folder holds no result") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{file}: cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ResultsError(f"{file}: format: got {_format_of(manifest)!r}; allowed: {FORMAT}")
    return manifest


def load_merged(
    results_path: str | Path, models: Mapping[str, nn.Module] | None = None, device: torch.device | str = "cpu"
) -> dict[str, nn.Module]:
    """The merged models by task, in eval mode, in which shared layers *are* one parameter object.

    models: modules to load into, by task; without them each is rebuilt from the architecture in the manifest.
    Ties survive `.to()`, also when each model is moved by itself. Raises ResultsError if the folder is not a valid
    result, if an architecture is unknown and no model was handed in, or if tensors do not fit the model.
    """
    manifest = read_manifest(results_path)
    modules = dict(models) if models is not None else _rebuild_all(manifest, results_path)
    if missing := sorted(set(manifest["tensors"]) - set(modules)):
        raise ResultsError(f"{results_path}: no model was handed in for {', '.join(missing)}")
    modules = {task: modules[task] for task in manifest["tensors"]}
    stored = read_store(results_path, manifest, device)
    for task, model in modules.items():
        _check_fit(task, model, manifest["tensors"][task], stored)
    loaded: dict[str, Tensor] = {}
    for task, model in modules.items():
        model.to(device)  # what is not in the state dict, such as buffers that are not saved
        for name, tensor in named_tensors(model).items():
            key = manifest["tensors"][task][name]
            if key not in loaded:
                loaded[key] = _like(tensor, stored[key])
            _place(model, name, loaded[key])
        model.eval()
    return modules


def read_store(results_path: str | Path, manifest: dict, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Store key -> tensor, after the store's sha256 was found to be the manifest's."""
    names = [name for name in manifest["files"] if STORE_PATTERN.fullmatch(name)]
    if len(names) != 1:
        raise ResultsError(f"{Path(results_path) / MANIFEST}: files: got {len(names)} stores; allowed: 1")
    file = Path(results_path) / names[0]
    if not file.is_file():
        raise ResultsError(f"{file}: the manifest names this store, but it is missing")
    if file_sha256(file) != manifest["files"][names[0]]:
        raise ResultsError(f"{file}: its sha256 is not the one in the manifest: the file is damaged")
    with safe_open(file, framework="pt", device=str(device)) as store:
        return {key: store.get_tensor(key) for key in store.keys()}  # noqa: SIM118 (no iterator)


def _rebuild_all(manifest: dict, results_path: str | Path) -> dict[str, nn.Module]:
    unknown = [task for task, entry in manifest["tasks"].items() if entry["architecture"] is None]
    if unknown:
        raise ResultsError(
            f"{results_path}: the manifest holds no architecture for {', '.join(unknown)}, which were not built by "
            "model_architectures.build: hand the models in, load_merged(path, models={task: module, ...})"
        )
    return {task: rebuild(entry["architecture"]) for task, entry in manifest["tasks"].items()}


def _check_fit(task: str, model: nn.Module, keys: Mapping[str, str], stored: Mapping[str, Tensor]) -> None:
    own = named_tensors(model)
    problems = [f"{name} is missing in the results" for name in own if name not in keys]
    problems += [f"{name} is unknown to the model" for name in keys if name not in own]
    for name in keys:
        if keys[name] not in stored:
            problems.append(f"{name}: key {keys[name]} is missing in the store")
        elif name in own and own[name].shape != stored[keys[name]].shape:
            problems.append(f"{name}: got {list(stored[keys[name]].shape)}, the model has {list(own[name].shape)}")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ResultsError(f"{task}: the results do not fit the model: {listed}")


def _like(own: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else values


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)


def _format_of(manifest: object) -> object:
    return manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
