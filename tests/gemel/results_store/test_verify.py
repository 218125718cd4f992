"""The verify command: what it prints, what it evaluates, and its exit code."""

from pathlib import Path

import pytest
from pico import PicoNet
from results_samples import manifest_of, pico_models, slim_models, tree, write
from torch import nn

from gemel.__main__ import main
from gemel.evaluation.eval_method import evaluate
from gemel.results_store.checkpoint import write_checkpoint
from gemel.results_store.write import update_run, write_results
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from gemel.workload import read_workload

TESTS = Path(__file__).resolve().parents[2]
WORKLOAD = """
import sys
sys.path.insert(0, {tests!r})
from pico import PicoNet, classification_entry

def create_model_dict():
    return {{
        "north_pico": classification_entry(PicoNet(3), {acc}, batch_size=6),
        "south_pico": classification_entry(PicoNet(4, extra=1), {acc}, batch_size=6),
    }}
"""


pytestmark = pytest.mark.usefixtures("forgets_mine")


@pytest.fixture
def merged(entries, data, tmp_path):
    """A result of two trained classifiers with one layer tied, with their measured accuracies."""
    tasks, _ = read_workload({name: entries[name] for name in ("north_pico", "south_pico")})
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()}).eval()
    (group,) = [g for g in find_groups(models) if g.occurrences[0].layer == "conv1"]
    models["south_pico"].load_state_dict(
        {
            **models["south_pico"].state_dict(),
            **{f"conv1.{k}": v for k, v in models["north_pico"].conv1.state_dict().items()},
        }
    )
    tie(models, (group,), "first")
    manifest = manifest_of(models)
    for name, task in tasks.items():
        accuracy = evaluate(task, data[name].val)
        manifest["tasks"][name].update(merged_acc=accuracy, target_acc=accuracy, unmerged_acc=1.0)
    write_results(tmp_path / "results", models, manifest, {"history": []})
    (tmp_path / "mine.py").write_text(WORKLOAD.format(tests=str(TESTS), acc=1.0))
    return tmp_path / "results"


def run(capsys, *arguments) -> tuple[int, str]:
    code = main(["verify", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_every_task_is_evaluated_again_with_a_workload(merged, datasets, tmp_path, capsys):
    before = tree(merged)
    code, printed = run(capsys, merged, "--workload", tmp_path / "mine.py", "--datasets", datasets, "--device", "cpu")
    assert code == 0, printed
    for name in ("north_pico", "south_pico"):
        assert f"ok    {name}: reaches " in printed
    assert "1 shared layers are one parameter each after loading, and only those" in printed
    assert "all tasks: " in printed and tree(merged) == before
    assert {line.split()[0] for line in printed.splitlines()} == {"ok"}


def test_an_accuracy_that_is_not_reached_is_a_failure(entries, datasets, tmp_path, capsys):
    models = nn.ModuleDict({"north_pico": PicoNet(3)}).eval()
    write(tmp_path / "results", models)  # says 0.85, and was never trained
    (tmp_path / "mine.py").write_text(WORKLOAD.format(tests=str(TESTS), acc=0.9))
    code, printed = run(
        capsys, tmp_path / "results", "--workload", tmp_path / "mine.py", "--datasets", datasets, "--device", "cpu"
    )
    assert code == 1 and "FAIL  north_pico: reaches" in printed and "the manifest says 0.8500, target 0.8000" in printed


def test_what_cannot_be_checked_is_skipped_and_says_why(merged, tmp_path, capsys):
    code, printed = run(capsys, merged)
    assert code == 0
    assert "skip  north_pico: not loaded: no architecture is recorded, and no --workload has the task" in printed
    code, printed = run(capsys, merged, "--workload", tmp_path / "mine.py", "--datasets", tmp_path, "--device", "cpu")
    assert code == 0 and "skip  north_pico: not evaluated: no dataset 'north_CL' in" in printed
    assert "shared layers are one parameter each" in printed


def test_an_eval_method_that_fails_is_a_failure_with_one_line(merged, datasets, tmp_path, capsys):
    text = WORKLOAD.format(tests=str(TESTS), acc=1.0) + "\n_create = create_model_dict\n"
    text += "def broken(model, loader):\n    raise RuntimeError('no such camera\\nsecond line')\n"
    text += "def create_model_dict():\n    d = _create()\n    d['north_pico']['eval_method'] = broken\n    return d\n"
    (tmp_path / "mine.py").write_text(text)
    code, printed = run(capsys, merged, "--workload", tmp_path / "mine.py", "--datasets", datasets, "--device", "cpu")
    assert code == 1 and "FAIL  north_pico: cannot be evaluated: RuntimeError: no such camera\n" in printed


def test_what_else_lies_in_the_folder_is_named(tmp_path, capsys):
    write(tmp_path, slim_models())
    write_checkpoint(tmp_path, {"step": 1})
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "weights" / "a_slim.pt.tmp").write_text("x")
    (tmp_path / "merged-0123456789abcdef.safetensors").write_text("x")
    code, printed = run(capsys, tmp_path)
    assert code == 0 and "in_flight.pt: the round in flight" in printed
    assert "notes.txt': not a file of the result; not checked" in printed
    assert printed.count("left by a run that was interrupted; the next one removes it") == 2


def test_damage_is_named_and_one_failure_makes_the_exit_code_1(tmp_path, capsys):
    manifest = write(tmp_path, slim_models())
    file = tmp_path / manifest["store"]["file"]
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    code, printed = run(capsys, tmp_path)
    assert code == 1 and f"FAIL  {file}: its sha256 is not the one in the manifest: the file is damaged" in printed
    assert "skip  tensors, ties and accuracies: the manifest or the store is damaged" in printed
    file.write_bytes(content[:-10])
    code, printed = run(capsys, tmp_path)
    assert code == 1 and f"({len(content) - 10} bytes of {len(content)})" in printed
    file.unlink()
    code, printed = run(capsys, tmp_path)
    assert code == 1 and f"FAIL  {file}: the manifest names it, but it is missing" in printed
    code, printed = run(capsys, tmp_path / "nowhere")
    assert code == 1 and printed.startswith("FAIL  ") and printed.count("\n") == 1


def test_a_wrong_command_is_exit_code_2(merged, tmp_path, capsys):
    assert main(["verify", str(merged), "--workload", str(tmp_path / "none.py")]) == 2
    assert "which is no file" in capsys.readouterr().err


def test_ties_are_looked_at_after_loading(tmp_path, capsys, monkeypatch):
    """Both a loader that does not tie and one that ties too much are found."""
    from gemel.results_store import verify as results_verify

    write(tmp_path / "tied", slim_models())
    write(tmp_path / "apart", slim_models(tied=False))
    load = results_verify.load_merged
    monkeypatch.setattr(results_verify, "load_merged", lambda path, *rest: load(tmp_path / "apart"))
    code, printed = run(capsys, tmp_path / "tied")
    assert code == 1 and "not one and the same layer after loading: a_slim: " in printed
    assert "distinct bytes in memory" in [line for line in printed.splitlines() if line.startswith("FAIL")][-1]
    monkeypatch.setattr(results_verify, "load_merged", lambda path, *rest: load(tmp_path / "tied"))
    code, printed = run(capsys, tmp_path / "apart")
    assert code == 1 and "is shared with a_slim, but in no shared layer" in printed


def test_verify_accepts_any_content_of_run(tmp_path, capsys):
    write(tmp_path, pico_models())
    update_run(tmp_path, {"flags": 7})
    assert run(capsys, tmp_path)[0] == 0
