"""One merge in a process of its own: `python -m benchmarks.one_run FOLDER`, started by benchmarks.runs.

FOLDER/spec.json states the workload and the options. The result goes to FOLDER/results; FOLDER/finished.json is written
last, so a folder without it holds a run that did not finish.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.workloads import model_dict_of
from gemel.workload import WorkloadError
from merge_workloads import EXIT_DONE, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, merge_workload

SPEC, RESULTS, FINISHED = "spec.json", "results", "finished.json"
LOGGER = "gemel.training.validation"
VALIDATION_MESSAGE = "step %d: %s %.4f of %.4f"  # logged there, level DEBUG, after each evaluation


class Validations(logging.Handler):
    """Collects every evaluation during training, in order: the learning curves, which the manifest does not hold."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.began = time.monotonic()
        self.rows: list[dict] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == LOGGER and record.msg == VALIDATION_MESSAGE and isinstance(record.args, tuple):
            step, task, accuracy, target = record.args
            seconds = time.monotonic() - self.began
            row = {"step": step, "task": task, "accuracy": accuracy, "target": target, "seconds": seconds}
            self.rows.append(row)


def observe_validations() -> Validations:
    """Adds a handler that collects the trainer's evaluations; warnings still go to stderr."""
    validations, warnings = Validations(), logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[validations, warnings])
    logging.getLogger(LOGGER).setLevel(logging.DEBUG)
    return validations


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file atomically: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the merge that the folder's spec.json states; returns the exit code of merge_workloads.py."""
    folder = Path((sys.argv[1:] if arguments is None else arguments)[0])
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["settings"]["threads"])
    validations = observe_validations()
    try:
        merge_workload(model_dict_of(spec["workload"]), folder / RESULTS, datasets=spec["datasets"], **spec["call"])
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    write_json(folder / FINISHED, {"validations": validations.rows})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
