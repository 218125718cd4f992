"""A long run of `python -m gemel edge run` at more than it can answer: memory, frames, and how it ends.

Part of benchmarks/edge.py (`--minutes`). The command runs in a process of its own, whose memory is looked at twice a
second, until a SIGTERM ends it. Memory is the proportional set size (PSS): of pages that other processes map as well,
such as torch's libraries, a share. So let no other program that uses torch begin or end meanwhile.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemel.console.tables import table
from gemel.edge.simulator import Load

ROOT = Path(__file__).parents[1]
FLAT = 0.02  # by how much the mean memory of the last fifth may differ from that of the second one
MOST_TO_END = 1.0  # seconds from the signal to the summary
PARTS = 5


class Ended(NamedTuple):
    """What is known of a run once it is over."""

    memory: list[tuple[float, float]]  # MiB, every half second: all, and of this what is in no file
    seconds_to_summary: float  # from the signal on
    seconds_to_exit: float
    summary: dict[str, Any]


def long_run(results: Path, given: Sequence[str], budget: int, load: Load, minutes: float) -> bool:
    """Runs the unmerged workload for so many minutes and prints what is found; whether it is as it should be.

    given: more flags of `edge run`. budget: bytes of weights. Flat: the means of the second and of the last fifth of
    the run differ by FLAT at most. In the first fifth it takes what it will keep. Within a cycle of turns memory goes
    up and down by a tenth, as weights come and go: a median would jump between the two.
    """
    summary = results.with_name(f"{results.name}-long-run.json")
    command = [sys.executable, "-m", "gemel", "edge", "run", str(results), "--unmerged", "--no-shared-computation"]
    assert load.sla is not None
    command += ["--memory", str(budget), "--fps", str(load.fps), "--sla", f"{1e3 * load.sla:.0f}ms", *given]
    command += ["--seconds", f"{math.ceil(60 * minutes) + 3600}s", "--json", str(summary)]
    try:
        ended = _until_signalled(command, summary, 60 * minutes)
    finally:
        summary.unlink(missing_ok=True)
    drift = _print_memory(ended.memory)
    lost = _print_frames(ended.summary, load.fps)
    print(f"after SIGTERM: summary in {ended.seconds_to_summary:.2f} s, end in {ended.seconds_to_exit:.2f} s")
    return drift <= FLAT and not lost and ended.seconds_to_summary <= MOST_TO_END


def _until_signalled(command: Sequence[str], summary: Path, seconds: float) -> Ended:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        end, memory = time.monotonic() + seconds, []
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.5)
            memory.append(_memory_of(process.pid))
        began = time.time()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        to_exit = time.time() - began
    finally:
        process.kill()
    if code or not summary.is_file():
        raise SystemExit(f"the run ended with exit code {code}, after {len(memory) / 2:.0f} s")
    return Ended(memory, summary.stat().st_mtime - began, to_exit, json.loads(summary.read_text()))


def _memory_of(process: int) -> tuple[float, float]:
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    kib = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    return kib["Pss:"] / 1024, kib["Pss_Anon:"] / 1024


def _print_memory(memory: Sequence[tuple[float, float]]) -> float:
    """Prints the memory of each fifth; by how much the last one's mean differs from the second one's."""
    fifths = list(_split(memory))
    means = [statistics.mean(all_of_it for all_of_it, _ in fifth) for fifth in fifths]
    rows = []
    for number, (fifth, mean) in enumerate(zip(fifths, means, strict=True), 1):
        whole, private = zip(*fifth, strict=True)
        cells = (min(whole), mean, max(whole), statistics.mean(private))
        rows.append([f"{number}", *(f"{mib:.1f}" for mib in cells)])
    print(table(("fifth", "least MiB (PSS)", "mean", "most", "mean in no file"), rows))
    drift = means[-1] / means[1] - 1
    print(f"\nmean of the last fifth against the second: {100 * drift:+.2f} % (allowed: {100 * FLAT:.0f} %)")
    return abs(drift)


def _split(memory: Sequence[tuple[float, float]]) -> Iterator[Sequence[tuple[float, float]]]:
    size = len(memory) // PARTS
    if not size:
        raise SystemExit("the run was too short to say anything of its memory")
    for first in range(0, size * PARTS, size):
        yield memory[first : first + size]


def _print_frames(summary: dict[str, Any], fps: float) -> int:
    """Prints how many frames arrived and were answered; how many were not counted, of all tasks together."""
    arrived = math.floor(summary["seconds"] * fps + 1e-9) + 1
    lost = {n: arrived - t["processed"] - t["late"] - t["dropped"] for n, t in summary["tasks"].items()}
    in_time = sum(t["processed"] for t in summary["tasks"].values()) / (arrived * len(lost))
    counted = ", ".join(f"{name} {count}" for name, count in lost.items())
    print(f"{arrived} frames arrived for each task in {summary['turns']} turns, {100 * in_time:.1f} % answered in time")
    print(f"not counted: {counted}")
    return sum(map(abs, lost.values()))
