"""edge run --watch: what is sampled, when a task goes back, what it then answers, and the budget all the while."""

import json
import shutil

import pytest
import torch
from edge_samples import write_slim
from pico import PicoDetector
from results_samples import fresh_models, manifest_of, pico_models, slim_models, write

from gemel import load_merged
from gemel.__main__ import main
from gemel.edge import Runtime
from gemel.edge.frames import RandomFrames
from gemel.edge.two_stores import unmerged_name
from gemel.edge.watch import NUM_REFERENCE, Watch, WatchOptions
from gemel.results_store.files import ResultsError
from gemel.results_store.write import statistics_of, write_results

FRAMES = RandomFrames(16, 16, 5)
TASKS = ["a_slim", "b_slim"]


def write_agreed(path, models, agreed: float | None):
    """A result whose manifest states the agreement."""
    manifest = manifest_of(models)
    for record in manifest["tasks"].values():
        record["agreement"] = agreed
    return write_results(path, models, manifest, statistics_of(manifest))


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    """Two classifiers, and unmerged ones with other random weights, which often say something else."""
    path = tmp_path_factory.mktemp("watched")
    write_agreed(path, slim_models(), 1.0)
    write(path / "unmerged", slim_models(seed=5, tied=False))
    return path


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    """The same, but the unmerged weights are the merged ones."""
    path = tmp_path_factory.mktemp("same")
    write_agreed(path, slim_models(tied=False), 1.0)
    shutil.copytree(path, path / "unmerged")
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two classifiers and a detector without recorded architectures."""
    path = tmp_path_factory.mktemp("mixed")
    write_agreed(path, pico_models(), 1.0)
    models = torch.nn.ModuleDict({name: model.eval() for name, model in fresh_models().items()})
    write(path / "unmerged", models)
    return path


def watched(path, memory=None, rate=1.0, **options):
    own = {key: options.pop(key) for key in ("alpha", "seed", "on_event", "store") if key in options}
    return Runtime(path, memory, watch=WatchOptions(rate, **own), device="cpu", **options)


def expected(model, image):
    with torch.inference_mode():
        return model([image] if isinstance(model, PicoDetector) else image[None])[0]


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return all(torch.equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)


# ---- sampling ----------------------------------------------------------------------------------------------


def records(agreed: float | None = 0.9) -> dict:
    return {task: {"target_acc": 0.95, "unmerged_acc": 1.0, "agreement": agreed} for task in TASKS}


def test_frames_are_sampled_by_their_number_alone():
    watch, again = (Watch(WatchOptions(0.1), records()) for _ in range(2))
    chosen = watch.samples("a_slim", range(20_000))
    assert 0.09 < len(chosen) / 20_000 < 0.11
    assert [k for k in range(20_000) if again.samples("a_slim", [k])] == chosen
    assert watch.samples("b_slim", range(20_000)) != chosen
    assert Watch(WatchOptions(0.1, seed=1), records()).samples("a_slim", range(20_000)) != chosen
    assert len(Watch(WatchOptions(1.0), records()).samples("a_slim", range(100))) == 100


def test_alpha_is_of_all_tasks_together():
    watch = Watch(WatchOptions(1.0, alpha=0.08), records())
    assert watch.tasks["a_slim"].test.alpha == pytest.approx(0.04)
    assert watch.tasks["a_slim"].test.level == pytest.approx(0.85)


def test_without_a_stated_agreement_the_first_frames_are_the_reference():
    watch = Watch(WatchOptions(1.0), records(None))
    for k in range(NUM_REFERENCE):
        assert not watch.observe("a_slim", k, float(k % 10 > 0))
    assert watch.summary()["tasks"]["a_slim"]["agreed"] == pytest.approx(0.9)
    assert watch.tasks["a_slim"].test.level == pytest.approx(0.85)
    back = [k for k in range(NUM_REFERENCE, 400) if watch.observe("a_slim", k, 0.0)]
    assert len(back) == 1 and watch.samples("a_slim", range(500)) == [], "it is compared no longer"


# ---- running -----------------------------------------------------------------------------------------------


def test_a_task_that_falls_is_served_by_its_unmerged_model(slim):
    """Bit by bit, from the frame after the one at which it is noticed, within a budget of one model."""
    events, results = [], []
    with Runtime(slim) as probe:
        budget = probe.blocks.bytes_of(probe.blocks.largest) + 300
    with watched(slim, budget, on_event=events.append) as runtime:
        summary = runtime.run(FRAMES, fps=1e6, count=120, on_result=results.append)
        transforms = runtime.transforms
    assert summary["peak_resident_bytes"] <= budget
    assert all(task["processed"] == 120 for task in summary["tasks"].values())
    back = {event["task"]: event["frame"] for event in events}
    assert back and all(event["event"] == "went back" and event["sampled"] == event["frame"] + 1 for event in events)
    assert {t: task["went_back_at"] for t, task in summary["watch"]["tasks"].items()} == {t: back.get(t) for t in TASKS}
    merged, unmerged = load_merged(slim), load_merged(slim / "unmerged")
    for result in results:
        gone = result.frame > back.get(result.task, 1000)
        assert result.unmerged == gone
        model = (unmerged if gone else merged)[result.task]
        assert equal(result.output, expected(model, transforms[result.task](FRAMES[result.frame % 5])))


def test_models_that_agree_stay_merged(same):
    with watched(same, rate=0.5) as runtime:
        summary = runtime.run(FRAMES, fps=1e6, count=300)
    for task in summary["watch"]["tasks"].values():
        assert task["agreement"] == 1.0 and task["went_back_at"] is None and 100 < task["sampled"] < 200
    assert summary["watch"]["seconds"] > 0


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("spare", [0, 4000])
def test_the_budget_holds_for_models_of_all_kinds(mixed, eager, spare):
    with watched(mixed, models=fresh_models()) as probe:
        least = probe.blocks.bytes_of(probe.blocks.largest)
    results = []
    options = {"models": fresh_models(), "eager": eager, "batches": {"a_x": 3}, "rate": 0.3}
    with watched(mixed, least + spare, **options) as runtime:
        summary = runtime.run(FRAMES, fps=1e6, count=60, on_result=results.append)
        transforms, held = runtime.transforms, runtime.weights.resident_bytes
    assert held <= summary["peak_resident_bytes"] <= least + spare
    merged, unmerged = load_merged(mixed, fresh_models()), load_merged(mixed / "unmerged", fresh_models())
    for result in results:
        if result.task != "a_x":  # alone in its batch
            model = (unmerged if result.unmerged else merged)[result.task]
            assert equal(result.output, expected(model, transforms[result.task](FRAMES[result.frame % 5])))


def test_the_least_budget_counts_the_unmerged_model(slim, mixed):
    with watched(slim) as runtime:
        largest = max(runtime.blocks.bytes_of(unmerged_name(task)) for task in TASKS)
        assert runtime.budget == runtime.weights.merged.blocks.distinct_bytes + largest
        summary = runtime.run(FRAMES, fps=1e6, count=10)
        assert summary["peak_resident_bytes"] <= runtime.budget
        assert summary["distinct_bytes"] == runtime.weights.merged.blocks.distinct_bytes
    with pytest.raises(ValueError, match=rf"allowed: at least {largest}, which the model of b_slim( \(unmerged\))? "):
        watched(slim, largest - 1)


def test_without_watching_no_unmerged_store_is_needed(tmp_path):
    write_slim(tmp_path)
    with Runtime(tmp_path) as runtime:
        assert "watch" not in runtime.run(FRAMES, fps=1e6, count=3)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_wrong_options_are_all_named():
    with pytest.raises(ValueError, match=r"rate: got 0; allowed: a number in \(0, 1\]; watch: alpha: got 1"):
        WatchOptions(0, alpha=1)


def test_a_store_that_does_not_fit_is_refused(slim, mixed, tmp_path):
    write_slim(tmp_path / "bare")
    with pytest.raises(ResultsError, match="holds no unmerged models.*--keep-unmerged"):
        watched(tmp_path / "bare")
    with pytest.raises(ResultsError, match="a_slim shares layers with other tasks there; b_slim shares"):
        watched(slim, store=tmp_path / "bare")
    with pytest.raises(ResultsError, match="a_slim is not in it; b_slim is not in it"):
        watched(slim, store=mixed / "unmerged")


def test_another_model_is_refused(tmp_path):
    """Both say which model was merged, and it is not the same."""
    for path, model in ((tmp_path, "one"), (tmp_path / "unmerged", "two")):
        models = slim_models(tied=False)
        manifest = manifest_of(models)
        tasks = {"a_slim": {"model": model}, "b_slim": {"model": "same"}}
        manifest["run"]["fingerprint"] = {"options": {}, "tasks": tasks}
        write_results(path, models, manifest, statistics_of(manifest))
    with pytest.raises(ResultsError, match="got a_slim is another model than was merged; allowed"):
        watched(tmp_path)


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_says_what_happened(slim, tmp_path, capsys):
    lines, done = tmp_path / "lines.jsonl", tmp_path / "summary.json"
    command = ["edge", "run", str(slim), "--fps", "500", "--seconds", "0.3s", "--size", "16", "--watch", "1"]
    assert main([*command, "--watch-seed", "3", "--json", str(done), "--outputs", str(lines)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(done.read_text())["watch"]
    assert (found["rate"], found["alpha"], found["seed"]) == (1.0, 0.05, 3)
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    events = [line for line in written if "event" in line]
    assert events, "random weights agree too often"
    for event in events:
        assert found["tasks"][event["task"]]["went_back_at"] == event["frame"]
        assert f"{event['task']}: from frame {event['frame']} on served by its unmerged model" in printed
        after = [a for a in written if a["task"] == event["task"] and a["frame"] > event["frame"]]
        assert after and all(answer["unmerged"] for answer in after)
    assert "frames compared" in printed


def test_the_command_refuses_what_has_no_meaning(slim, tmp_path, capsys):
    for flags, said in (
        (["--watch-alpha", "0.1"], "allowed: with --watch RATE"),
        (["--watch", "0.1", "--unmerged-store", str(tmp_path)], "holds no unmerged models"),
    ):
        assert main(["edge", "run", str(slim), *flags]) == 2
        assert said in capsys.readouterr().err
    for flag in ("--watch=0", "--watch=1.5", "--watch=some", "--watch-alpha=1", "--watch-alpha=nan"):
        with pytest.raises(SystemExit):
            main(["edge", "run", str(slim), flag])


def test_metrics_of_watched_tasks():
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry, generate_latest, metrics_core

    from gemel.edge.counts import counts_of
    from gemel.edge.endpoint import _Collector

    counts = counts_of(TASKS)
    counts.watch = Watch(WatchOptions(1.0), records())
    for k in range(200):
        counts.watch.observe("a_slim", k, 0.0)
    registry = CollectorRegistry()
    registry.register(_Collector(counts, {"budget_bytes": 7}, metrics_core))
    text = generate_latest(registry).decode()
    assert 'gemel_went_back{task="a_slim"} 1.0' in text and 'gemel_went_back{task="b_slim"} 0.0' in text
    assert 'gemel_agreement{task="a_slim"} 0.0' in text and 'gemel_agreement{task="b_slim"}' not in text
    assert 'gemel_agreed{task="b_slim"} 0.9' in text
