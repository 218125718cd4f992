"""AOTInductor: compiled models that hold one set of tensors, with the answers of the models."""

import pytest
import torch
from edge_samples import WIDE_SIZE, check_memory_of_sessions, wide_models, write_slim
from results_samples import manifest_of, write
from torch import nn

from gemel import load_merged
from gemel.__main__ import main
from gemel.edge.aoti import FOLDER, export_compiled, open_compiled
from gemel.results_store.files import ResultsError
from gemel.results_store.write import statistics_of, write_results
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from model_architectures import build


@pytest.fixture
def compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler")


MEASURE = """
import sys, torch
from edge_samples import WIDE_SIZE, WIDE_TASKS, pss, wide_models
from gemel.edge.aoti import FOLDER, open_compiled

with torch.device("meta"):
    models = wide_models()
images = torch.rand(2, 3, WIDE_SIZE, WIDE_SIZE)
torch.nn.Linear(8, 8)(torch.rand(2, 8))
torch._inductor.aoti_load_package(f"{sys.argv[1]}/{FOLDER}/{WIDE_TASKS[0]}.pt2")  # what torch needs for any program
before = pss()
opened = open_compiled(sys.argv[1], WIDE_TASKS[: int(sys.argv[2])], models)
for module in opened.values():
    module(images)
print(pss() - before)
"""


@pytest.mark.exhaustive
def test_sessions_hold_shared_weights_once(compiler, tmp_path):
    """The bar: k sessions take at most 1.1 x the distinct bytes, and a fixed number of bytes each."""
    models = nn.ModuleDict(wide_models())
    tie(models, find_groups(models))
    write(tmp_path, models)
    export_compiled(tmp_path, WIDE_SIZE, models=wide_models())
    assert max(file.stat().st_size for file in (tmp_path / FOLDER).glob("*.pt2")) < 4 << 20, "no weights in there"
    opened = open_compiled(tmp_path, models=wide_models())
    for batch in (1, 3):
        images = torch.rand(batch, 3, WIDE_SIZE, WIDE_SIZE)
        for task, model in load_merged(tmp_path, wide_models()).items():
            with torch.inference_mode():
                torch.testing.assert_close(opened[task](images), model(images), atol=1e-4, rtol=1e-4)
    check_memory_of_sessions(MEASURE, tmp_path, models)


@pytest.mark.exhaustive
def test_a_detector_is_compiled_up_to_its_features(compiler, tmp_path):
    torch.manual_seed(0)
    kwargs = {"backbone": "slim_resnet", "layers": (1, 1, 1, 1), "width": 4, "head_convs": 1, "min_size": 32}
    models = nn.ModuleDict({f"{x}_fcos": build("fcos_model", 3, **kwargs) for x in "ab"}).eval()
    tie(models, find_groups(models))
    manifest = manifest_of(models)
    for record in manifest["tasks"].values():
        record["task"] = "object_detection"
    write_results(tmp_path, models, manifest, statistics_of(manifest))
    assert main(["edge", "export", str(tmp_path), "--format", "aoti", "--size", "32", "--tasks", "b_fcos"]) == 0
    image, opened = torch.rand(3, 32, 32), open_compiled(tmp_path)["b_fcos"]
    opened.score_thresh = models["b_fcos"].score_thresh = 0.001  # the models were not trained
    with torch.inference_mode():
        (found,), (expected,) = opened([image]), models["b_fcos"]([image])
    assert found.keys() == expected.keys() and len(expected["boxes"])
    assert all(torch.allclose(found[key].float(), expected[key].float(), atol=1e-3) for key in expected)
    (tmp_path / FOLDER / "b_fcos.pt2").write_bytes(b"")
    with pytest.raises(ResultsError, match="missing or damaged"):
        open_compiled(tmp_path)


def test_without_a_compiler_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_slim(tmp_path)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.cpp_builder.cpp_compiler_search", _find_none)
    assert main(["edge", "export", str(tmp_path), "--size", "32", "--format", "aoti"]) == 2
    assert "export: needs a C++ compiler, and none was found" in capsys.readouterr().err
    assert not (tmp_path / FOLDER).exists()


def _find_none(search):
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_a_missing_export_is_named(tmp_path):
    write_slim(tmp_path)
    with pytest.raises(ResultsError, match="`python -m gemel edge export` writes it"):
        open_compiled(tmp_path)
