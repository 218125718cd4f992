"""What several ranks, and large workloads, cost: prints one line a figure.

    python -m benchmarks.scaling [--workload mine.py --datasets DIR] [--strategy adaptive] [--ranks 2] [--kills 0]
        [--num-models 100 1000]

- Makespan: 64 classifiers and detectors of torchvision at 64 px, costs of a training step measured, placed and split as
  a merge does it over 1, 2, 4 and 8 ranks that are simulated: when the last rank has done its part of a step, over the
  total divided by the number of ranks. A rank of a split task also pays what does not shrink with the number of images
  (measured with half of them) and what the ranks tell each other (measured between two processes). The same with uneven
  costs: as measured, times 1 to 30, as with larger images; and with one task that costs a quarter of all.
- Plan: CPU seconds and peak memory for so many models, on the meta device.
- With a workload: the same merge by one process with as many threads as there are ranks, and by ranks of one thread
  each: wall and CPU seconds, peak memory of a process, whether the kept configuration and the weights are the same.
- With --kills: a rank is killed at random moments of that merge: how many runs ended everywhere within 60 s, with a
  valid folder, and went on (every other time with one process).
"""

import argparse
import copy
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torchvision import models as classifiers
from torchvision.models import detection

from gemel.console.tables import mib, plan_table
from gemel.environment.shares import Work, loads, spread
from gemel.merging.placement import Talking
from gemel.sharing.groups import find_groups
from gemel.sharing.memory import distinct_bytes

PIXELS, BATCH = 64, 8
CLASSIFIERS = ("resnet18", "resnet34", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "squeezenet1_1")
DETECTORS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")
SCRIPT = Path(__file__).resolve().parent.parent / "merge_workloads.py"
TIME_TO_END = 60.0  # seconds


class Run(NamedTuple):
    """One merge in processes of its own."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int  # of the largest process


def built(name: str) -> nn.Module:
    if name in CLASSIFIERS:
        return getattr(classifiers, name)(num_classes=4)
    return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4)


def step_seconds(name: str, num_images: int) -> float:
    """CPU seconds of a training step, that of the optimizer included, the better of two."""
    model = built(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(num_images, 3, PIXELS, PIXELS)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(num_images)]
    found = []
    for _ in range(3):
        began = time.process_time()
        optimizer.zero_grad()
        loss = model(images).sum() if name in CLASSIFIERS else sum(model(list(images), targets).values())
        loss.backward()
        optimizer.step()
        found.append(time.process_time() - began)
    return min(found[1:])


def measured_work(name: str, talking: Talking) -> Work:
    """What a step of a model costs; where it is split, each rank pays in full what does not shrink with the images."""
    whole, half = step_seconds(name, BATCH), step_seconds(name, BATCH // 2)
    same_for_all = min(whole, max(0.0, 2 * half - whole))
    return Work(whole, BATCH, same_for_all + talking.seconds_of_split(built(name)))


def print_makespan(num_tasks: int = 64) -> None:
    talking = measured_talking()
    print(f"a collective of two processes: {1e3 * talking.small:.2f} ms, and {1e9 * talking.per_byte:.2f} ms a MB")
    works = {name: measured_work(name, talking) for name in (*CLASSIFIERS, *DETECTORS)}
    names = list(works)
    even = {f"task{i}": works[names[i % len(names)]] for i in range(num_tasks)}
    source = random.Random(0)
    uneven = {task: dearer(one, 30 ** source.random()) for task, one in even.items()}
    total = sum(one.seconds for one in even.values()) - even["task0"].seconds
    heavy = {**even, "task0": dearer(even["task0"], total / 3 / even["task0"].seconds)}
    for what, work in (("", even), ("of uneven cost ", uneven), ("of which one costs a quarter of all ", heavy)):
        for num_ranks in (1, 2, 4, 8):
            ratio, split = makespan(work, num_ranks)
            means = f"{num_tasks} tasks {what}on {num_ranks} ranks, {split} of them split"
            print(f"makespan of {means}: {ratio:.3f} x total / ranks", flush=True)


def dearer(work: Work, times: float) -> Work:
    """A task whose steps cost so many times as much, as with larger images: what splitting costs stays the same."""
    return work._replace(seconds=work.seconds * times)


def makespan(work: dict[str, Work], num_ranks: int) -> tuple[float, int]:
    """When the last rank has done its part of a step, over the total divided by the number of ranks; how many tasks are
    split. Ranks begin and end a split task together, and each pays what splitting costs."""
    parts = spread(work, num_ranks)
    longest = max(loads(work, parts, num_ranks))
    total = sum(one.seconds for one in work.values())
    return longest / (total / num_ranks), sum(len(on) > 1 for on in parts.values())


def measured_talking() -> Talking:
    """Of two processes, as place_tasks measures it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_talk, (folder,), nprocs=2)
        return Talking(*json.loads((Path(folder) / "talking.json").read_text()))


def _talk(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    found = Talking.measured(torch.device("cpu"))
    if number == 0:
        (Path(folder) / "talking.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def print_plan(num_models: int) -> None:
    with torch.device("meta"):
        bases = [built(name) for name in (*CLASSIFIERS, *DETECTORS)]
    models = {f"task{i}": copy.deepcopy(bases[i % len(bases)]) for i in range(num_models)}
    began = time.process_time()
    plan_table(find_groups(models), distinct_bytes(models))
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(f"plan of {num_models} models: {seconds:.2f} CPU s, peak memory {mib(peak)}", flush=True)


# ---- merges in processes of their own ------------------------------------------------------------------------


def command(settings: argparse.Namespace, results: Path, num_ranks: int) -> tuple[list[str], dict[str, str]]:
    """The command of a merge by so many ranks, and its environment: as many threads in all as settings.ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    arguments = ["--workload", settings.workload, "--results", str(results), "--strategy", settings.strategy]
    if settings.datasets:
        arguments += ["--datasets", settings.datasets]
    threads = str(settings.ranks // num_ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return [sys.executable, *(launcher if num_ranks > 1 else []), str(SCRIPT), *arguments], environment


def run(settings: argparse.Namespace, results: Path, num_ranks: int) -> Run:
    words, environment = command(settings, results, num_ranks)
    began = time.monotonic()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    return Run(os.waitstatus_to_exitcode(status), seconds, used.ru_utime + used.ru_stime, used.ru_maxrss << 10)


def largest_difference(one: Path, other: Path, manifest: dict[str, Any]) -> float:
    """Between the weights of two results, of any tensor of any task."""
    found = 0.0
    for task in manifest["tasks"]:
        states = [torch.load(folder / "weights" / f"{task}.pt", weights_only=True) for folder in (one, other)]
        found = max([found, *(float((states[0][k].double() - states[1][k].double()).abs().max()) for k in states[0])])
    return found


def print_merges(settings: argparse.Namespace, folder: Path) -> None:
    manifests = []
    for num_ranks in (1, settings.ranks):
        done = run(settings, folder / str(num_ranks), num_ranks)
        print(
            f"{num_ranks} ranks of {settings.ranks // num_ranks} threads, {settings.strategy}: exit code {done.code}, "
            f"{done.seconds:.1f} s, {done.cpu_seconds:.1f} CPU s, largest process {mib(done.peak_bytes)}",
            flush=True,
        )
        if done.code:
            raise SystemExit("the merge failed, see above: nothing is compared")
        manifests.append(json.loads((folder / str(num_ranks) / "merged.json").read_text()))
    one, several = manifests
    same = one["shared_layers"] == several["shared_layers"]
    difference = largest_difference(folder / "1", folder / str(settings.ranks), one)
    print(f"kept configuration is the same: {same}; largest difference of a weight: {difference:.2g}", flush=True)


# ---- killed ranks ---------------------------------------------------------------------------------------------


def ranks_of(launcher: int) -> list[int]:
    """The processes that a torchrun started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []


def seconds_at_work(settings: argparse.Namespace, results: Path) -> float:
    """Of a whole merge, from when it makes the results folder."""
    words, environment = command(settings, results, settings.ranks)
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    _wait_for(results, process)
    began = time.monotonic()
    process.wait()
    return time.monotonic() - began


def _wait_for(results: Path, process: subprocess.Popen) -> None:
    """Until the merge makes its folder, or ends: on a busy machine its processes take long to start."""
    while not results.exists() and process.poll() is None:
        time.sleep(0.05)


def killed(settings: argparse.Namespace, results: Path, delay: float) -> tuple[float, bool]:
    """Seconds from the kill of one rank until all have ended, and whether the merge was still running then.

    delay: seconds from when the merge makes the results folder.
    """
    words, environment = command(settings, results, settings.ranks)
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    _wait_for(results, process)
    with_end = time.monotonic() + delay
    while time.monotonic() < with_end and process.poll() is None:
        time.sleep(0.05)
    victims = ranks_of(process.pid)
    if process.poll() is not None or not victims:
        process.wait()
        return 0.0, False
    os.kill(random.choice(victims), signal.SIGKILL)
    began = time.monotonic()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in victims):
        time.sleep(0.05)
    return time.monotonic() - began, True


def print_kills(settings: argparse.Namespace, folder: Path) -> None:
    whole = seconds_at_work(settings, folder / "whole")
    counts = dict.fromkeys(("killed", "ended in time", "valid", "went on"), 0)
    for number in range(2 * settings.kills):  # a merge may have ended before it was to be killed
        if counts["killed"] == settings.kills:
            break
        results = folder / f"killed-{number}"
        seconds, was_running = killed(settings, results, random.uniform(0.0, 0.9) * whole)
        counts["killed"] += was_running
        counts["ended in time"] += was_running and seconds <= TIME_TO_END
        verify = [sys.executable, "-m", "gemel", "verify", str(results)]
        has_result = (results / "merged.json").exists()
        valid = not has_result or subprocess.run(verify, capture_output=True, cwd=SCRIPT.parent).returncode == 0
        counts["valid"] += was_running and valid
        counts["went on"] += was_running and run(settings, results, 1 if number % 2 else settings.ranks).code == 0
    print(", ".join(f"{what}: {count}" for what, count in counts.items()), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", metavar="FILE.py")
    parser.add_argument("--datasets", metavar="DIR")
    parser.add_argument("--strategy", default="adaptive")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--num-models", type=int, nargs="*", default=[100, 1000])
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measured: list[Callable[[argparse.Namespace, Path], None]] = [print_merges] if settings.workload else []
    for measure in [*measured, *([print_kills] if settings.kills and settings.workload else [])]:
        with tempfile.TemporaryDirectory() as folder:  # first, while this process is small: children begin as large
            measure(settings, Path(folder))
    print_makespan()
    for num_models in settings.num_models:
        print_plan(num_models)


if __name__ == "__main__":
    main()
