"""ONNX: the same answers, and every distinct weight once in one file."""

import sys

import pytest
import torch
from edge_samples import WIDE_SIZE, check_memory_of_sessions, wide_models, write_slim
from results_samples import fresh_models, manifest_of, pico_models, slim_models, write

from gemel import load_merged
from gemel.__main__ import main
from gemel.edge.export import FOLDER, RECORD, WEIGHTS, export, open_models, open_session
from gemel.forward.arithmetic import STORE_DTYPES
from gemel.results_store.files import ResultsError
from gemel.results_store.write import statistics_of, write_results
from gemel.sharing.groups import Occurrence, find_groups, saved_bytes, to_plain
from gemel.sharing.normalisation import can_share, group_of, own_tensors, tie_normalisation
from gemel.sharing.precision import groups_as_stored, round_weights, stored_bytes
from gemel.sharing.tying import tie
from model_architectures import build

SIZE = 32


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


def test_classifiers_are_exported_with_their_weights_once(onnx, tmp_path):
    write_slim(tmp_path)
    assert main(["edge", "export", str(tmp_path), "--size", str(SIZE)]) == 0
    whole, opened = load_merged(tmp_path), open_models(tmp_path)
    for batch in (1, 3):
        images = torch.rand(batch, 3, SIZE, SIZE)
        for task, model in whole.items():
            with torch.inference_mode():
                assert torch.allclose(opened[task](images), model(images), atol=1e-4)
    places = {task: references(onnx, tmp_path / FOLDER / f"{task}.onnx") for task in whole}
    common = set(places["a_slim"].values()) & set(places["b_slim"].values())
    a, b = (dict(model.named_parameters()) for model in whole.values())
    shared = {name for name in a if name in b and a[name] is b[name] and a[name].nbytes >= 1024}
    assert shared and {places["a_slim"][name] for name in shared} <= common
    distinct = {place for found in places.values() for place in found.values()}
    assert (tmp_path / FOLDER / WEIGHTS).stat().st_size == sum(-(-length // 4096) * 4096 for _, length in distinct)


def references(onnx, file) -> dict[str, tuple[int, int]]:
    """Tensor of a graph -> (offset, length) in the file of weights."""
    graph = onnx.load(str(file), load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == WEIGHTS
            found[tensor.name.removeprefix("model.")] = int(entries["offset"]), int(entries["length"])
    return found


@pytest.mark.parametrize("store", ["int8", "shared normalisation"])
def test_rounded_weights_and_shared_normalisation_are_exported_once(onnx, tmp_path, store):
    models, manifest = slim_models(), manifest_of(slim_models())
    if store == "int8":
        round_weights(models.values(), torch.int8)
        groups = groups_as_stored(find_groups(models), models, torch.int8)
        manifest["precision"] = {"weights": "int8", "arithmetic": "float32", "device": "cpu"}
    else:
        layers = [name for name, module in models["a_slim"].named_modules() if can_share(module)]
        norms = [group_of(models, [Occurrence(task, name) for task in models]) for name in layers]
        for group, name in zip(norms, layers, strict=True):
            given = {
                key: torch.rand(own.shape) + 0.5
                for key, own in own_tensors(models["a_slim"].get_submodule(name)).items()
            }
            tie_normalisation(models, group, given)
        groups = (*find_groups(models), *norms)
    merged, saved = stored_bytes(models, STORE_DTYPES.get(store, torch.float32)), saved_bytes(groups)
    manifest["shared_layers"] = to_plain(groups)
    manifest["memory"] = {"unmerged_bytes": merged + saved, "merged_bytes": merged} | dict.fromkeys(
        ("saved_bytes", "optimal_saved_bytes"), saved
    )
    write_results(tmp_path, models, manifest, statistics_of(manifest))
    export(tmp_path, SIZE)
    images, opened = torch.rand(3, 3, SIZE, SIZE), open_models(tmp_path)
    for task, model in load_merged(tmp_path).items():
        with torch.inference_mode():
            torch.testing.assert_close(opened[task](images), model(images), atol=1e-4, rtol=1e-4)
    a, b = (references(onnx, tmp_path / FOLDER / f"{task}.onnx") for task in models)
    assert a and all(place == b[name] for name, place in a.items() if name in b and not name.startswith("fc"))


MEASURE = """
import sys, torch
from edge_samples import WIDE_SIZE, WIDE_TASKS, pss
from gemel.edge.export import open_models

images = torch.rand(2, 3, WIDE_SIZE, WIDE_SIZE)
open_models(sys.argv[1], WIDE_TASKS[:1])[WIDE_TASKS[0]](images)  # what the libraries need for any session
before = pss()
opened = open_models(sys.argv[1], WIDE_TASKS[: int(sys.argv[2])])
for module in opened.values():
    module(images)
print(pss() - before)
"""


@pytest.mark.exhaustive
def test_sessions_hold_shared_weights_once(onnx, tmp_path):
    """The bar: k sessions take at most 1.1 x the distinct bytes, and a fixed number of bytes each."""
    models = torch.nn.ModuleDict(wide_models())
    tie(models, find_groups(models))
    write(tmp_path, models)
    export(tmp_path, WIDE_SIZE, models=wide_models())
    check_memory_of_sessions(MEASURE, tmp_path, models)


@pytest.mark.slow
def test_a_detector_is_exported_up_to_its_features(onnx, tmp_path):
    torch.manual_seed(0)
    kwargs = {"backbone": "slim_resnet", "layers": (1, 1, 1, 1), "width": 4, "head_convs": 1, "min_size": SIZE}
    models = torch.nn.ModuleDict({f"{x}_fcos": build("fcos_model", 3, **kwargs) for x in "ab"}).eval()
    tie(models, find_groups(models))
    manifest = manifest_of(models)
    for record in manifest["tasks"].values():
        record["task"] = "object_detection"
    write_results(tmp_path, models, manifest, statistics_of(manifest))
    export(tmp_path, SIZE, ["b_fcos"])
    image, opened = torch.rand(3, SIZE, SIZE), open_models(tmp_path)["b_fcos"]
    opened.score_thresh = models["b_fcos"].score_thresh = 0.001  # the models were not trained
    with torch.inference_mode():
        (found,), (expected,) = opened([image]), models["b_fcos"]([image])
    assert found.keys() == expected.keys() and len(expected["boxes"])
    assert all(torch.allclose(found[key].float(), expected[key].float(), atol=1e-3) for key in expected)


def test_what_cannot_be_exported_is_named(onnx, tmp_path):
    write(tmp_path, pico_models())
    with pytest.raises(ResultsError, match="c_x: export: got a PicoDetector; allowed: classifiers, torchvision's"):
        export(tmp_path, SIZE, ["c_x"], fresh_models())


def test_without_the_packages_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_slim(tmp_path)
    for module in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["edge", "export", str(tmp_path), "--size", "32"]) == 2
    assert "export: needs onnx: pip install 'gemel-merging[onnx]'" in capsys.readouterr().err
    with pytest.raises(ResultsError, match="needs onnxruntime"):
        open_session(tmp_path, "a_slim")


def test_an_export_of_other_results_is_refused(tmp_path):
    write_slim(tmp_path)
    with pytest.raises(ResultsError, match="`python -m gemel edge export` writes it"):
        open_models(tmp_path)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / RECORD).write_text('{"store": "merged-0.safetensors", "tasks": {}}')
    with pytest.raises(ResultsError, match="export them again"):
        open_models(tmp_path)
