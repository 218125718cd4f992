"""What a manifest must be to be accepted. (Many more that are refused: test_fuzz.py.)"""

import json

import pytest
from results_samples import pico_models, write

from gemel.results_store.files import ResultsError
from gemel.results_store.manifest import SHOWN, _raise_if_any, digest_of, has_results, read_manifest, read_result, seal
from gemel.results_store.schema import HISTORY, _history_problems, _is_accuracy, _is_number


def test_a_folder_without_manifest_is_no_result(tmp_path):
    assert not has_results(tmp_path)
    with pytest.raises(ResultsError, match="merged.json: not found, so this folder holds no result"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", "format: got 'list'"),
        ('{"format": 9}', "got 9; allowed: 1"),
        ('{"format": 1}', "normalisation is missing; tasks is missing; shared_layers is missing; and 8 more"),
        ('{"format": 1, "format": 1}', "a key is repeated among"),
        ('{"format": NaN}', "NaN is not a number in JSON"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "merged.json").write_text(text)
    with pytest.raises(ResultsError, match=f"merged.json: .*{message}"):
        read_manifest(tmp_path)


def test_the_seal_is_over_the_content_not_the_layout():
    manifest = seal({"b": [1, 2.5, "ä"], "a": (1, 2)})
    assert manifest["a"] == [1, 2] and manifest["sha256"] == digest_of(manifest)
    assert digest_of(json.loads(json.dumps(manifest, indent=3, sort_keys=True))) == manifest["sha256"]
    assert digest_of({**manifest, "a": [2, 1]}) != manifest["sha256"]


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("tasks", lambda tasks: tasks["a_x"].update(met=False), "a_x: met: got False, but merged_acc 0.85, target 0.8"),
        (
            "tasks",
            lambda tasks: tasks["a_x"].update(target_acc=0.95, met=False),
            "target_acc: got 0.95; allowed: up to",
        ),
        (
            "tasks",
            lambda tasks: tasks["a_x"].update(merged_acc=1.5),
            r"a_x: merged_acc: got 1.5; allowed: a number in \[",
        ),
        ("tasks", lambda tasks: tasks["a_x"].update(class_names="car"), "a_x: class_names: got 'car'; allowed: a list"),
        (
            "tasks",
            lambda tasks: tasks["a_x"].update(class_names=[1]),
            r"class_names: got \[1\]; allowed: a list of texts",
        ),
        ("memory", lambda memory: memory.update(optimal_saved_bytes=0), "more than optimal_saved_bytes"),
        ("memory", lambda memory: memory.update(merged_bytes=1), "saved_bytes: got .*, but the shared layers save"),
        ("shared_layers", lambda layers: layers[0]["occurrences"][0].update(layer="fc"), "do not share"),
        ("shared_layers", lambda layers: layers[0]["occurrences"][0].update(task="d_x"), "there is no task 'd_x'"),
        ("shared_layers", lambda layers: layers[0]["occurrences"].append(layers[0]["occurrences"][0]), "occurs twice"),
        ("stale", lambda stale: stale.update({"weights/../x.pt": "0" * 64}), "stale: got 'weights/../x.pt'"),
        ("files", lambda files: files.update({"../x": "0" * 64}), "files: '../x' is not a file of a result"),
        ("files", lambda files: files.pop("weights/a_x.pt"), "files: 'weights/a_x.pt' is missing"),
    ],
)
def test_parts_that_do_not_agree(tmp_path, part, change, message):
    manifest = write(tmp_path, pico_models())
    change(manifest[part])
    (tmp_path / "merged.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(ResultsError, match=f"merged.json: .*{message}"):
        read_result(tmp_path)


@pytest.mark.parametrize("names", [["car", "lorry"], None, ...])
def test_class_names_may_be_there(tmp_path, names):
    """Manifests of earlier versions have none."""
    manifest = write(tmp_path, pico_models())
    if names is not ...:
        manifest["tasks"]["a_x"]["class_names"] = names
    (tmp_path / "merged.json").write_text(json.dumps(seal(manifest)))
    read, _ = read_result(tmp_path)
    assert read["tasks"]["a_x"].get("class_names", ...) == names


@pytest.mark.parametrize("permuted", [True, False, ...])
def test_a_task_may_say_whether_it_is_permuted(tmp_path, permuted):
    manifest = write(tmp_path, pico_models())
    if permuted is not ...:
        manifest["tasks"]["a_x"]["permuted"] = permuted
    (tmp_path / "merged.json").write_text(json.dumps(seal(manifest)))
    assert read_result(tmp_path)[0]["tasks"]["a_x"].get("permuted", ...) == permuted


@pytest.mark.parametrize("permuted", [None, 1, "true", []])
def test_whether_a_task_is_permuted_is_true_or_false(tmp_path, permuted):
    manifest = write(tmp_path, pico_models())
    manifest["tasks"]["a_x"]["permuted"] = permuted
    (tmp_path / "merged.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(ResultsError, match="a_x: permuted: got .*; allowed: true or false"):
        read_manifest(tmp_path)


def test_a_change_by_hand_is_noticed(tmp_path):
    write(tmp_path, pico_models())
    file = tmp_path / "merged.json"
    file.write_text(file.read_text().replace('"merged_acc": 0.85', '"merged_acc": 0.86', 1))
    with pytest.raises(ResultsError, match="merged.json: sha256: is not that of the content: the file was changed"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "precision, message",
    [
        (None, "precision: got None; allowed: a dictionary"),
        (
            {"weights": "int4", "arithmetic": "float32", "device": "cpu"},
            "precision: weights: got 'int4'; allowed: float32",
        ),
        ({"weights": "float16", "device": "cpu"}, "precision: arithmetic is missing"),
        ({"weights": "float16", "arithmetic": "float32", "device": "cpu"}, None),
    ],
)
def test_the_type_of_the_weights_is_checked(tmp_path, precision, message):
    manifest = write(tmp_path, pico_models())
    (tmp_path / "merged.json").write_text(json.dumps(seal({**manifest, "precision": precision})))
    if message is None:
        assert read_result(tmp_path)[0]["precision"] == precision
        return
    with pytest.raises(ResultsError, match=message):
        read_result(tmp_path)


@pytest.mark.parametrize("more", [0, 1, 7])
def test_a_few_of_many_problems_are_listed(more, tmp_path):
    problems = [f"problem {i}" for i in range(SHOWN + more)]
    with pytest.raises(ResultsError) as raised:
        _raise_if_any(tmp_path / "merged.json", iter(problems))
    rest = f"; and {more} more" if more else ""
    assert str(raised.value) == f"{tmp_path / 'merged.json'}: {'; '.join(problems[:SHOWN])}{rest}"
    _raise_if_any(tmp_path / "merged.json", iter(()))


@pytest.mark.parametrize("value", [True, "1", None, [1], float("nan"), float("inf"), 1e300, -1e300, 10**301])
def test_what_is_no_number(value):
    assert not _is_number(value) and not _is_accuracy(value)
    assert _is_number(9e299) and _is_number(-9e299) and _is_number(0)
    assert _is_accuracy(0) and _is_accuracy(1) and not _is_accuracy(1.01) and not _is_accuracy(-0.01)


@pytest.mark.parametrize("value, fits", [("kept", True), ("refitted", True), (None, True), ("", False), (1, False)])
def test_what_became_of_frozen_normalisation_may_be_there(tmp_path, value, fits):
    write(tmp_path, pico_models())
    manifest = read_manifest(tmp_path)
    manifest["tasks"]["a_x"]["frozen_normalisation"] = value
    (tmp_path / "merged.json").write_text(json.dumps(seal(manifest)))
    if fits:
        assert read_manifest(tmp_path)["tasks"]["a_x"]["frozen_normalisation"] == value
    else:
        with pytest.raises(ResultsError, match=r"a_x: frozen_normalisation: .*'kept', 'refitted'"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("entry", [3, None, {}, {"seconds": -1.0}, {"seconds": "1"}])
def test_what_is_no_entry_of_the_history(entry):
    right = dict.fromkeys(HISTORY, 1.0)
    wrong = {**right, **entry} if isinstance(entry, dict) and entry else entry
    assert not list(_history_problems([right, right]))
    (problem,) = _history_problems([right, wrong])
    assert problem.startswith("run: history: got ") and "all numbers from 0 on" in problem
