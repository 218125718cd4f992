"""Layers that tasks compute alike run once a frame: the answers are those of whole models."""

from dataclasses import replace

import pytest
import torch
from edge_samples import Virtual, VirtualTime
from results_samples import manifest_of
from torch import nn
from torchvision.transforms import v2

from gemel import load_merged
from gemel.edge import Runtime
from gemel.edge.arrivals import Arrivals
from gemel.edge.frames import IMAGENET_MEAN, IMAGENET_STD, RandomFrames
from gemel.edge.profile import measure, read_profile
from gemel.edge.schedule import best_order
from gemel.edge.simulator import Load, Plan, simulate
from gemel.edge.turns import neighbouring
from gemel.results_store.write import statistics_of, write_results
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from model_architectures import build

SIZE, FRAMES = 64, RandomFrames(64, 64, 5)
FLOAT = v2.ToDtype(torch.float32, scale=True)
CLASSIFIER = v2.Compose([FLOAT, v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))])
TRANSFORMS = {"a_slim": CLASSIFIER, "b_slim": CLASSIFIER, "c_fcos": FLOAT}


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Two classifiers and a detector: a and the detector have one backbone, b differs from its second stage on."""
    torch.manual_seed(0)
    kwargs = {"width": 8, "layers": [1, 1]}
    models = nn.ModuleDict({name: build("slim_resnet", 4, **kwargs) for name in ("a_slim", "b_slim")})
    models["c_fcos"] = build("fcos_model", 4, **kwargs, min_size=SIZE, max_size=SIZE, head_convs=1)
    tie(models, find_groups(models))
    for norm in (m for m in models["a_slim"].modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var.uniform_(0.5, 2)
    for model in (models["b_slim"], models["c_fcos"].backbone.body):
        model.load_state_dict({k: v for k, v in models["a_slim"].state_dict().items() if "fc" not in k}, strict=False)
    models["b_slim"].layer2[0].bn1.weight.data *= 1.5
    path = tmp_path_factory.mktemp("camera")
    manifest = manifest_of(models.eval())
    manifest["tasks"]["c_fcos"]["task"] = "object_detection"
    write_results(path, models, manifest, statistics_of(manifest))
    return path


def run(path, count: int = 12, transforms=TRANSFORMS, fps: float = 1e6, frames=FRAMES, **options):
    answers = []
    with Runtime(path, transforms=transforms, **options) as runtime:
        summary = runtime.run(frames, fps, options.get("sla"), count=count, on_result=answers.append)
    return summary, answers


def assert_as_whole_models(path, answers, transforms, batch: int = 1) -> None:
    whole = load_merged(path)
    for begin in range(0, len(answers), batch):
        part = answers[begin : begin + batch]
        images = [transforms[part[0].task](FRAMES[answer.frame % 5]) for answer in part]
        with torch.inference_mode():
            outputs = whole[part[0].task](images if part[0].task == "c_fcos" else torch.stack(images))
        for answer, expected in zip(part, outputs, strict=True):
            found = answer.output if isinstance(expected, dict) else {"": answer.output}
            expected = expected if isinstance(expected, dict) else {"": expected}
            assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_whole_models_bit_by_bit(camera, batch):
    """Also where weights are swapped at every turn; the longer prefix of two tasks is used beside that of all three."""
    with Runtime(camera) as probe:
        least = probe.blocks.bytes_of(probe.blocks.largest)
    summary, answers = run(camera, memory=least, batches=dict.fromkeys(TRANSFORMS, batch))
    found = summary["shared_computation"]
    (group,) = found["groups"]
    assert set(group["tasks"]) == set(TRANSFORMS) and summary["peak_resident_bytes"] <= least
    assert group["share"]["a_slim"] > 0.9 > group["share"]["b_slim"] > 0.2
    assert found["frames"] == {"a_slim": 0, "b_slim": 12, "c_fcos": 12} and found["peak_bytes"] > 0
    assert len(answers) == 36
    assert_as_whole_models(camera, answers, TRANSFORMS, batch)


@pytest.mark.parametrize("options", [{"shared_computation": False}, {"merged": False}], ids=["asked", "unmerged"])
def test_it_can_be_left_out(camera, options):
    summary, answers = run(camera, count=3, **options)
    assert summary["shared_computation"]["groups"] == [] and len(answers) == 9
    assert_as_whole_models(camera, answers, TRANSFORMS)


def test_batches_that_differ_are_never_mixed(camera):
    """Rounding depends on the batch, so outputs of another one are not taken."""
    summary, answers = run(camera, batches={"a_slim": 2, "b_slim": 3, "c_fcos": 1})
    assert summary["shared_computation"]["frames"] == {"a_slim": 0, "b_slim": 12, "c_fcos": 0}, "b takes two, as a"
    assert_as_whole_models(camera, [a for a in answers if a.task == "c_fcos"], TRANSFORMS)
    assert_as_whole_models(camera, [a for a in answers if a.task == "b_slim"], TRANSFORMS, 2)


def test_another_transform_is_another_entry(camera):
    transforms = {**TRANSFORMS, "b_slim": v2.Compose([FLOAT, v2.Normalize([0.5] * 3, [0.5] * 3)])}
    summary, answers = run(camera, count=4, transforms=transforms)
    assert [set(group["tasks"]) for group in summary["shared_computation"]["groups"]] == [{"a_slim", "c_fcos"}]
    assert_as_whole_models(camera, answers, transforms)


class Moody:
    """The usual transform, which brightens every third image that it is given, the first ones aside."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return CLASSIFIER(image) + (self.calls > 2 and self.calls % 3 == 0)


def test_an_entry_that_differs_on_one_frame_runs_the_whole_model(camera):
    summary, _ = run(camera, transforms={**TRANSFORMS, "b_slim": Moody()})
    assert 0 < summary["shared_computation"]["frames"]["b_slim"] < 12


def test_a_model_that_cannot_be_followed_is_said_and_left_out(camera, caplog):
    models = load_merged(camera, tasks=["b_slim"])
    traced_with = models["b_slim"].forward

    def forward(images):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("no modes here")
        return traced_with(images)

    models["b_slim"].forward = forward
    with Runtime(camera, models=models, transforms=TRANSFORMS) as runtime:
        summary = runtime.run(FRAMES, 1e6, count=2)
    assert "b_slim: shares no computation" in caplog.text and "no modes here" in caplog.text
    assert [set(group["tasks"]) for group in summary["shared_computation"]["groups"]] == [{"a_slim", "c_fcos"}]


# ---- turns, profile, simulator ----------------------------------------------------------------------------


def test_tasks_of_a_group_stand_next_to_each_other(camera):
    assert neighbouring(["a", "b", "c", "d"], [["a", "c"]]) == ["a", "c", "b", "d"]
    with Runtime(camera) as runtime:
        least = runtime.blocks.bytes_of(runtime.blocks.largest)
        order = best_order(runtime.blocks, least, groups=[["a_slim", "c_fcos"]])
    assert neighbouring(order, [["a_slim", "c_fcos"]]) == order


def test_followers_take_the_frames_of_the_first_if_they_can():
    arrivals = Arrivals(fps=10, sla=0.5, batch=2, count=100, expected=0.01)
    assert arrivals.take(1.0, ahead=range(8, 10)) == (range(8, 10), 8)
    assert arrivals.take(1.0, ahead=range(8, 10)) == (range(10, 11), 0), "they are taken"
    late = Arrivals(fps=10, sla=0.5, batch=2, count=100, expected=0.3)
    assert late.take(1.0, ahead=range(7, 9)) == (range(9, 11), 9), "they would be late"
    patient = Arrivals(fps=10, sla=None, batch=2, count=100)
    assert patient.take(1.0, ahead=range(8, 10)) == (range(0, 2), 0), "no frame is dropped"
    first = Arrivals(fps=10, sla=0.5, batch=2, count=100, expected=0.01)
    assert first.take(1.0, after=0.24)[0].start > Arrivals(10, 0.5, 2, 100, expected=0.01).take(1.0)[0].start


@pytest.fixture(scope="module")
def profiled(camera):
    with Runtime(camera, transforms=TRANSFORMS) as runtime:
        profile = measure(runtime, FRAMES, (1, 2), repeats=3)
    profile.write(camera)
    return read_profile(camera, profile.store)


def test_the_profile_says_what_follows_faster(profiled):
    assert profiled.groups == [["a_slim", "b_slim", "c_fcos"]]
    assert set(profiled.tasks["b_slim"].following_ms) == {1, 2}
    assert profiled.tasks["a_slim"].run_seconds(1, follows=True) != profiled.tasks["a_slim"].run_seconds(1)


class Following(Virtual):
    """Takes the time of followers where layers were not run."""

    def find_common_layers(self, source):
        super().find_common_layers(source)
        self.clock.now = 0.0

    def answer(self, task, inputs, frames):
        before, profile = self.common.counts.reused.get(task, 0), self.profile.tasks[task]
        outputs = super().answer(task, inputs, frames)
        if self.common.counts.reused.get(task, 0) > before:
            self.clock.now -= profile.run_seconds(len(inputs)) - profile.run_seconds(len(inputs), follows=True)
        return outputs


def test_the_simulator_takes_the_same_turns(camera, profiled):
    clock = VirtualTime()
    tasks = {name: replace(t, run_ms={1: 10.0}, following_ms={1: 4.0}) for name, t in profiled.tasks.items()}
    profile, cycle = replace(profiled, tasks=tasks), 30e-3
    load = Load(2 / cycle, 3 * cycle, 10**9)
    with Following(camera, transforms=TRANSFORMS, clock=lambda: clock) as runtime:
        runtime.profile, runtime.clock = profile, clock
        summary = runtime.run(FRAMES, load.fps, load.sla, count=10**9, max_turns=90)
        blocks, budget = runtime.blocks, runtime.budget
    found = simulate(blocks, profile, budget, load, Plan(), max_turns=90)
    assert sum(summary["shared_computation"]["frames"].values()) >= 50
    assert found.bytes_moved == summary["bytes_moved"]
    for task, counted in summary["tasks"].items():
        frames = counted["processed"] + counted["late"] + counted["dropped"]
        assert counted["processed"] / frames == pytest.approx(found.tasks[task].share, abs=0.05)
    alone = simulate(blocks, profile, budget, load, Plan(shared_computation=False), max_turns=90)
    assert alone.seconds > found.seconds
