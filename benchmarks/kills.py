"""Kills a merge at random instants and resumes it: is the results folder valid after each kill, and is nothing lost?

    python -m benchmarks.kills --kills 40 --seed 0
    python -m benchmarks.kills --kills 50 --interrupt

takes about ten seconds a kill. A small workload over drawn images is merged in a process of its own that is killed
(SIGKILL) at a random instant; the results folder is verified; the same command resumes the run and is killed again,
until it ends by itself, and a new merge begins. With --interrupt it is Ctrl-C (SIGINT) instead, and the run must end
within two seconds. Prints one line per kill and the counts; exit code 1 if a folder was invalid, less was saved than
before the kill, or a run did not end in time.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gemel.results_store.manifest import has_results, read_manifest

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD = """
import torch
from pico import PicoDetector, PicoNet, classification_entry, detection_entry


def create_model_dict():
    entries = {
        "north_pico": classification_entry(PicoNet(3), batch_size=6),
        "south_pico": classification_entry(PicoNet(4, extra=1), batch_size=6),
        "east_pico": detection_entry(PicoDetector(), batch_size=6),
    }
    for name, entry in entries.items():
        entry["model"].load_state_dict(torch.load(FOLDER + f"/{name}.pt", weights_only=True))
        entry["unmerged_acc"] = ACCURACY[name]
    return entries
"""
MAX_SECONDS_TO_END = 2.0  # after Ctrl-C
MERGE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
try:
    from merge_workloads import merge_workload  # Ctrl-C may come while modules are read
    from gemel.workload import load_model_dict
    merge_workload(load_model_dict(sys.argv[1]), sys.argv[2], datasets=sys.argv[3], device="cpu", strategy="gemel",
                   tolerance=0.85, learning_rate=0.005, max_epochs=60, patience_epochs=10)
except KeyboardInterrupt:
    sys.exit(130)
"""


def prepare(folder: Path) -> Path:
    """Writes datasets and trained models of a small workload; returns its workload file."""
    from pico import (
        PicoDetector,
        PicoNet,
        classification_entry,
        detection_entry,
        fit,
        write_classification,
        write_detection,
    )

    from dataset_manager import open_task
    from gemel.evaluation.eval_method import evaluate
    from gemel.workload import read_workload

    write_classification(folder, "north_CL", 3, seed=1)
    write_classification(folder, "south_CL", 4, seed=2)
    write_detection(folder, "east_OD", 2, seed=3)
    torch.manual_seed(0)
    entries = {
        "north_pico": classification_entry(PicoNet(3)),
        "south_pico": classification_entry(PicoNet(4, extra=1)),
        "east_pico": detection_entry(PicoDetector()),
    }
    accuracy = {}
    for name, task in read_workload(entries)[0].items():
        data = open_task(task, [folder], device=torch.device("cpu"), seed=0, batch_size=6)
        fit(task.model, data.train, 120)
        accuracy[name] = evaluate(task, data.val)
        torch.save(task.model.state_dict(), folder / f"{name}.pt")
    file = folder / "small_workload.py"
    file.write_text(WORKLOAD.replace("FOLDER", repr(str(folder))).replace("ACCURACY", repr(accuracy)))
    return file


def start(workload: Path, results: Path, datasets: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", MERGE, str(workload), str(results), str(datasets)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)


def environment() -> dict[str, str]:
    """For child processes, which import the project and the models of its tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def time_whole(workload: Path, results: Path, datasets: Path) -> tuple[float, float]:
    """(seconds until shortly before the first write, seconds until the end) of a run that is not killed."""
    began, first = time.monotonic(), None
    process = start(workload, results, datasets)
    while process.poll() is None:
        if first is None and results.exists():
            first = time.monotonic() - began
        time.sleep(0.01)
    assert process.returncode == 0 and first is not None, "the small workload does not merge"
    return 0.9 * first, time.monotonic() - began


def saved(results: Path) -> int:
    return read_manifest(results)["memory"]["saved_bytes"] if has_results(results) else 0


def is_valid(results: Path, workload: Path, datasets: Path) -> bool:
    """Whether the folder holds a valid result whose tasks all reach their targets again, or no result yet."""
    if not has_results(results):
        return True
    command = [sys.executable, "-m", "gemel", "verify", str(results)]
    command += ["--workload", str(workload), "--datasets", str(datasets), "--device", "cpu"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, flush=True)
    return done.returncode == 0


def kill_once(instant: float, sent: signal.Signals, results: Path, workload: Path, datasets: Path) -> tuple[str, bool]:
    """(line to print, whether the folder is valid and nothing was lost) of one run, killed after `instant` seconds."""
    before, seconds = saved(results), 0.0
    process = start(workload, results, datasets)
    try:
        process.wait(instant)
        what = "ended by itself"
    except subprocess.TimeoutExpired:
        process.send_signal(sent)
        began = time.monotonic()
        process.wait()
        seconds = time.monotonic() - began
        what = f"killed after {instant:5.2f} s, ended {seconds:4.2f} s later"
    valid, after = is_valid(results, workload, datasets), saved(results)
    line = f"{what}: {'valid' if valid else 'INVALID'}, saved {before} -> {after} bytes"
    if failed := process.returncode not in (0, -sent, 130):
        line += f", EXIT CODE {process.returncode}"
    in_time = sent == signal.SIGKILL or seconds <= MAX_SECONDS_TO_END
    return line, valid and after >= before and in_time and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interrupt", action="store_true", help="Ctrl-C instead of SIGKILL")
    flags = parser.parse_args()
    sent = signal.SIGINT if flags.interrupt else signal.SIGKILL
    sys.path.insert(0, str(ROOT / "tests"))
    generator, kills, bad, ended = random.Random(flags.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload = prepare(folder)
        span = time_whole(workload, folder / "whole", folder)
        whole, number = saved(folder / "whole"), 0
        print(f"uninterrupted: saved {whole} bytes; kills fall between {span[0]:.1f} and {span[1]:.1f} s", flush=True)
        while kills < flags.kills:
            line, good = kill_once(generator.uniform(*span), sent, folder / f"run{number}", workload, folder)
            print(f"{kills:3} {line}", flush=True)
            bad += not good
            if line.startswith("ended"):
                ended += 1
                bad += saved(folder / f"run{number}") < whole
                number += 1
            kills += line.startswith("killed")
    print(f"{kills} kills; {ended} runs ended by themselves; {bad} invalid, saved less than they must, or ended late")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
