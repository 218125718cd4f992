"""For the tests of the edge: results of small models, blocks drawn at random, made-up profiles, time that is set."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from results_samples import slim_models, write
from torch import nn

from gemel.edge import Runtime
from gemel.edge.blocks import Block, Blocks, blocks_of
from gemel.edge.profile import Profile, TaskProfile

ROOT = Path(__file__).parents[1]
WIDE_SIZE = 16
WIDE_TASKS = ("a_wide", "b_wide", "c_wide")


def write_slim(path, tied: bool = True):
    """A result of two small classifiers; the path."""
    write(path, slim_models(tied=tied))
    return path


def random_blocks(num_tasks: int, seed: int, most_pieces: int = 6) -> Blocks:
    """Models with private blocks, and blocks that families of them share."""
    rng = random.Random(seed)
    tasks = [f"t{i}_x" for i in range(num_tasks)]
    families = [rng.randrange(max(2, num_tasks // 3)) for _ in tasks]
    blocks = [
        Block((f"p{i}.{j}",), rng.randrange(1, 1000), (task,))
        for i, task in enumerate(tasks)
        for j in range(rng.randrange(1, most_pieces))
    ]
    for i in range(num_tasks * most_pieces // 2):
        family = rng.randrange(max(2, num_tasks // 3))
        members = [task for task, own in zip(tasks, families, strict=True) if own == family]
        if len(members) >= 2:
            users = sorted(rng.sample(members, rng.randrange(2, len(members) + 1)), key=tasks.index)
            blocks.append(Block((f"s{i}",), rng.randrange(1, 2000), tuple(users)))
    return Blocks(tuple(blocks), {t: tuple(i for i, b in enumerate(blocks) if t in b.users) for t in tasks})


def unshared(blocks: Blocks) -> Blocks:
    """The same models without sharing."""
    tensors = {task: {key: key for i in own for key in blocks.all[i].keys} for task, own in blocks.needs.items()}
    sizes = {key: block.bytes for block in blocks.all for key in block.keys}
    return blocks_of(tensors, sizes, list(blocks.needs), merged=False)


def profile_of(blocks: Blocks, run_ms: float = 10.0, ms_per_mib: float = 0.0) -> Profile:
    """Every model runs as long; a batch of n takes n times that, less a tenth."""
    run = {n: run_ms * (n if n == 1 else 0.9 * n) for n in (1, 2, 4)}
    tasks = {
        task: TaskProfile(
            bytes=blocks.bytes_of(task),
            shared_bytes={other: blocks.shared_bytes(task, other) for other in blocks.needs if other != task},
            load_ms=blocks.bytes_of(task) * ms_per_mib / (1 << 20),
            run_ms=run,
            input_ms=0.0,
            input=0,
            activation_bytes=dict.fromkeys(run, 1),
        )
        for task in blocks.needs
    }
    return Profile("merged-0.safetensors", "cpu", 0.0, 0.0, ms_per_mib, tasks)


class VirtualTime:
    """A clock that advances by what is waited for: nothing else in the process matters."""

    def __init__(self):
        self.now = self.read_ahead_until = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, stop, seconds: float) -> None:
        self.now += seconds


class Virtual(Runtime):
    """A runtime whose models and moves take the time that the profile states, on a virtual clock."""

    profile: Profile
    clock: VirtualTime

    def seconds_of(self, move) -> float:
        return self.profile.load_seconds(sum(len(self.blocks.all[i].keys) for i in move.loaded), move.bytes)

    def enter(self, step):
        super().enter(step)
        self.clock.now = max(self.clock.now, self.clock.read_ahead_until) + self.seconds_of(step.enter)

    def read_ahead(self, step):
        super().read_ahead(step)
        self.clock.read_ahead_until = self.clock.now + self.seconds_of(step.prefetch)

    def forward(self, task, inputs):
        self.clock.now += self.profile.tasks[task].run_seconds(len(inputs))
        return super().forward(task, inputs)


class Wide(nn.Sequential):
    """Few operations, so that it is exported quickly, and 25 MB of weights."""

    def __init__(self, num_classes: int):
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten()),
            *(nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, num_classes)),
        )


def wide_models() -> dict[str, nn.Module]:
    """Three tasks, nothing tied; their images have WIDE_SIZE pixels a side."""
    torch.manual_seed(0)
    return {task: Wide(classes).eval() for task, classes in zip(WIDE_TASKS, (3, 4, 5), strict=True)}


def pss() -> int:
    """The proportional set size of this process, in bytes."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))


def check_memory_of_sessions(measure: str, results: Path, models: nn.ModuleDict) -> None:
    """The bar: k sessions take at most 1.1 x the distinct bytes of the models, and a fixed number of bytes each.

    measure: a program that opens so many sessions of a results folder, and prints by how much its memory grew.
    """
    alone = shutil.copytree(results, results / "alone")  # files that another process maps as well count half
    distinct = sum(parameter.nbytes for parameter in models.parameters())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for count in (1, 3):
        command = [sys.executable, "-c", measure, str(alone), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        grown = int(done.stdout)
        print(f"{count} sessions: PSS + {grown / 1e6:.1f} MB, distinct {distinct / 1e6:.1f} MB")
        assert 0.9 * distinct <= grown <= 1.1 * distinct + count * (4 << 20)
