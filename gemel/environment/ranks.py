"""The processes (ranks) that work on one merge: which tasks are whose, and what they tell each other.

torchrun starts the same program several times. Every rank goes through the same rounds; what costs time for a task
(images, forward passes, training, evaluation) its own rank does alone, and tells the others what came out. With one
process every function here returns at once what it was given. docs/multi_gpu.md describes it for users.

A function that talks to the others must be called by all ranks in the same order. Between two of them a rank may raise
only for lack of memory, within `together`; any other error ends the process, and with it the run (alive.py).
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemel.environment.failures import is_out_of_memory

BLOCK = 4096  # bytes: messages up to this size need one collective, longer ones two
LENGTH = 8  # bytes of a message's length
MAX_CHUNK = 64 << 20  # bytes that are sent at a time
FOREVER = timedelta(days=30)  # ranks wait as long as another one evaluates; alive.py finds those that are gone

_owners: dict[str, int] = {}  # task -> its rank
_parts: dict[str, dict[int, int]] = {}  # task that several ranks train -> rank -> images of a batch
_evaluations: dict[str, tuple[float, float]] = {}  # task -> seconds of reading a batch of val, and of its outputs
_seconds: dict[str, float] = {}  # task -> of a training step on one rank
_groups: dict[tuple[int, ...], Any] = {}  # process groups of some of the ranks


class RankLost(BaseException):
    """Another rank is gone. Not an Exception: no `except Exception` around a user's method may catch it."""


class FirstRankFailed(Exception):
    """The first rank raised an error; it reports it."""


# ---- who is here --------------------------------------------------------------------------------------------


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that decides, prints and writes."""
    return rank() == 0


def is_asked_for() -> bool:
    """Whether this process was started as one of several, as torchrun does it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within, this process works with the others that torchrun started; without others nothing happens.

    Tensors on a CPU go through gloo, those on CUDA devices through NCCL; every rank takes the device of its number.
    """
    if not is_asked_for() or size() > 1:
        yield
        return
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=FOREVER)
    try:
        yield
    finally:
        _groups.clear()
        dist.destroy_process_group()


# ---- whose task ---------------------------------------------------------------------------------------------


def assign(
    owners: Mapping[str, int],
    parts: Mapping[str, Mapping[int, int]] | None = None,
    seconds: Mapping[str, float] | None = None,
    evaluations: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Says which rank every task belongs to; one without an entry belongs to the first.

    parts: of tasks that several ranks train, how many images of a batch each of them does; its own rank among them.
    seconds: of a training step of each task on one rank. evaluations: what a batch of val costs, as
    `seconds_of_evaluation` returns it. All ranks say the same.
    """
    _owners.clear()
    _owners.update(owners)
    _parts.clear()
    _parts.update({task: dict(on) for task, on in (parts or {}).items() if len(on) > 1})
    _seconds.clear()
    _seconds.update(seconds or {})
    _evaluations.clear()
    _evaluations.update({task: (reading, computing) for task, (reading, computing) in (evaluations or {}).items()})
    assert all(owner_of(task) in on for task, on in _parts.items())
    make_groups(_parts.values())


def make_groups(sets: Iterable[Collection[int]]) -> None:
    """Makes what some of the ranks need to tell each other something; all ranks call it with the same sets."""
    wanted = {tuple(sorted(members)) for members in sets if 1 < len(members) < size()}
    for members in sorted(wanted - set(_groups)):
        _groups[members] = dist.new_group(list(members))  # all ranks make it, also those that are not in it


def owner_of(task: str) -> int:
    """The rank of a task."""
    return _owners.get(task, 0) if size() > 1 else 0


def is_mine(task: str) -> bool:
    """Whether a task belongs to this rank; with one process all do."""
    return owner_of(task) == rank()


def mine(tasks: Iterable[str]) -> list[str]:
    """Those of the tasks that belong to this rank."""
    return [task for task in tasks if is_mine(task)]


def seconds_of_evaluation(task: str) -> tuple[float, float]:
    """What reading a batch of val takes on one rank, and computing its outputs; zeros if that was not measured."""
    return _evaluations.get(task, (0.0, 0.0))


def parts_of(task: str) -> dict[int, int]:
    """Rank -> images of a batch, of a task that several ranks train; else empty."""
    return _parts.get(task, {}) if size() > 1 else {}


def seconds_of_step(task: str) -> float:
    """What a training step of the task takes on one rank; 0 if that was not measured."""
    return _seconds.get(task, 0.0)


def ranks_of(task: str) -> list[int]:
    """The ranks that train a task, its own one first."""
    return [owner_of(task), *(number for number in parts_of(task) if number != owner_of(task))]


def takes_part(task: str) -> bool:
    """Whether this rank trains a task, or on a part of its batches; with one process always."""
    return rank() in ranks_of(task)


def taking_part(tasks: Iterable[str]) -> list[str]:
    """Those of the tasks that this rank trains, or on parts of their batches."""
    return [task for task in tasks if takes_part(task)]


def placed(costs: Mapping[str, float], num_ranks: int, apart: Sequence[Collection[str]] = ()) -> dict[str, int]:
    """Task -> rank: the most expensive tasks first, each to the rank that has least to do so far.

    apart: sets of tasks that are worked on one after the other: of each in turn, the rank that has least of it to do,
    and among these the one that has least in all. At most 4/3 of the shortest possible time. Source: Graham, "Bounds on
    multiprocessing timing anomalies", SIAM Journal on Applied Mathematics 17, 1969.
    """
    totals, found = [0.0] * num_ranks, {}
    alone = set(costs) - {task for part in apart for task in part}
    for part in [*apart, alone]:
        loads = [0.0] * num_ranks
        for task in sorted(part, key=lambda task: (-costs[task], task)):
            chosen = min(range(num_ranks), key=lambda rank: (loads[rank], totals[rank], rank))
            loads[chosen], totals[chosen] = loads[chosen] + costs[task], totals[chosen] + costs[task]
            found[task] = chosen
    return {task: found[task] for task in costs}


# ---- what they tell each other ------------------------------------------------------------------------------


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Turns what a collective raises when another rank is gone into RankLost."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one
        raise RankLost(str(error).splitlines()[0]) from error


def messages(message: bytes, on: Collection[int] | None = None) -> list[bytes]:
    """The messages of all ranks, by rank, or of some for whom there is a group."""
    content = len(message).to_bytes(LENGTH, "little") + message
    blocks = _all_gathered(content[:BLOCK].ljust(BLOCK, b"\0"), on)
    lengths = [int.from_bytes(block[:LENGTH], "little") + LENGTH for block in blocks]
    if max(lengths) > BLOCK:
        blocks = _all_gathered(content.ljust(max(lengths), b"\0"), on)
    return [block[LENGTH:length] for block, length in zip(blocks, lengths, strict=True)]


def _all_gathered(content: bytes, on: Collection[int] | None) -> list[bytes]:
    own = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(size() if on is None else len(on))]
    with _talking():
        dist.all_gather(found, own, group=_group_of(on))
    return [tensor.numpy().tobytes() for tensor in found]


def gathered(value: Any) -> list[Any]:
    """What every rank gives, by rank: JSON values, on all of them."""
    if size() == 1:
        return [value]
    return [json.loads(message) for message in messages(json.dumps(value).encode())]


def united(values: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionaries of all ranks in one; JSON values."""
    return {key: value for part in gathered(dict(values)) for key, value in part.items()}


def any_of(value: bool) -> bool:
    """Whether it is true on one of the ranks."""
    return bool(_summed_number(float(value))) if size() > 1 else value


def total_of(value: float) -> float:
    """The sum over all ranks."""
    return _summed_number(value) if size() > 1 else value


def _summed_number(value: float) -> float:
    number = torch.tensor(value, dtype=torch.float64)
    with _talking():
        dist.all_reduce(number)
    return float(number)


def of_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first rank, which alone calls it; JSON values.

    Raises there what `make` raised, and FirstRankFailed on the others.
    """
    if size() == 1:
        return make()
    if not is_first():
        answer = json.loads(_broadcast_bytes(b""))
        if "failed" in answer:
            raise FirstRankFailed(answer["failed"])
        return answer["value"]
    try:
        value = make()
    except BaseException as error:
        _broadcast_bytes(json.dumps({"failed": type(error).__name__}).encode())
        raise
    _broadcast_bytes(json.dumps({"value": value}).encode())
    return value


def _broadcast_bytes(message: bytes) -> bytes:
    """The message of the first rank, on all of them."""
    with _talking():
        length = torch.tensor(len(message))
        dist.broadcast(length, 0)
        content = torch.frombuffer(bytearray(message), dtype=torch.uint8) if is_first() else None
        content = torch.empty(int(length), dtype=torch.uint8) if content is None else content
        dist.broadcast(content, 0)
    return content.numpy().tobytes()


def together(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Every rank does its work, and all get the results of all in one dictionary; JSON values.

    Where one rank runs out of memory, all raise torch.OutOfMemoryError.
    """
    if size() == 1:
        return work()
    values: dict[str, Any] = {}
    with sharing_memory_errors():
        values = work()
    return united(values)


@contextlib.contextmanager
def sharing_memory_errors() -> Iterator[None]:
    """Within, a rank works by itself; where one runs out of memory, all raise torch.OutOfMemoryError at the end."""
    failed: Exception | None = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if size() == 1 or not is_out_of_memory(error):
            raise
        failed = error
    if any_of(failed is not None):
        raise torch.OutOfMemoryError("a rank is out of memory") from failed


def sent_to_first(message: bytes) -> list[bytes]:
    """The messages of all ranks, by rank, on the first one; on the others an empty list. For long messages."""
    lengths = gathered(len(message))
    if not is_first():
        with _talking():
            dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0)
        return []
    found = [message]
    for number, length in enumerate(lengths[1:], 1):
        received = torch.empty(length, dtype=torch.uint8)
        with _talking():
            dist.recv(received, number)
        found.append(received.numpy().tobytes())
    return found


# ---- tensors ------------------------------------------------------------------------------------------------


def sum_in_place(tensor: Tensor, on: Collection[int] | None = None) -> None:
    """Replaces a tensor by its sum over all ranks, or over some for whom there is a group."""
    if on is None or len(on) > 1:
        with _talking():
            dist.all_reduce(tensor, group=_group_of(on))


def gathered_tensors(tensor: Tensor, on: Collection[int]) -> Tensor:
    """The tensors, of one shape and type, of some ranks for whom there is a group, by rank: [ranks, ...]."""
    if len(on) <= 1:
        return tensor[None]
    found = tensor.new_empty(len(on), *tensor.shape)
    with _talking():
        dist.all_gather(list(found), tensor, group=_group_of(on))
    return found


def _group_of(on: Collection[int] | None) -> Any:
    return None if on is None or len(on) == size() else _groups[tuple(sorted(on))]


def broadcast(tensors: Sequence[Tensor], root: int, on: Collection[int] | None = None) -> None:
    """Gives tensors, the same in shape and type on all ranks, the values that they have on one of them; on: some ranks
    for whom there is a group, which alone get them."""
    for part in _chunks(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in part])
        with _talking():
            dist.broadcast(flat, root, group=_group_of(on))
        if rank() != root:
            with torch.no_grad():
                for tensor, values in zip(part, flat.split([tensor.numel() for tensor in part]), strict=True):
                    tensor.copy_(values.view(tensor.shape))


def wait_for_all() -> None:
    """Returns when all ranks have come here."""
    any_of(False)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and at most MAX_CHUNK bytes at a time; a larger one alone."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        part: list[Tensor] = []
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype and tensor.numel()):
            if part and sum(other.nbytes for other in part) + tensor.nbytes > MAX_CHUNK:
                yield part
                part = []
            part.append(tensor)
        if part:
            yield part


def united_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors of all ranks, by name, in one dictionary, on the device that all have; names are not to repeat."""
    if size() == 1:
        return dict(tensors)
    headers = gathered([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()])
    found: dict[str, Tensor] = {}
    for root, header in enumerate(headers):
        for name, shape, dtype in header:
            own = tensors[name].contiguous() if root == rank() else None
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device) if own is None else own
        broadcast([found[name] for name, _, _ in header], root)
    return found
