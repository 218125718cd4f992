"""A fault at the k-th call of what can fail: the folder stays valid, the fault is named, the next run goes on.

One merge runs to its end. At each call at which a fault is to be, it is forked: the child meets the fault there and is
checked to its end, and the parent, with the folder as it was, goes on to the next call. The exhaustive test covers all
calls, on two cores with

    python -m pytest -n 2 -m exhaustive tests/gemel/merging/test_faults.py
"""

import builtins
import copy
import itertools
import logging
import os
import shutil
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import classification_entry, to_tensor, write_classification
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from gemel.datasets.folders import ClassificationFolder
from gemel.evaluation import eval_method
from gemel.results_store import files
from gemel.results_store.manifest import has_results, read_result
from gemel.results_store.verify import FAIL, verify
from merge_workloads import merge_workload

# A first trial that is kept after a fit alone, and a second one that is trained and undone.
OPTIONS = {"device": "cpu", "tolerance": 1.0, "max_epochs": 1.0, "num_workers": 0, "quiet": True}
ERRORS = {
    "allocation": torch.OutOfMemoryError("out of memory"),
    "evaluation": RuntimeError("the evaluation failed"),
    "loader": OSError("the disk with the images is gone"),
    "write": OSError(28, "No space left on device"),
}
SITES = {
    "evaluation": [(eval_method, "_evaluate_once")],
    "loader": [(ClassificationFolder, "load")],
    "write": [(os, "fsync"), (os, "replace"), (files, "open"), (Path, "unlink"), (Path, "mkdir")],
}
NUM_SAMPLES = 2  # calls of each kind that are always covered, evenly spread over a merge
SHARDS = 8  # of all calls, for several processes
CHILD_SECONDS = 120


class Faults:
    """Counts calls of each kind; at those that are chosen it forks, and raises in the child."""

    def __init__(self, folder: Path, chosen: Callable[[str, int], bool]):
        self.folder, self.chosen = folder, chosen
        self.calls, self.covered = Counter(), Counter()
        self.met: str | None = None  # in a child: the kind of its fault
        self.where = ""  # of the call that met it
        self.failed: list[str] = []

    def call(self, what: str) -> None:
        if self.met is not None:
            return
        self.calls[what] += 1
        if self.chosen(what, self.calls[what]):
            self.covered[what] += 1
            self.fork(what)

    def fork(self, what: str) -> None:
        assert len(threading.enumerate()) == 1, f"a fork would lose {threading.enumerate()}"
        before = self.folder.with_name("before")
        if self.folder.exists():
            shutil.copytree(self.folder, before)
        child = os.fork()
        if child == 0:
            self.met, self.where = what, "".join(traceback.format_stack(limit=25))
            signal.alarm(CHILD_SECONDS)
            raise ERRORS[what]
        _, status = os.waitpid(child, 0)
        if status != 0:
            said = self.said.read_text() if self.said.exists() else f"ended with {status}, as one that hangs does"
            self.failed.append(f"{what}, call {self.calls[what]}: {said}")
        self.put_back(before)

    @property
    def said(self) -> Path:
        return self.folder.with_name("said.txt")

    def put_back(self, before: Path) -> None:
        """The folder is the same one, with the content that it had."""
        for path in self.folder.iterdir() if self.folder.exists() else ():
            shutil.rmtree(path) if path.is_dir() else os.unlink(path)
        if before.exists():
            shutil.copytree(before, self.folder, dirs_exist_ok=True)
            shutil.rmtree(before)
        elif self.folder.exists():
            os.rmdir(self.folder)
        self.said.unlink(missing_ok=True)

    def before(self, what: str, honest: Callable) -> Callable:
        def function(*args, **kwargs):
            if not isinstance(args[0], Path) or self.folder in (args[0], *args[0].parents):
                self.call(what)
            return honest(*args, **kwargs)

        return function


class Allocations(TorchDispatchMode):
    """Every operation of torch that returns a new tensor."""

    def __init__(self, faults: Faults):
        super().__init__()
        self.faults = faults

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(str(result.type) == "Tensor" and result.alias_info is None for result in func._schema.returns):
            self.faults.call("allocation")
        return func(*args, **(kwargs or {}))


class Heard(logging.Handler):
    """Keeps the warnings that are logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class Smallest(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


def fitted(folder: Path, seed: int) -> nn.Module:
    """A model that knows the four train images of a dataset."""
    torch.manual_seed(seed)
    model = Smallest().train()
    images = torch.stack([to_tensor(Image.open(file)) for file in sorted(folder.glob("train/*/*.png"))])
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.tensor([0, 0, 1, 1])).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """Merges two models on two classes of two images, which the tasks number differently; a function of the folder."""
    for seed, name in enumerate(("north_CL", "south_CL")):
        write_classification(tmp_path, name, classes=2, images=2, seed=seed)
    for split in ("train", "val"):
        first, second = (tmp_path / "south_CL" / split / name for name in ("class0", "class1"))
        first.rename(tmp_path / "moved"), second.rename(first), (tmp_path / "moved").rename(second)
    models = {f"{name}_net": fitted(tmp_path / f"{name}_CL", seed) for seed, name in enumerate(("north", "south"))}
    monkeypatch.setattr(files, "_flock", lambda *_: None)  # the parent holds the lock while a child is checked
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # no thread
    if tqdm.monitor is not None:  # of an earlier test
        tqdm.monitor.exit()
        monkeypatch.setattr(tqdm, "monitor", None)

    def merge(folder: Path) -> dict:
        entries = {n: classification_entry(copy.deepcopy(model), 1.0, batch_size=4) for n, model in models.items()}
        return merge_workload(entries, folder, datasets=tmp_path, **OPTIONS)

    return merge


@pytest.fixture
def with_faults(merge, tmp_path):
    """Merges, with faults at the calls that chosen(kind, number of the call) says; the Faults."""

    number = itertools.count()

    def with_faults(chosen: Callable[[str, int], bool]) -> Faults:
        faults, heard, raised = Faults(tmp_path / f"results{next(number)}" / "results", chosen), Heard(), None
        faults.folder.parent.mkdir()
        logging.getLogger().addHandler(heard)
        try:
            with pytest.MonkeyPatch.context() as patch, Allocations(faults):
                for what, sites in SITES.items():
                    for owner, name in sites:
                        honest = getattr(owner, name, None) or getattr(builtins, name)
                        patch.setattr(owner, name, faults.before(what, honest), raising=False)
                merge(faults.folder)
        except BaseException as error:
            raised = error
        finally:
            logging.getLogger().removeHandler(heard)
        if faults.met is None:
            assert raised is None, raised
            return faults
        code = 1
        try:
            check(ERRORS[faults.met], raised, heard.lines, faults.folder, merge)
            code = 0
        except BaseException:
            faults.said.write_text(f"{traceback.format_exc()}\nthe merge raised {raised!r}, behind\n{faults.where}")
        finally:
            os._exit(code)

    return with_faults


def check(fault: Exception, raised: BaseException | None, heard: list[str], folder: Path, merge: Callable) -> None:
    """What holds after a fault: it is named, the folder is valid, the next run goes on from there to its end.

    A fault that is not named changes nothing: the merge with it ended as the one without it.
    """
    said = " ".join([*heard, str(raised), str(getattr(raised, "__cause__", None))])
    named = str(fault.args[-1]).lower() in said.lower()
    assert named or raised is None, said
    if has_results(folder):
        read_result(folder)
    assert set(files.leftovers(folder)) <= {files.PENDING}
    manifest = merge(folder)
    assert manifest["run"]["finished"] and all(task["met"] for task in manifest["tasks"].values())
    assert manifest["shared_layers"] or named, "what is kept without a fault"
    assert not [line for line in verify(folder) if line.status == FAIL]
    assert not files.leftovers(folder)
    if not named:
        expected = merge(folder.with_name("without"))
        assert all(manifest[part] == expected[part] for part in ("tasks", "shared_layers")), "not named, but it matters"


def test_a_fault_at_some_calls(with_faults):
    calls = with_faults(lambda what, k: False).calls
    assert set(calls) == set(ERRORS)
    places = {what: {1 + i * (calls[what] - 1) // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)} for what in calls}
    faults = with_faults(lambda what, k: k in places[what])
    assert faults.covered == {what: NUM_SAMPLES for what in ERRORS}
    assert not faults.failed, "\n\n".join(faults.failed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_fault_at_any_call(shard, with_faults):
    faults = with_faults(lambda what, k: k % SHARDS == shard)
    print(f"calls with a fault: {dict(faults.covered)}, of {dict(faults.calls)}")
    assert not faults.failed, f"{len(faults.failed)} failed\n" + "\n\n".join(faults.failed)
