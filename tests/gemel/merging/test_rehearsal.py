"""--check: finds what a merge would stumble over, leaves models as they are and no file."""

import copy
import time

import pytest
import torch
from pico import PicoNet, classification_entry, same_state
from results_samples import tree

from gemel.console.tables import WIDTH
from gemel.merging.check import telling_samples
from gemel.merging.rehearsal import OK, PROBLEM, boxes_on_images
from merge_workloads import check_workload


def checked(entries, datasets, tmp_path, capsys, **options):
    number = check_workload(entries, tmp_path / "results", datasets=datasets, device="cpu", **options)
    return number, capsys.readouterr().out


def test_a_right_workload_passes_and_stays_as_it_is(entries, datasets, tmp_path, capsys):
    before = {name: copy.deepcopy(entry["model"].state_dict()) for name, entry in entries.items()}
    modes = {name: [m.training for m in entry["model"].modules()] for name, entry in entries.items()}
    began = time.process_time()
    number, said = checked(entries, datasets, tmp_path, capsys)
    assert number == 0 and time.process_time() - began < 20
    assert said.endswith("nothing stands in the way: the same command without --check merges\n")
    for name, entry in entries.items():
        assert same_state(entry["model"].state_dict(), before[name]), name
        assert [m.training for m in entry["model"].modules()] == modes[name]
        assert all(p.grad is None for p in entry["model"].parameters())
        measured = f"{entry['unmerged_acc']:.3f} on all "
        assert f"{name}: accuracy {measured}" in " ".join(said.split())
    assert not list(tmp_path.iterdir()) and max(map(len, said.splitlines())) <= WIDTH


def test_the_contact_sheet_is_the_only_file(entries, datasets, tmp_path, capsys):
    page = tmp_path / "check.html"
    assert checked(entries, datasets, tmp_path, capsys, html=page)[0] == 0
    text = page.read_text()
    assert list(tree(tmp_path)) == ["check.html"] and text.count('class="card"') == 12
    assert "label: class" in text and "boxes" in text and len(text.encode()) < 300_000


def falls_apart(model, loader):
    raise RuntimeError("no such metric")


class Loud(PicoNet):
    def forward(self, images):
        return super().forward(images) * (float("inf") if self.training else 1.0)


class Deaf(PicoNet):
    def forward(self, images):
        return super().forward(images).detach()


def test_the_dry_run_is_that_of_a_merge(entries, datasets, tmp_path, capsys, monkeypatch):
    """On samples of extreme sizes and classes, not on what comes first."""
    looked_at = []

    def spy(task, train):
        looked_at.append(task.name)
        return telling_samples(task, train)

    monkeypatch.setattr("gemel.merging.check.telling_samples", spy)
    assert checked(entries, datasets, tmp_path, capsys)[0] == 0 and looked_at == list(entries)


def test_a_model_that_came_frozen_is_no_problem(entries, datasets, tmp_path, capsys):
    """A merge trains it where needed, and freezes it again."""
    entries["north_pico"]["model"].requires_grad_(False)
    number, text = checked(entries, datasets, tmp_path, capsys)
    assert number == 0 and "parameters can be trained" in " ".join(text.split())
    assert not any(parameter.requires_grad for parameter in entries["north_pico"]["model"].parameters())


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("north_pico", {"eval_method": falls_apart}, "evaluating fails: RuntimeError: no such metric"),
        ("north_pico", {"unmerged_acc": 1.0, "tolerance": 1.0, "model": PicoNet(3)}, "correct unmerged_acc to"),
        ("north_pico", {"model": Loud(3)}, "a loss is not finite"),
        ("north_pico", {"model": Deaf(3)}, "depends on no parameter that is trained"),
    ],
)
def test_what_a_merge_would_stumble_over(entries, datasets, tmp_path, capsys, name, change, said):
    entries[name] = {**entries[name], **change}
    number, text = checked(entries, datasets, tmp_path, capsys)
    assert number >= 1 and said in " ".join(text.split()) and "then check again" in text
    assert not list(tmp_path.iterdir())


def test_nothing_to_merge_and_no_room(datasets, tmp_path, capsys, monkeypatch):
    alone = {"north_pico": classification_entry(PicoNet(3), 0.01, batch_size=6)}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    number, said = checked(alone, datasets, tmp_path, capsys)
    assert number == 1 and "there is nothing to merge" in said and "free some, or --results" in said


@pytest.mark.parametrize(
    "box, verdict, said",
    [
        ([2, 2, 8, 8], OK, "1 boxes of 1 images after the train transform, all on their images"),
        ([11, 2, 18, 8], PROBLEM, "1 outside their image, 0 without an area"),
        ([5, 2, 5, 8], PROBLEM, "0 outside their image, 1 without an area"),
    ],
)
def test_boxes_against_their_images(tasks, box, verdict, said):
    """Rare faults of a random transform, which the check of the dataset need not have drawn."""
    batch = ([torch.zeros(3, 16, 16)], [{"boxes": torch.tensor([box]), "labels": torch.tensor([1])}])
    (finding,) = boxes_on_images(tasks["east_pico"], batch)
    assert finding.verdict == verdict and said in finding.text
