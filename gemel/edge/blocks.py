"""Which tensors of the store each model needs, gathered into blocks that are moved as one.

A block holds tensors that the same tasks use. Many models have hundreds of tensors of a few bytes, such as those of
normalisation; a block of at most BLOCK_BYTES, or one larger tensor, is fine enough to fill a budget of memory, and a
hundred blocks are planned in microseconds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemel.results_store.tensors import sizes_with_scales

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Tensors that are moved together."""

    keys: tuple[str, ...]  # of the store
    bytes: int
    users: tuple[str, ...]  # the tasks that use them


@dataclass(frozen=True)
class Blocks:
    """All blocks of a workload, and which of them each task needs."""

    all: tuple[Block, ...]
    needs: dict[str, tuple[int, ...]]  # task -> indices of its blocks

    @property
    def distinct_bytes(self) -> int:
        """Bytes of the whole workload, a shared block counted once."""
        return sum(block.bytes for block in self.all)

    def bytes_of(self, task: str) -> int:
        """Bytes of one model."""
        return sum(self.all[i].bytes for i in self.needs[task])

    def shared_bytes(self, task: str, other: str) -> int:
        """Bytes that two tasks have in common."""
        return sum(self.all[i].bytes for i in set(self.needs[task]) & set(self.needs[other]))

    @property
    def largest(self) -> str:
        """The task with the largest model: the least budget is its bytes."""
        return max(self.needs, key=self.bytes_of)


def blocks_of(
    tensors: Mapping[str, Mapping[str, str]], sizes: Mapping[str, int], tasks: Sequence[str], merged: bool = True
) -> Blocks:
    """The blocks of these tasks.

    tensors: the entry `tensors` of a manifest. sizes: store key -> bytes. merged: False gives every task blocks of its
    own, as if nothing were shared. Store keys of one block lie in the order in which the first task names them.
    """
    users: dict[str, list[str]] = {}
    for task in tasks:
        for key in dict.fromkeys(tensors[task].values()):
            users.setdefault(key, []).append(task)
    gathered: dict[tuple[str, ...], list[str]] = {}
    for key, names in users.items():
        for owners in [tuple(names)] if merged else [(name,) for name in names]:
            gathered.setdefault(owners, []).append(key)
    found = [block for owners, keys in gathered.items() for block in _split(owners, keys, sizes)]
    return Blocks(tuple(found), {task: tuple(i for i, b in enumerate(found) if task in b.users) for task in tasks})


def _split(users: tuple[str, ...], keys: Collection[str], sizes: Mapping[str, int]) -> list[Block]:
    """Blocks of at most BLOCK_BYTES each, or of one tensor."""
    blocks: list[Block] = []
    held: list[str] = []
    total = 0
    for key in keys:
        if held and total + sizes[key] > BLOCK_BYTES:
            blocks.append(Block(tuple(held), total, users))
            held, total = [], 0
        held.append(key)
        total += sizes[key]
    return [*blocks, Block(tuple(held), total, users)] if held else blocks


def sizes_of(entries: Mapping[str, Any]) -> dict[str, int]:
    """Store key -> bytes, from the entries of an opened store; those of the scales of a weight in 8 bits included."""
    return sizes_with_scales(entries)
