"""Whether a model is what its recorded architecture builds, so that it can be loaded without code of the user.

A model that `build` made can be changed afterwards (another pooling, a stride, a score threshold) without any shape
changing. So the rebuilt model is compared in everything it is made of, and in what it puts out for real images.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gemel.environment.describe import describe, is_plain
from gemel.forward.batches import Batch, run
from gemel.forward.modes import deep_copy, device_of
from gemel.results_store.load import build_empty, load_merged
from gemel.results_store.manifest import read_manifest
from gemel.sharing.adapters import own_modules
from gemel.sharing.memory import named_tensors
from gemel.sharing.precision import as_stored
from gemel.sharing.signatures import settings_of
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
from model_architectures import architecture_of

NOT_BUILT = "it was not built by model_architectures.build, or a layer was replaced"
TOLERANCE = 1e-4  # of the largest output: between two runs of the same operations
MAX_TEXT = 60
PURPOSE = "architecture"

log = logging.getLogger(__name__)


class Recorded(NamedTuple):
    """The architecture to be written into the manifest, or why there is none."""

    architecture: dict[str, Any] | None
    note: str | None


class Architectures:
    """The architectures that a merge records, and the models that are built from them when the result is loaded."""

    def __init__(self, state: MergeState, images: ImageSampler):
        self.state, self.images = state, images
        self._recorded: dict[str, Recorded] = {}

    def recorded(self) -> dict[str, Recorded]:
        """The architecture of every task, if it builds what the task's model computes; found out once."""
        for name, model in self.state.unmerged.items():  # the live model may have adapters
            if name not in self._recorded:
                self.state.waiting.bring_all()  # they run here
                self._recorded[name] = recorded_architecture(model, self.images.few_of(name, PURPOSE))
        return self._recorded

    def reload(self, results_path: Path, name: str, verify: bool = False) -> nn.Module:
        """A task's model as it loads without code of the user where an architecture is recorded, else into a copy.

        Where one that was built from its architecture puts out something else, that is no longer recorded: the result
        is to be written once more. verify: also the sha256 of the whole store. Raises ResultsError.
        """
        is_built = self.recorded()[name].architecture is not None
        if is_built and read_manifest(results_path)["tasks"][name]["architecture"] is not None:
            model = self._loaded(results_path, name, {}, verify)
            live = as_stored(self.state.models[name], self.state.store_dtype)
            why = output_difference(live, model, self.images.few_of(name, PURPOSE))
            if why is None:
                return model
            note = f"built from its architecture and loaded, {why}"
            log.warning("%s: %s", name, note)
            self._recorded[name] = Recorded(None, note)
        return self._loaded(results_path, name, {name: deep_copy(self.state.models[name])}, verify)

    def _loaded(self, results_path: Path, name: str, into: dict[str, nn.Module], verify: bool) -> nn.Module:
        """The task alone, so that no more than one model is in memory twice."""
        reloaded = nn.ModuleDict(load_merged(results_path, into, self.state.device, tasks=[name], verify=verify))
        self.state.lay_out(reloaded)
        return reloaded[name]


def recorded_architecture(model: nn.Module, images: Batch) -> Recorded:
    """The architecture of a model as it came, if the model that it builds computes the same; else why not.

    images: of its task, as its loader gives them.
    """
    architecture = architecture_of(model)
    if architecture is None:
        return Recorded(None, NOT_BUILT)
    try:
        rebuilt = build_empty(architecture, len(model.state_dict()))
        rebuilt.load_state_dict(named_tensors(model), assign=True)
        rebuilt.to(device_of(model)).eval()
        note = difference(model, rebuilt) or output_difference(model, rebuilt, images)
    except Exception as error:  # a user's model may raise anything
        note = f"it cannot be compared with the model that its architecture builds: {type(error).__name__}: {error}"
    if note is None:
        return Recorded(architecture, None)
    log.warning("%s: not the model that its architecture builds: %s", architecture["name"], note)
    return Recorded(None, note)


def difference(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first module, setting or hook in which two models differ, as text; None if they are made of the same."""
    own, other = dict(own_modules(model)), dict(own_modules(rebuilt))
    if own.keys() != other.keys():
        return f"its modules differ: {', '.join(sorted(own.keys() ^ other.keys())[:3])}"
    for name, module in own.items():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if type(module) is not type(other[name]):
            return f"{where} is built as {type(other[name]).__name__}"
        settings, built = _settings(module), _settings(other[name])
        for key in {**settings, **built}:
            if key != "architecture" and settings.get(key) != built.get(key):
                return f"{where}: {key} is {_short(settings.get(key))}, and is built as {_short(built.get(key))}"
        if _num_hooks(module) != _num_hooks(other[name]):
            return f"{where} has another number of hooks"
        if (buffer := _different_buffer(module, other[name])) is not None:
            return f"{where}: the buffer {buffer}, which is not stored, has other values"
    return None


def output_difference(model: nn.Module, rebuilt: nn.Module, images: Batch) -> str | None:
    """How the outputs of two models differ on the same images, as text; None if they agree."""
    before, after = (
        [leaf for leaf in tree_leaves(run(m, images)) if isinstance(leaf, Tensor)] for m in (model, rebuilt)
    )
    if [leaf.shape for leaf in before] != [leaf.shape for leaf in after]:
        return "it puts out other shapes"
    for one, two in zip(before, after, strict=True):
        one, two = one.double(), two.double()
        if one.numel() and not torch.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE * float(one.abs().max())):
            return f"its outputs differ, by up to {float((one - two).abs().max()):.3g}"
    return None


def _settings(module: nn.Module) -> dict[str, str]:
    """The settings of a module, and plain objects that it holds (such as a detector's coder of boxes), as text."""
    objects = {key: value for key, value in vars(module).items() if _is_plain_object(value)}
    return {key: describe(value) for key, value in {**settings_of(module), **objects}.items()}


def _is_plain_object(value: object) -> bool:
    is_object = not isinstance(value, nn.Module | Tensor | type) and not callable(value)
    return is_object and bool(getattr(value, "__dict__", None)) and is_plain(vars(value))


def _num_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _different_buffer(module: nn.Module, other: nn.Module) -> str | None:
    """The first buffer outside the state dict that has other values."""
    for name in module._non_persistent_buffers_set:
        one, two = module._buffers.get(name), other._buffers.get(name)
        if (one is None) != (two is None):
            return name
        if one is not None and two is not None and not (one.shape == two.shape and torch.equal(one.cpu(), two.cpu())):
            return name
    return None


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."
