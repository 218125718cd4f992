"""The plan: from names alone, its numbers agree with each other and with what groups say."""

import json
from pathlib import Path

import pytest
from pico import PicoNet, classification_entry

from gemel.__main__ import main
from gemel.console import tables
from gemel.merging.plan import build_named, make_plan, plan_of, plan_text
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.workload import WorkloadError
from model_architectures import build


def planned(*names):
    return make_plan(build_named(names))


def test_pairs_and_optimal_agree_with_the_groups_of_each_pair():
    names = ("resnet18", "resnet34", "squeezenet1_1")
    found = planned(*names)
    models = {name: build(name, 1000) for name in names}
    assert found.models == {n: sum(t.nbytes for t in m.state_dict().values()) for n, m in models.items()}
    for a, b, common in found.pairs:
        assert common == saved_bytes(find_groups({a: models[a], b: models[b]}))
    assert found.optimal_saved_bytes == saved_bytes(find_groups(models))
    assert found.total_bytes - sum(found.added.values()) == found.optimal_saved_bytes, "what each adds sums up"
    assert found.added["resnet18"] == found.models["resnet18"]


def test_a_name_given_twice_is_two_models_and_classes_can_be_named():
    found = planned("squeezenet1_1", "squeezenet1_1", "squeezenet1_1:7")
    first, second, third = found.models
    assert (second, third) == ("squeezenet1_1_2", "squeezenet1_1_3")
    assert found.pairs[0][2] > found.pairs[1][2] > 0, "with another number of classes the last layer differs"
    assert found.models[first] > found.models[third]


def test_every_wrong_name_is_listed_with_the_nearest_ones():
    with pytest.raises(WorkloadError) as raised:
        build_named(["resnt50", "resnet18", "resnet18:none"])
    assert len(raised.value.problems) == 2
    assert "resnet50" in str(raised.value) and "resnet18:N" in str(raised.value)


def test_the_json_file_has_the_numbers_of_the_record(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "resnet18", "resnet34", "--json", "plan.json", "--html", "plan.html"]) == 0
    found, written = planned("resnet18", "resnet34"), json.loads(Path("plan.json").read_text())
    assert written["models"] == found.models and written["total_bytes"] == found.total_bytes
    assert written["optimal_saved_bytes"] == found.optimal_saved_bytes
    assert written["pairs"] == [["resnet18", "resnet34", found.optimal_saved_bytes]]
    assert f"in all {tables.mib(found.optimal_saved_bytes)}" in capsys.readouterr().out


def test_without_files_named_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "squeezenet1_0", "squeezenet1_1", "--memory", "1MiB"]) == 0
    assert not list(tmp_path.iterdir()) and "do not fit, even at best" in capsys.readouterr().out
    assert main(["plan", "squeezenet9", "--html", "nowhere/plan.html"]) == 2
    said = capsys.readouterr().err
    assert "squeezenet1_0" in said and "--html" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1, 5, 9])
def test_the_text_fits_a_terminal(number):
    entries = {f"a_camera_with_quite_a_long_name_{i}_x": classification_entry(PicoNet(), 0.5) for i in range(number)}
    text = plan_text(plan_of(entries), 1 << 30)
    assert max(map(len, text.splitlines())) <= tables.WIDTH and "a box of 1 GiB: the weights fit without" in text


@pytest.mark.parametrize("box, said", [(100, "without merging"), (70, "once merged"), (50, "even at best")])
def test_what_fits_a_box(box, said):
    entries = {f"{name}_x": classification_entry(PicoNet(), 0.5) for name in "ab"}
    found = plan_of(entries)
    assert 0.5 < 1 - found.optimal_saved_bytes / found.total_bytes < 0.7
    assert said in plan_text(found, int(found.total_bytes * box / 100))
