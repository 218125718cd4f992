"""The suite of small workloads: made and run at tiny size; its tables; what is left out."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_samples import result
from PIL import Image

from benchmarks import suite
from benchmarks.suite_datasets import read_idx, write_dataset
from benchmarks.suite_models import entry, is_trained, record_file
from benchmarks.suite_prepare import prepare
from benchmarks.suite_summary import (
    CUT_OFF,
    FINISHED,
    Curve,
    curve_of,
    failed_curve,
    leave_one_out,
    overall,
    share_at,
    strategy_table,
    summary_json,
)
from benchmarks.suite_workloads import (
    DATASETS,
    FASHION,
    FASHION_CLASSES,
    MOBILENET,
    MODELS,
    SHARED,
    SUITE,
    SUITE_CAMERAS,
    WORKLOADS,
    Drawn,
    Fashion,
    Model,
    Subset,
    Suite,
    Workload,
)
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.workload import CLASSIFICATION, DETECTION, WorkloadError, load_model_dict, read_workload

VEHICLES = ("car", "motorcycle", "truck")
SMALL = {"layers": (1, 1), "width": 8}
TINY = Suite(
    SUITE_CAMERAS,
    {
        "noon_vehicles": Drawn(("noon",), VEHICLES, CLASSIFICATION, (14, 10), (8, 4), size=24),
        "both_vehicles": Drawn(("noon", "rain"), VEHICLES, CLASSIFICATION, (8, 6), (3, 2), size=24),
        "shoes": Fashion(("sneaker", "boot"), (4, 3)),
        "signs": Subset("signs_CL", CLASSIFICATION, ("stop", "yield"), (3, 2)),
        "street": Subset("street_OD", DETECTION, ("car",), (3, 2)),
    },
    {
        "both_vehicles_old": Model("both_vehicles", "slim_resnet", SMALL, 24, 1, 1e-3),
        "noon_vehicles_one": Model("noon_vehicles", "slim_resnet", SMALL, 24, 1, 1e-3, "both_vehicles_old"),
        "noon_vehicles_two": Model("noon_vehicles", "slim_resnet", SMALL, 24, 1, 1e-3),
        "noon_vehicles_plain": Model("noon_vehicles", "plain_cnn", {"width": 4}, 24, 1, 1e-3),
        "shoes_one": Model("shoes", "slim_resnet", SMALL, 24, 1, 1e-3),
        "signs_one": Model("signs", "slim_resnet", SMALL, 24, 1, 1e-3),
        "noon_vehicles_mobile": Model("noon_vehicles", "mobilenet_v2", {}, 24, 1, 1e-3, MOBILENET),
    },
    {
        "pair": Workload(("noon_vehicles_one", "noon_vehicles_two"), 0.5, "a pair"),
        "apart": Workload(("noon_vehicles_one", "noon_vehicles_plain"), 0.95, "nothing in common"),
        "with_shoes": Workload(("noon_vehicles_one", "shoes_one"), 0.95, "needs Fashion-MNIST"),
        "with_signs": Workload(("noon_vehicles_one", "signs_one"), 0.95, "needs photographs"),
        "with_mobile": Workload(("noon_vehicles_mobile", "noon_vehicles_two"), 0.95, "needs weights"),
    },
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder, what was prepared in it, the models that were trained), of TINY without any source."""
    root, lines = tmp_path_factory.mktemp("suite"), []
    return root, prepare(root, TINY, TINY.workloads, {}, lines.append), [line.split(":")[0] for line in lines]


def flags_of(root: Path, *more: str):
    return suite.parse_arguments(["--out", str(root), "--device", "cpu", "--time-budget", "60s", *more])


# ---- the suite itself -----------------------------------------------------------------------------------


def test_the_suite_is_as_varied_as_it_says():
    assert len(WORKLOADS) >= 15
    assert {len(workload.models) for workload in WORKLOADS.values()} >= {2, 3, 5}
    assert {workload.tolerance for workload in WORKLOADS.values()} == {0.9, 0.95, 0.99}
    assert all(model in MODELS for workload in WORKLOADS.values() for model in workload.models)
    for name, model in MODELS.items():
        assert name.rsplit("_", 1)[0] == model.dataset and model.dataset in DATASETS, name
        assert model.parent in (None, MOBILENET, *MODELS), name
    assert SUITE.workloads is WORKLOADS


# ---- preparation ----------------------------------------------------------------------------------------


def test_what_has_no_source_is_left_out_with_the_reason(prepared):
    _, ready, _ = prepared
    assert list(ready.files) == ["pair", "apart"]
    reasons = {"with_shoes": FASHION, "with_signs": SHARED, "with_mobile": MOBILENET}
    assert ready.left_out == {name: f"{flag} is not given" for name, flag in reasons.items()}
    lines = suite.left_out_lines(ready, 5).splitlines()
    assert lines[0] == "2 of 5 workloads are prepared, 3 left out" and len(lines) == 4


def test_a_source_that_is_not_there_is_named(tmp_path, prepared):
    root, _, _ = prepared
    sources = {FASHION: tmp_path, SHARED: tmp_path, MOBILENET: tmp_path / "none.pth"}
    ready = prepare(root, TINY, TINY.workloads, sources)
    assert str(tmp_path / "train-images-idx3-ubyte.gz") in ready.left_out["with_shoes"]
    assert str(tmp_path / "signs_CL") in ready.left_out["with_signs"]
    assert str(tmp_path / "none.pth") in ready.left_out["with_mobile"]


def test_a_model_is_trained_once_and_again_when_its_ancestor_changes(prepared):
    root, _, trained = prepared
    assert trained == ["both_vehicles_old", "noon_vehicles_one", "noon_vehicles_two", "noon_vehicles_plain"]
    again: list[str] = []
    prepare(root, TINY, ["pair", "apart"], {}, again.append)
    assert not again
    older = TINY.models["both_vehicles_old"]._replace(epochs=2)
    changed = TINY._replace(models={**TINY.models, "both_vehicles_old": older})
    current = {name: is_trained(root, changed, name) for name in trained}
    assert current == dict.fromkeys(trained, True) | {"both_vehicles_old": False, "noon_vehicles_one": False}


def test_a_workload_file_is_what_a_user_would_write(prepared):
    root, ready, _ = prepared
    tasks, problems = read_workload(load_model_dict(ready.files["pair"]))
    assert not problems and list(tasks) == ["noon_vehicles_one", "noon_vehicles_two"]
    for name, task in tasks.items():
        assert task.unmerged_acc == json.loads(record_file(root, name).read_text())["unmerged_acc"]
        assert task.tolerance == 0.5 and (root / "datasets" / task.dataset / "val").is_dir()
    groups = find_groups(torch.nn.ModuleDict({name: task.model for name, task in tasks.items()}))
    assert saved_bytes(groups) > 0


def test_an_ancestor_gives_all_layers_that_fit(prepared):
    """The learning rate of one epoch moves weights little; a random start is far away."""
    root, _, _ = prepared
    old, one, two = (
        entry(root, name, 0.95)["model"].layer2[0].conv2.weight
        for name in ("both_vehicles_old", "noon_vehicles_one", "noon_vehicles_two")
    )
    assert (one - old).norm() < 0.3 * old.norm() < (two - old).norm()


def test_drawn_scenes_of_several_cameras_share_a_folder(prepared):
    root, _, _ = prepared
    folder = root / "datasets" / "both_vehicles_CL"
    numbers = {int(path.stem.split("_")[0]) for path in folder.glob("train/*/*.jpg")}
    assert min(numbers) < 8 and 1000 <= max(numbers) < 1008
    assert {path.name for path in (folder / "val").iterdir()} == set(VEHICLES)
    assert max(len(list(kind.iterdir())) for kind in (folder / "train").iterdir()) <= 2 * 3


# ---- sources --------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    header = (2048 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """Ten images of each class in each part; every pixel is ten times the label, in the test part plus one."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    labels = np.tile(np.arange(10), 10)
    for part, more in (("train", 0), ("t10k", 1)):
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", np.ones((100, 28, 28)) * (10 * labels + more)[:, None, None])
    return folder


def test_fashion_mnist_becomes_class_folders(fashion, tmp_path):
    write_dataset(tmp_path, TINY, "shoes", {FASHION: fashion})
    for split, count, more in (("train", 4, 0), ("val", 3, 1)):
        for kind in ("sneaker", "boot"):
            files = list((tmp_path / "datasets" / "shoes_CL" / split / kind).iterdir())
            assert len(files) == count
            expected = 10 * FASHION_CLASSES.index(kind) + more
            assert all((np.asarray(Image.open(path)) == expected).all() for path in files)


def test_noise_is_added_to_fashion_mnist(fashion, tmp_path):
    noisy = TINY._replace(datasets={**TINY.datasets, "shoes": Fashion(("boot",), (1, 1), noise=20.0)})
    write_dataset(tmp_path, noisy, "shoes", {FASHION: fashion})
    (file,) = (tmp_path / "datasets" / "shoes_CL" / "train" / "boot").iterdir()
    assert 15 < np.asarray(Image.open(file)).std() < 25


def test_a_source_with_too_few_images_or_another_format_is_refused(fashion, tmp_path):
    many = TINY._replace(datasets={**TINY.datasets, "shoes": Fashion(("boot",), (11, 1))})
    with pytest.raises(WorkloadError, match="10 of class 'boot'.*at least 11"):
        write_dataset(tmp_path, many, "shoes", {FASHION: fashion})
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"\0\0\0\1 something else"))
    with pytest.raises(WorkloadError, match="magic number 1"):
        read_idx(tmp_path / "other.gz")
    assert not (tmp_path / "datasets" / "shoes_CL").exists()


def test_photographs_are_a_random_part_with_their_annotations(tmp_path):
    sets = tmp_path / "sets"
    for split in ("train", "val"):
        folders = [sets / "signs_CL" / split / kind for kind in ("stop", "yield", "other")]
        folders += [sets / "street_OD" / split / "images", sets / "street_OD" / split / "annotations"]
        for folder in folders:
            folder.mkdir(parents=True)
            suffix = "txt" if folder.name == "annotations" else "png"
            for number in range(9):
                (folder / f"{split}{number}.{suffix}").write_text(f"{folder.name} {number}")
    for name in ("signs", "street"):
        write_dataset(tmp_path, TINY, name, {SHARED: sets})
    signs, street = tmp_path / "datasets" / "signs_CL", tmp_path / "datasets" / "street_OD"
    assert sorted(path.name for path in (signs / "train").iterdir()) == ["stop", "yield"]
    chosen = [len(list((signs / split / "stop").iterdir())) for split in ("train", "val")]
    assert chosen == [3, 2]
    images = sorted(path.stem for path in (street / "train" / "images").iterdir())
    assert images == sorted(path.stem for path in (street / "train" / "annotations").iterdir()) and len(images) == 3
    assert images != ["train0", "train1", "train2"], "the first ones are no random part"


# ---- runs -----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_suite_runs_over_its_workloads(prepared, in_this_process, capsys):
    root, _, _ = prepared
    flags = flags_of(root, "--strategies", "all", "stem", "--workloads", "pair", "apart", "with_signs")
    assert suite.compare(flags, TINY) == []
    printed = capsys.readouterr().out
    assert "left out: with_signs: --shared-datasets is not given" in printed
    assert "all: share of optimal kept" in printed and "stem: share of optimal kept" in printed
    assert "nothing to merge" in printed and "pair: all seed 0: saved" in printed
    written = json.loads((root / "suite.json").read_text())
    assert set(written["left_out"]) == {"with_signs"} and len(written["curves"]) == 4
    by_name = {(curve["workload"], curve["strategy"]): curve for curve in written["curves"]}
    pair = by_name["pair", "all"]
    stats = json.loads(next((root / "runs" / "pair").glob("all-*/results/workload_stats.json")).read_text())
    assert pair["optimal_saved_bytes"] == stats["optimal_saved_bytes"] > 0
    assert [saved for _, saved in pair["history"]] == [entry["saved_bytes"] for entry in stats["history"]]
    assert by_name["apart", "all"]["optimal_saved_bytes"] == 0
    assert (root / "suite.png").stat().st_size > 10_000
    assert len(in_this_process) == 4
    assert suite.compare(flags, TINY) == [] and len(in_this_process) == 4, "finished runs are used again"


def test_labelled_runs_are_compared_with_earlier_ones(prepared, in_this_process, tmp_path, capsys):
    root, _, _ = prepared
    earlier = curve("pair", (5, 100), strategy="all@old")
    lost = failed_curve("pair", 0.5, "stem@old", 0, "FAILED: exit code 1")
    elsewhere = curve("another", (5, 100), strategy="all@old")
    written = json.dumps({"curves": [one._asdict() for one in (earlier, lost, elsewhere)]})
    (tmp_path / "old.json").write_text(written)
    files = ["--beside", str(tmp_path / "old.json"), "--json", str(tmp_path / "new.json")]
    flags = flags_of(root, "--strategies", "all", "--workloads", "pair", "--label", "new", *files)
    assert suite.compare(flags, TINY) == [], "what failed earlier is not a failure of these runs"
    curves = suite.read_curves([tmp_path / "new.json"])
    assert [one.strategy for one in curves] == ["all@old", "stem@old", "all@new"]
    assert curves[:2] == [earlier, lost] and len(in_this_process) == 1
    assert (tmp_path / "new.png").exists()
    assert "all@new: share of optimal kept" in capsys.readouterr().out


def test_a_file_of_earlier_runs_that_is_none_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(WorkloadError, match="2 problems") as error:
        suite.read_curves([tmp_path / "none.json", tmp_path / "other.json"])
    assert "none.json: FileNotFoundError" in str(error.value) and "other.json: KeyError" in str(error.value)


def test_a_run_that_fails_is_in_the_table(prepared, in_this_process, monkeypatch, capsys):
    root, _, _ = prepared
    monkeypatch.setitem(suite.VARIANTS, "broken", {"strategy": "all", "learning_rate": -1})
    failed = suite.compare(flags_of(root, "--strategies", "broken", "--workloads", "pair"), TINY)
    assert [(curve.workload, curve.strategy) for curve in failed] == [("pair", "broken")]
    assert "FAILED: exit code 2" in capsys.readouterr().out


def test_prepare_only_runs_nothing(prepared, in_this_process, capsys, tmp_path):
    root, _, _ = prepared
    flags = flags_of(root, "--prepare-only", "--fashion-mnist", str(tmp_path / "none"))  # the default may be there
    assert suite.compare(flags, TINY) == [] and not in_this_process
    assert "2 of 5 workloads are prepared" in capsys.readouterr().out


@pytest.mark.parametrize("flag, allowed", [("--workloads", "two_cameras"), ("--strategies", "gemel")])
def test_unknown_names_are_refused_before_anything_is_made(tmp_path, capsys, flag, allowed):
    assert suite.main(["--out", str(tmp_path / "out"), flag, "best"]) == 2
    said = capsys.readouterr().err
    assert f"{flag}: got 'best'" in said and allowed in said and not (tmp_path / "out").exists()


# ---- the numbers ----------------------------------------------------------------------------------------


def curve(workload: str, *history: tuple[float, int], strategy: str = "all", seed: int = 0, **more) -> Curve:
    saved = history[-1][1] if history else 0
    values = {"tolerance": 0.95, "outcome": FINISHED, "optimal_saved_bytes": 200, "cpu_seconds": 400.0, **more}
    return Curve(
        workload, strategy=strategy, seed=seed, history=list(history), saved_bytes=saved, worst_ratio=1.0, **values
    )


def test_shares_are_what_was_kept_by_then():
    one = curve("one", (30, 50), (90, 100), (310, 200))
    assert [one.share_at(t) for t in (29.9, 30, 60, 120, 300)] == [0, 0.25, 0.25, 0.5, 0.5]
    assert one.first_kept == 30 and one.note == FINISHED
    nothing = curve("none", optimal_saved_bytes=0)
    assert math.isnan(nothing.share_at(60)) and nothing.note == "nothing to merge"
    assert curve("kept").first_kept == math.inf and curve("kept").note == "nothing kept, search finished"
    old = one._replace(same_code=False, worst_ratio=0.99)
    assert old.note == "BELOW TARGET, search finished, run by other code"


def test_a_curve_is_read_from_a_result():
    read = curve_of("one", 0.9, 400, result("all", 3, (10, 50), (40, 100)))
    assert read.history == [(20, 50), (80, 100)], "benchmark_samples: two CPU seconds a second"
    assert (read.strategy, read.seed, read.saved_bytes, read.cpu_seconds) == ("all", 3, 100, 200)
    assert read.share_at(60) == 50 / 400 and read.worst_ratio == 1.0


def test_the_table_of_a_strategy():
    curves = [
        curve("one", (30, 50), (90, 100), (310, 200)),
        curve("two", (5, 20), outcome=CUT_OFF, cpu_seconds=100.0),
        curve("strict", (5, 200), tolerance=0.99),
        curve("apart", optimal_saved_bytes=0),
        failed_curve("lost", 0.9, "all", 0, "FAILED: exit code 1"),
    ]
    text = strategy_table(curves, "all")
    compact = " ".join(text.split())
    assert "one 0.95 0.0 % 0.0 % 25.0 % 25.0 % 50.0 % 50.0 % 100.0 % 30 400 1.000 search finished" in compact
    assert "two 0.95 10.0 % 10.0 % 10.0 % 10.0 % ~10.0 % ~10.0 % 10.0 % 5 100 1.000 cut off" in compact
    assert "apart 0.95 - - - - - - - never 400 1.000 nothing to merge" in compact
    assert "lost 0.9 0.0 % 0.0 % 0.0 % 0.0 % 0.0 % 0.0 % 0.0 % never 0 - FAILED: exit code 1" in compact
    assert "median of 2 workloads 0.95 5.0 % 5.0 % 17.5 % 17.5 % ~30.0 % ~30.0 % 55.0 %" in compact
    assert "worst of 2 workloads 0.95 0.0 % 0.0 % 10.0 % 10.0 % ~10.0 % ~10.0 % 10.0 %" in compact
    assert "median of 4 workloads all 5.0 % 5.0 % 17.5 % 17.5 % ~30.0 % ~30.0 % 55.0 %" in compact
    assert "Worst workload: 5 s one" in compact and "30 s lost" in compact


def test_a_workload_counts_with_the_median_over_its_seeds():
    curves = [curve("one", (10, saved), seed=seed) for seed, saved in enumerate((20, 100, 200))]
    found = overall([*curves, curve("two", (10, 50))], "all", share_at(60))
    assert found is not None and found.num_workloads == 2
    assert (found.median, found.worst, found.worst_workload) == ((0.5 + 0.25) / 2, 0.25, "two")


def test_choosing_by_the_other_workloads():
    """`quick` is best on a and b by much; on c it fails, and choosing by a and b does not know that."""
    saved = {"quick": {"a": 200, "b": 200, "c": 0}, "slow": {"a": 100, "b": 100, "c": 150}}
    curves = [curve(w, (1, kept), strategy=s) for s, of in saved.items() for w, kept in of.items()]
    choices = leave_one_out(curves)
    assert [(choice.workload, choice.strategy) for choice in choices] == [("a", "slow"), ("b", "slow"), ("c", "quick")]
    assert [choice.score for choice in choices] == [0.5, 0.5, 0.0] and choices[2].best == 0.75
    assert summary_json(curves)["leave_one_out"][2]["strategy"] == "quick"
