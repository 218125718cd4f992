"""Outputs of a model on the batches of a loader, computed by several ranks for an eval method that runs on one.

An eval method is a function of the user, (model, loader) -> accuracy, which cannot be split. But most of its time goes
into the model's forward passes: each rank of the task runs some of the batches, and on the task's own rank the model
then has these outputs ready. Whatever else the eval method asks of the model is computed as usual.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gemel.environment import ranks
from gemel.environment.shares import Evaluation, evaluators
from gemel.forward.batches import run
from gemel.sharing.memory import named_tensors

T = TypeVar("T")
MAX_BYTES = 64 << 20  # of the outputs of a rank: more are not sent

log = logging.getLogger(__name__)


def measured_with_others(
    names: Iterable[str],
    measure: Callable[[str], T],
    shown: Mapping[str, tuple[nn.Module, Iterable]],
) -> dict[str, T]:
    """What `measure` returns for each of this rank's tasks among these, while other ranks share in some of them.

    shown: task -> the model that is about to be evaluated, and on which loader. All ranks call it alike. The models of
    those that share in a task get the weights that its own rank has. While `measure` runs, the model has its outputs
    ready: each is given once, for the same images, to a model in eval mode without gradients whose weights and hooks
    are the same as before; copies of the model compute theirs.
    """
    names, sharing = list(names), _shares(shown)
    shared = [name for name in names if ranks.rank() in sharing.get(name, {})]
    parts, before = {}, {}
    for name in shared:
        model, loader = shown[name]
        ranks.broadcast(list(named_tensors(model).values()), ranks.owner_of(name), sharing[name])
        before[name] = _state(model)
        parts[name] = _computed(name, model, _own_batches(loader, sharing[name]))
    found: dict[str, T] = {}
    failed: Exception | None = None
    try:
        found = {name: measure(name) for name in ranks.mine(names) if name not in shared}
    except (RuntimeError, MemoryError) as error:  # the others wait for the outputs first
        failed = error
    for name in shared:
        outputs = _exchanged(parts[name], name, sharing[name])
        if ranks.is_mine(name) and failed is None:
            model = shown[name][0]
            with _in_place_of_forward(model, _Given(model, outputs, before[name])):
                found[name] = measure(name)
    if failed is not None:
        raise failed
    return found


def _shares(shown: Mapping[str, tuple[nn.Module, Iterable]]) -> dict[str, dict[int, float]]:
    """Task -> rank -> share of its batches, of those tasks in which several ranks share: by what all of them cost."""
    if ranks.size() == 1:
        return {}
    costs = {
        name: Evaluation(*(len(loader) * seconds for seconds in ranks.seconds_of_evaluation(name)))
        for name, (_, loader) in shown.items()
        if isinstance(loader, DataLoader) and len(loader) > 1
    }
    found = evaluators(costs, {name: ranks.owner_of(name) for name in costs}, ranks.size())
    ranks.make_groups(found.values())
    return {name: on for name, on in found.items() if len(on) > 1}


def _own_batches(loader: Iterable, on: Mapping[int, float]) -> Iterable:
    """This rank's share of the batches of a DataLoader; where no other processes load them, no more is read."""
    assert isinstance(loader, DataLoader)
    before = sum(share for number, share in on.items() if number < ranks.rank())
    edges = [round(len(loader) * edge / sum(on.values())) for edge in (before, before + on[ranks.rank()])]
    if loader.num_workers or loader.batch_sampler is None:
        return itertools.islice(loader, *edges)
    own = list(itertools.islice(loader.batch_sampler, *edges))
    return DataLoader(loader.dataset, batch_sampler=own, collate_fn=loader.collate_fn)


def _computed(task: str, model: nn.Module, batches: Iterable) -> dict[str, Any]:
    """Digest of the images -> output, of all batches, or of fewer where something fails.

    What fails is computed again by the eval method, on the task's own rank, where it is dealt with as usual.
    """
    found: dict[str, Any] = {}
    try:
        for images, _ in batches:
            with contextlib.suppress(TypeError):  # what others cannot read is left to the eval method
                found[digest(images)] = _packed(run(model, images))
    except Exception as error:  # a user's model, dataset or transform may raise anything
        log.warning("%s: outputs are not computed by rank %d: %s: %s", task, ranks.rank(), type(error).__name__, error)
    return found


def _exchanged(own: dict[str, Any], task: str, on: Mapping[int, float]) -> dict[str, Any]:
    """The outputs of all ranks that share in the task; on the others than its own one, nothing."""
    buffer = io.BytesIO()
    if not ranks.is_mine(task):
        torch.save(own, buffer)
    is_small = buffer.getbuffer().nbytes <= MAX_BYTES
    messages = ranks.messages(buffer.getvalue() if is_small else b"", on)
    if not ranks.is_mine(task):
        return {}
    device = next((t.device for t in _tensors(list(own.values()))), None)
    others = [torch.load(io.BytesIO(m), map_location=device, weights_only=True) for m in messages if m]
    return {**own, **{digest: output for part in others for digest, output in part.items()}}


class _Given:
    """In the place of a model's `forward`: gives the outputs that are there, and computes the others."""

    def __init__(self, model: nn.Module, outputs: dict[str, Any], before: tuple):
        self.model, self.outputs, self.before = model, outputs, before
        self.forward = model.forward

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        if not more and len(inputs) == 1 and _are_images(inputs[0]) and not torch.is_grad_enabled():
            key = digest(inputs[0])
            is_as_before = _state(self.model) == self.before and not any(m.training for m in self.model.modules())
            if key in self.outputs and is_as_before:
                return self.outputs.pop(key)
        return self.forward(*inputs, **more)

    def __deepcopy__(self, memo: dict) -> Any:
        copied = memo[id(self.model)]  # a copy of the model is being made: it computes its outputs itself
        return types.MethodType(type(copied).forward, copied)


@contextlib.contextmanager
def _in_place_of_forward(model: nn.Module, given: _Given) -> Iterator[None]:
    had_own = "forward" in vars(model)
    model.forward = given
    try:
        yield
    finally:
        if had_own:
            model.forward = given.forward
        else:
            del model.forward


def _state(model: nn.Module) -> tuple:
    """What an output depends on besides the images, as far as it is quickly compared."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors], hooks


def _are_images(value: Any) -> bool:
    return torch.is_tensor(value) or (isinstance(value, list) and bool(value) and all(map(torch.is_tensor, value)))


def digest(images: Tensor | Iterable[Tensor]) -> str:
    """By which the images of a batch are known again."""
    found = hashlib.sha256()
    for image in [images] if torch.is_tensor(images) else images:
        found.update(f"{image.dtype} {tuple(image.shape)}".encode())
        found.update(image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _packed(output: Any) -> Any:
    """The output with tensors that hold nothing else; TypeError for other things than tensors, numbers and containers,
    which torch.load does not read from untrusted files."""
    if type(output) is Tensor:
        return output.clone()
    if type(output) in (dict, collections.OrderedDict):
        return type(output)((_packed(key), _packed(value)) for key, value in output.items())
    if type(output) in (list, tuple):
        return type(output)(map(_packed, output))
    if type(output) in (int, float, bool, str, type(None)):
        return output
    raise TypeError(type(output).__name__)


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
