"""Loading a results folder: models built without drawing random weights, each shared layer as one parameter.

Tensors lie on a private memory map of the store, so a tensor that ten models share is in memory once, and pages that
are not written belong to the disk cache. Training in place works: it copies the pages that it writes, for this process.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from gemel.forward.arithmetic import DTYPES, run_with_weights_of
from gemel.results_store.files import ResultsError, sha256_of
from gemel.results_store.manifest import Additions, adapted_layers, read_result
from gemel.results_store.precision import loaded_dtype, precision_of, warn_if_unjudged
from gemel.results_store.tensors import Entry, entries_as_loaded, read_tensors
from gemel.sharing import adapters, affine
from gemel.sharing.adapters import (
    adapter_of,
    can_have_affine,
    give_affine,
    max_rank,
    own_modules,
    set_adapter,
    set_rank,
)
from gemel.sharing.affine import affine_of, set_affine
from gemel.sharing.memory import named_tensors
from gemel.sharing.precision import weights_of
from model_architectures import rebuild

NOT_BUILT = "they were not built by model_architectures.build"


def load_merged(
    results_path: str | Path,
    models: Mapping[str, nn.Module] | None = None,
    device: torch.device | str = "cpu",
    tasks: Collection[str] | None = None,
    verify: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, nn.Module]:
    """The merged models by task, in eval mode, in which shared layers *are* one parameter object.

    models: modules to load into, by task. A task without one is rebuilt from the architecture in the manifest, without
    code of yours and without drawing random weights first.
    device: on the CPU, tensors stay on a private memory map of the store; to any other device each distinct tensor is
    copied once.
    tasks: only these; the tensors of the others are not read.
    dtype: of the weights, torch.float32, float16 or bfloat16; None: as they are stored, which is as they were judged.
    Weights that are stored in int8 are loaded as float32, of the values that were judged.
    Models with weights of 16 bits take float32 images all the same (gemel/forward/arithmetic.py). Warns where they will
    not run as they were judged (docs/results.md, "Half precision").

    Always checked: the manifest in itself and against the store's header (sha256), the length of the store, and a
    64-bit checksum of every tensor that is loaded. That finds accidental damage: truncated files, flipped bits, tensors
    that changed places, parts of two results, and pages that changed places unless both lie within the same 16 KiB of a
    tensor. verify=True also compares the sha256 of the whole store, which finds those and changes on purpose, unless
    the manifest was rewritten as well; it takes as long as hashing all of the file. Nothing in the folder is ever
    executed, and nothing is written.

    Ties survive `.to()`, `.half()` and channels_last, also when each model is moved by itself, and a state dict that is
    saved and loaded into them; they do not survive load_state_dict(assign=True), or deepcopy of one model.
    Raises ResultsError, one line that names the file or the task, if the folder is not a valid result, if a task has no
    architecture in the manifest and no model was handed in, or if tensors do not fit the model. Models handed in are
    then unchanged.
    """
    results_path = os.path.expanduser(results_path)
    manifest, store = read_result(results_path)
    if verify and sha256_of(store.file) != manifest["files"][store.file.name]:
        raise ResultsError(f"{store.file}: its sha256 is not the one in the manifest: the file is damaged")
    wanted = _wanted(results_path, manifest, tasks)
    modules = _modules(results_path, manifest, wanted, models or {})
    device = torch.device(device)
    weights = _weights_as(results_path, manifest, dtype)
    with contextlib.ExitStack() as undo:
        slots = {task: _slots_with_adapters(task, model, manifest, undo) for task, model in modules.items()}
        is_parameter = _check_fit(manifest["tensors"], slots, entries_as_loaded(store.entries))
        keys = (key for task in wanted for key in manifest["tensors"][task].values())
        stored = read_tensors(store, keys, manifest["store"])
        undo.pop_all()
    if device.type != "cpu":
        stored = {key: tensor.to(device) for key, tensor in stored.items()}
    if dtype is not None:
        stored = _converted(stored, manifest, modules, dtype)
    placed: dict[str, Tensor] = {}
    for task, model in modules.items():
        _place(model, slots[task], manifest["tensors"][task], stored, is_parameter, placed, device)
        run_with_weights_of(model, DTYPES.get(weights, torch.float32))
    warn_if_unjudged(results_path, manifest, weights, device.type)
    return modules


def _wanted(results_path: str | Path, manifest: Mapping, tasks: Collection[str] | None) -> list[str]:
    if tasks is None:
        return list(manifest["tensors"])
    asked = [tasks] if isinstance(tasks, str) else list(tasks)
    if unknown := [task for task in asked if task not in manifest["tensors"]]:
        raise ResultsError(
            f"{results_path}: tasks: got {', '.join(map(str, unknown))}; allowed: {', '.join(manifest['tensors'])}"
        )
    return [task for task in manifest["tensors"] if task in asked]


def _weights_as(results_path: str | Path, manifest: Mapping, dtype: torch.dtype | None) -> str:
    """The name of the type that weights will have."""
    if dtype is None:
        return precision_of(manifest)["weights"]
    if dtype not in DTYPES.values():
        raise ResultsError(f"{results_path}: dtype: got {dtype}; allowed: {', '.join(map(str, DTYPES.values()))}")
    return str(dtype).removeprefix("torch.")


def _converted(
    stored: Mapping[str, Tensor], manifest: Mapping, modules: Mapping[str, nn.Module], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The stored tensors, with the weights (gemel/sharing/precision.py) in another type."""
    own, keys = loaded_dtype(manifest), set()
    for task, model in modules.items():
        weights = set(map(id, weights_of(model)))
        keys |= {manifest["tensors"][task][name] for name, t in named_tensors(model).items() if id(t) in weights}
    return {key: t.to(dtype) if key in keys and t.dtype == own else t for key, t in stored.items()}


def _modules(
    results_path: str | Path, manifest: Mapping, wanted: Iterable[str], models: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """A module per task: the one handed in, or one built from its architecture."""
    entries = manifest["tasks"]
    if unknown := [task for task in wanted if task not in models and entries[task]["architecture"] is None]:
        notes = {entries[task].get("architecture_note") or NOT_BUILT for task in unknown}
        raise ResultsError(
            f"{results_path}: no model was handed in for {', '.join(unknown)}, and the manifest holds no architecture "
            f"({'; '.join(sorted(notes))}): use load_merged(path, models={{task: module, ...}})"
        )
    modules = {}
    for task in wanted:
        try:
            num_tensors = len(manifest["tensors"][task])
            modules[task] = models[task] if task in models else build_empty(entries[task]["architecture"], num_tensors)
        except ValueError as error:
            raise ResultsError(f"{results_path}: {task}: architecture: {' '.join(str(error).split())}") from None
    return modules


# ---- building without initialisation --------------------------------------------------------------------


def build_empty(architecture: Mapping, num_tensors: int) -> nn.Module:
    """`rebuild` without the time and memory that random weights take: parameters have shapes, but no values.

    Only parameters are on the meta device, and in-place initialisation of them is skipped; buffers and plain attributes
    that the builder computes (anchors, position indices) have their values. If that fails for a builder, `rebuild` is
    called as it is. Takes a third of the time that building under `torch.device("meta")` takes, which initialises.
    num_tensors: of the state dict that will be loaded; raises ValueError for an architecture with far more parameters,
    and as `rebuild` does.
    """
    thread, made = threading.get_ident(), 0  # the hook is called for the modules of all threads

    def stand_in(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        nonlocal made
        if parameter is None or isinstance(parameter, _StandIn) or threading.get_ident() != thread:
            return parameter
        made += 1
        if made > limit:
            raise ValueError(f"more than {limit} parameters, where {num_tensors} tensors are stored")
        return _StandIn(parameter.detach().to("meta"), parameter.requires_grad)

    limit = 1000 + 4 * num_tensors  # a builder may make a head twice
    hook = register_module_parameter_registration_hook(stand_in)  # type: ignore[arg-type]  # it may return another one
    try:
        model = rebuild(architecture)
    except ValueError:
        if made > limit:
            raise
        model = None
    finally:
        hook.remove()
    if model is None or any(buffer.is_meta for buffer in model.buffers()):
        return rebuild(architecture)
    for parameter in model.parameters():
        parameter.__class__ = nn.Parameter  # as torch's lazy modules do
    return model


class _StandIn(nn.Parameter):
    """A parameter on the meta device, used while a model is built."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skips in-place functions (initialisation); others compute shapes, as some builders run the model."""
        kwargs = kwargs or {}
        if func.__name__.endswith("_") and not func.__name__.startswith("__"):
            return args[0] if args else kwargs["tensor"]
        args = tuple(map(_on_meta, args))
        return super().__torch_function__(func, types, args, {key: _on_meta(value) for key, value in kwargs.items()})


def _on_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) and not isinstance(value, _StandIn) else value


# ---- adapters, private scales and biases ----------------------------------------------------------------


def _slots_with_adapters(task: str, model: nn.Module, manifest: Mapping, undo: contextlib.ExitStack) -> "_Slots":
    """The slots of a model with the adapters, scales and biases that the manifest names, and no others."""
    slots, wanted = _slots(model), adapted_layers(manifest["shared_layers"], task)
    attributes = (f"{adapters.ATTRIBUTE}.", f"{affine.ATTRIBUTE}.")
    if wanted or any(attribute in name for name in slots.tensors for attribute in attributes):
        _set_additions(task, model, wanted, undo)
        return _slots(model)
    return slots


def _set_additions(task: str, model: nn.Module, wanted: Mapping[str, Additions], undo: contextlib.ExitStack) -> None:
    """Gives the model these adapters, scales and biases, and removes all others; `undo` restores those of before."""
    layers = dict(own_modules(model))
    for name, added in wanted.items():
        if name not in layers or added.rank > max_rank(layers[name]):
            raise ResultsError(f"{task}: {name} can have no adapter of rank {added.rank} in this model")
        if added.has_affine and not can_have_affine(layers[name]):
            raise ResultsError(f"{task}: {name} can have no private scale and bias in this model")
    for name, layer in layers.items():
        added = wanted.get(name, Additions(0, False))
        if (adapter := adapter_of(layer)) is not None or added.rank:
            undo.callback(set_adapter, layer, adapter)
            set_rank(layer, added.rank)
        if (before := affine_of(layer)) is not None or added.has_affine:
            undo.callback(set_affine, layer, before)
            give_affine(layer, added.has_affine)


# ---- fitting and placing --------------------------------------------------------------------------------


class _Slots(NamedTuple):
    """The tensors of a model's state dict, and for each the module, the dictionary and the name that hold it."""

    tensors: dict[str, Tensor]
    places: dict[str, tuple[nn.Module, dict, str]]
    modules: list[nn.Module]  # in the order of the state dict; a module that occurs twice is listed twice


def _slots(model: nn.Module) -> _Slots:
    slots = _Slots(named_tensors(model), {}, [])
    _add_places(slots, model, "")
    return slots


def _add_places(slots: _Slots, module: nn.Module, prefix: str) -> None:
    slots.modules.append(module)
    for holder in (module._parameters, module._buffers):
        for attribute in holder:
            slots.places[prefix + attribute] = module, holder, attribute
    for name, child in module._modules.items():
        if child is not None:
            _add_places(slots, child, f"{prefix}{name}.")


def _check_fit(keys: Mapping[str, Mapping], slots: Mapping[str, _Slots], entries: Mapping) -> dict[str, bool]:
    """Raises ResultsError if the stored tensors do not fit the models, judged by the store's header alone.

    Returns for each store key whether it is a parameter; the others are buffers.
    """
    is_parameter: dict[str, bool] = {}
    for task, own in slots.items():
        problems = list(_fit_problems(own, keys[task], entries, is_parameter))
        if problems:
            listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise ResultsError(f"{task}: the results do not fit the model: {listed}")
    return is_parameter


def _fit_problems(
    slots: _Slots, keys: Mapping[str, str], entries: Mapping[str, Entry], is_parameter: dict[str, bool]
) -> Iterator[str]:
    for name, tensor in slots.tensors.items():
        key = keys.get(name)
        if key is None:
            yield f"{name} is missing in the results"
            continue
        dtype, shape, _, _ = entries[key]
        parameter = type(tensor) is not Tensor and isinstance(tensor, nn.Parameter)  # the first test is the fast one
        if name not in slots.places:
            yield f"{name} is in the state dict, but no parameter or buffer of the model has that name"
        elif tensor.shape != shape:
            yield f"{name}: got {list(shape)}, the model has {list(tensor.shape)}"
        elif tensor.dtype != dtype and not (tensor.dtype.is_floating_point and dtype.is_floating_point):
            yield f"{name}: got {dtype}, the model has {tensor.dtype}"
        elif is_parameter.setdefault(key, parameter) != parameter:
            yield f"{name}: got a tensor that is a parameter in one place and a buffer in another"
    yield from (f"{name} is unknown to the model" for name in keys if name not in slots.tensors)


def _place(
    model: nn.Module,
    slots: _Slots,
    keys: Mapping[str, str],
    stored: Mapping[str, Tensor],
    is_parameter: Mapping[str, bool],
    placed: dict[str, Tensor],
    device: torch.device,
) -> None:
    """Puts the stored tensors into the model; `placed` maps each store key to its one object, for all models."""
    elsewhere = device.type != "cpu" or not all(tensor.is_cpu or tensor.is_meta for tensor in slots.tensors.values())
    for name, tensor in slots.tensors.items():
        key = keys[name]
        if key not in placed:
            placed[key] = nn.Parameter(stored[key], tensor.requires_grad) if is_parameter[key] else stored[key]
        module, holder, attribute = slots.places[name]
        if type(module).__setattr__ is nn.Module.__setattr__:
            holder[attribute] = placed[key]
        else:
            setattr(module, attribute, placed[key])  # the class overrides __setattr__, as recurrent layers do
    if elsewhere:
        model.to(device)  # what is not in the state dict, such as non-persistent buffers
    _set_eval(model, slots.modules)


def _set_eval(model: nn.Module, modules: Collection[nn.Module]) -> None:
    """model.eval(), in a fraction of its time if no module overrides a step of it."""
    overridden = not all(map(_inherits_eval, set(map(type, modules))))
    if overridden or any("train" in vars(module) or "eval" in vars(module) for module in modules):
        model.eval()
        return
    for module in modules:
        vars(module)["training"] = False


def _inherits_eval(kind: type[nn.Module]) -> bool:
    steps = ("eval", "train", "children", "named_children", "__setattr__")
    return not hasattr(kind, "training") and all(getattr(kind, step) is getattr(nn.Module, step) for step in steps)
