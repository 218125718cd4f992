"""Runs a function in several processes that work together, as under torchrun but quicker: forked from this one."""

import faulthandler
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from gemel.evaluation import coco

SECONDS = 60


def on_ranks(num_ranks: int, work, *arguments) -> list:
    """What work(*arguments) returns on each rank: tensors, and what torch.load takes for plain data."""
    context = multiprocessing.get_context("fork")  # torch is imported already; spawning would import it again
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(number, num_ranks, folder, work, arguments))
            for number in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        hang = "\n".join(file.read_text() for file in sorted(Path(folder).glob("*.hangs")))
        assert not alive, f"the ranks wait for each other:\n{hang}"
        failures = [file.read_text() for file in sorted(Path(folder).glob("*.failed"))]
        assert not failures, "\n".join(failures)
        return [torch.load(f"{folder}/{number}.pt", weights_only=True) for number in range(num_ranks)]


def _child(number: int, num_ranks: int, folder: str, work, arguments) -> None:
    torch.set_num_threads(1)
    coco.hotcoco = None  # its threads were not forked: it would wait for them for ever
    faulthandler.dump_traceback_later(SECONDS - 5, file=open(f"{folder}/{number}.hangs", "w"))  # noqa: SIM115
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=num_ranks)
    try:
        torch.save(work(*arguments), f"{folder}/{number}.pt")
        dist.barrier()
    except BaseException:
        Path(folder, f"{number}.failed").write_text(f"rank {number}: {traceback.format_exc()}")
    finally:
        os._exit(0)  # nothing of the test run that was forked is to be ended here
