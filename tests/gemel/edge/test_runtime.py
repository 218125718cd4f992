"""The runtime: the same answers as models loaded whole, within the budget, and every frame counted."""

import threading
import time

import pytest
import torch
from edge_samples import write_slim
from pico import PicoDetector, PicoNet
from results_samples import fresh_models, pico_models, write

from gemel import load_merged
from gemel.edge import Runtime
from gemel.edge.frames import RandomFrames
from gemel.results_store.files import ResultsError

FRAMES = RandomFrames(16, 16, 5)


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    return write_slim(tmp_path_factory.mktemp("slim"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two classifiers and a detector without a recorded architecture."""
    path = tmp_path_factory.mktemp("mixed")
    write(path, pico_models())
    return path


def least(runtime: Runtime) -> int:
    return runtime.blocks.bytes_of(runtime.blocks.largest)


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)


def expected(model, images: list):
    """The answers of a model loaded whole, for the same batch."""
    with torch.inference_mode():
        return list(model(images if isinstance(model, PicoDetector) else torch.stack(images)))


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
def test_outputs_are_those_of_models_loaded_whole(mixed, merged, eager):
    """Within a budget that holds one model, for 200 frames, bit by bit."""
    whole = load_merged(mixed, fresh_models())
    with Runtime(mixed, models=fresh_models()) as probe:
        budget = least(probe) + 300
    results = []
    options = {"merged": merged, "eager": eager, "batches": {"a_x": 3}}
    with Runtime(mixed, budget, models=fresh_models(), **options) as runtime:
        summary = runtime.run(FRAMES, fps=1e6, count=200, on_result=results.append)
        transforms = runtime.transforms
    assert len(results) == 600 and all(task["processed"] == 200 for task in summary["tasks"].values())
    assert summary["peak_resident_bytes"] <= budget
    if not merged:
        assert summary["bytes_moved"] > 50 * budget
    at = 0
    while at < len(results):
        task = results[at].task
        batch = [r for r in results[at : at + (3 if task == "a_x" else 1)] if r.task == task]
        answers = expected(whole[task], [transforms[task](FRAMES[r.frame % 5]) for r in batch])
        assert all(equal(r.output, answer) for r, answer in zip(batch, answers, strict=True))
        at += len(batch)


def test_what_is_not_in_memory_has_no_values(slim):
    with Runtime(slim) as runtime:
        model = runtime.weights.models["a_slim"]
        runtime.weights.load(runtime.blocks.needs["a_slim"])
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        assert runtime.weights.resident_bytes == runtime.blocks.bytes_of("a_slim")
        runtime.weights.evict(runtime.blocks.needs["a_slim"])
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        assert runtime.weights.resident_bytes == 0


def test_a_shared_tensor_is_in_memory_once(slim):
    with Runtime(slim) as runtime:
        runtime.weights.load(range(len(runtime.blocks.all)))
        a, b = runtime.weights.models.values()
        assert a.conv1.weight is b.conv1.weight
    with Runtime(slim, merged=False) as runtime:
        runtime.weights.load(range(len(runtime.blocks.all)))
        a, b = runtime.weights.models.values()
        assert a.conv1.weight is not b.conv1.weight and torch.equal(a.conv1.weight, b.conv1.weight)


def test_late_frames_are_dropped_and_every_frame_is_counted(slim):
    """Each model takes 20 ms, frames come every 10 ms: no more than about a quarter can be answered."""
    with Runtime(slim, transforms=dict.fromkeys(["a_slim", "b_slim"], slow)) as runtime:
        summary = runtime.run(FRAMES, fps=100, sla=0.08, count=60)
    for task in summary["tasks"].values():
        assert task["processed"] + task["late"] + task["dropped"] == 60
        assert task["dropped"] > 10 and task["processed"] > 0
        assert 0 < task["latency_ms"]["p50"] <= task["latency_ms"]["p99"]


def slow(image):
    time.sleep(0.02)
    return image.float()


def test_without_an_sla_no_frame_is_dropped(slim):
    with Runtime(slim) as runtime:
        summary = runtime.run(FRAMES, fps=1e5, count=30)
    assert {(t["processed"], t["late"], t["dropped"]) for t in summary["tasks"].values()} == {(30, 0, 0)}


@pytest.mark.parametrize("sla", [None, 0.05])
@pytest.mark.parametrize("batch", [1, 4])
def test_an_iterable_may_end_at_any_frame(slim, sla, batch):
    with Runtime(slim, batches={"a_slim": batch}) as runtime:
        summary = runtime.run((FRAMES[k % 5] for k in range(11)), fps=300, sla=sla)
    assert all(t["processed"] + t["late"] + t["dropped"] == 11 for t in summary["tasks"].values())


def test_an_empty_iterable_ends(slim):
    with Runtime(slim) as runtime:
        assert runtime.run(iter(()), fps=10)["tasks"]["a_slim"]["processed"] == 0


def test_stop_ends_a_run_and_counts_what_had_arrived(slim):
    with Runtime(slim) as runtime:
        threading.Timer(0.3, runtime.stop).start()
        began = time.perf_counter()
        summary = runtime.run(FRAMES, fps=2, sla=0.2, seconds=60)
        assert time.perf_counter() - began < 5
    assert all(t["processed"] + t["late"] + t["dropped"] >= 1 for t in summary["tasks"].values())


def test_stop_gives_a_running_model_up_and_counts_its_frames(slim):
    """The model would take minutes, as each of its layers waits."""
    with Runtime(slim) as runtime:
        model = runtime.weights.models["a_slim"]
        layers = [layer for layer in model.modules() if not any(layer.children())]
        for layer in layers:
            layer.register_forward_hook(lambda *_: time.sleep(0.3))
        began = time.perf_counter()
        threading.Timer(0.6, runtime.stop).start()
        summary = runtime.run(FRAMES, fps=100, seconds=60)
        assert 0.5 < time.perf_counter() - began < 0.3 * len(layers) - 1, "a layer ends, the others do not begin"
    tasks = summary["tasks"]
    assert tasks["a_slim"]["processed"] == 0 and tasks["a_slim"]["dropped"] > 0
    assert len({t["processed"] + t["late"] + t["dropped"] for t in tasks.values()}) == 1, "all that arrived is counted"


def test_a_second_run_starts_from_nothing(slim):
    with Runtime(slim) as runtime:
        first, second = (runtime.run(FRAMES, fps=1e5, count=4) for _ in range(2))
    assert first["bytes_moved"] == second["bytes_moved"] == runtime.blocks.distinct_bytes


def test_an_error_while_reading_ahead_is_raised(slim, monkeypatch):
    with Runtime(slim, merged=False) as runtime:
        load = runtime.weights.load

        def broken(blocks):
            if threading.current_thread() is not threading.main_thread():
                raise ResultsError("the disk is gone")
            load(blocks)

        monkeypatch.setattr(runtime.weights, "load", broken)
        with pytest.raises(ResultsError, match="the disk is gone"):
            runtime.run(FRAMES, fps=1e5, count=4)


def test_wrong_input_is_refused(slim, mixed):
    with pytest.raises(ValueError, match="memory: got 10 bytes; allowed: at least"):
        Runtime(slim, 10)
    with pytest.raises(ValueError, match="order: got a_slim; allowed: each of a_slim, b_slim once"):
        Runtime(slim, order=["a_slim"])
    with pytest.raises(ResultsError, match="tasks: got c_slim; allowed: a_slim, b_slim"):
        Runtime(slim, tasks=["c_slim"])
    with pytest.raises(ResultsError, match="no model was handed in"):
        Runtime(mixed)
    with pytest.raises(ValueError, match="batches"):
        Runtime(slim, batches={"a_slim": 0})
    with pytest.raises(ValueError, match="batches"):
        Runtime(slim, batches={"c_slim": 1})


def test_a_store_that_shrinks_is_an_error(tmp_path):
    write_slim(tmp_path)
    (store,) = tmp_path.glob("merged-*.safetensors")
    with Runtime(tmp_path) as runtime:
        with open(store, "r+b") as file:
            file.truncate(300)
        with pytest.raises(ResultsError, match="became shorter"):
            runtime.run(FRAMES, fps=1e5, count=4)


def test_models_with_tied_modules_of_their_own(tmp_path):
    """One module in two places, and a buffer that is not saved."""

    class Twice(PicoNet):
        def __init__(self):
            super().__init__()
            self.again = self.conv2
            self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

        def forward(self, images):
            return super().forward(images) * self.scale + self.again(self.conv1(images)).mean()

    torch.manual_seed(0)
    models = torch.nn.ModuleDict({"a_x": Twice(), "b_x": PicoNet(4)}).eval()
    write(tmp_path, models)
    results = []
    with Runtime(tmp_path, models={"a_x": Twice(), "b_x": PicoNet(4)}) as runtime:
        runtime.run(FRAMES, fps=1e5, count=3, on_result=results.append)
        image = runtime.transforms["a_x"](FRAMES[0])
    answer = next(r.output for r in results if (r.task, r.frame) == ("a_x", 0))
    assert torch.equal(answer, expected(models["a_x"], [image])[0])


def test_models_serve_another_runtime_after_one_that_was_stopped(mixed):
    models, whole = fresh_models(), load_merged(mixed, fresh_models())
    with Runtime(mixed, models=models) as first:
        first.run(FRAMES, fps=1e6, count=20, on_result=lambda result: first.stop())
    results = []
    with Runtime(mixed, models=models) as second:
        summary = second.run(FRAMES, fps=1e6, count=20, on_result=results.append)
        transforms = second.transforms
    assert all(task["processed"] == 20 and task["dropped"] == 0 for task in summary["tasks"].values())
    for result in results:
        image = transforms[result.task](FRAMES[result.frame % len(FRAMES)])
        assert equal(result.output, expected(whole[result.task], [image])[0])
    assert not any(module._forward_pre_hooks for model in models.values() for module in model.modules())
