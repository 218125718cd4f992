"""What a classifier computes before its first tied layer: where it is cut, and that it stays frozen and is kept."""

import copy
import functools
from dataclasses import asdict

import pytest
import torch
from pico import PicoNet, merger_of, to_tensor
from torch import nn
from torch.nn import functional as F
from torchvision import models as zoo
from torchvision.transforms import v2

import merger
import trainer
from dataset_manager import open_task
from gemel.datasets.loaders import plain_images, repeats
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.results_store.load import load_merged
from gemel.sharing.groups import find_groups, restrict
from gemel.sharing.signatures import find_layers
from gemel.sharing.tying import tie
from gemel.training.context import RoundContext
from gemel.training.cut import Cut, Cuts
from gemel.training.losses import task_losses
from gemel.training.options import TrainingOptions
from gemel.training.prefix import frozen, frozen_modules, prefix_of
from merge_workloads import merge_workload
from trainer import recover

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LATE = TrainingOptions(learning_rate=0.01, max_epochs=20, patience_epochs=20, freeze_prefix=True)


@functools.cache
def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = zoo.get_model(name, weights=None)
    for parameter in model.parameters():  # heads and scales of zero would hide what depends on what
        nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return model.eval()


def find_cut(model: nn.Module, tied, images: torch.Tensor) -> Cut | None:
    return Cuts(model, images).before(tied)


def calls_of(model: nn.Module, layer: str) -> list:
    """Gets an entry, the number of images, whenever the layer runs."""
    calls = []
    module = model.get_submodule(layer)
    forward = module.forward
    module.forward = lambda x: (calls.append(len(x)), forward(x))[1]
    return calls


def prefix(model: nn.Module, tied=("conv2",), limit: int = 1 << 20, keeps_training: bool = True):
    return prefix_of(model, find_cut(model, tied, IMAGES), limit, keeps_training)


# ---- where ----------------------------------------------------------------------------------------------

CUTS = [
    ("resnet18", "layer3.0.conv1", "layer2"),
    ("resnet18", "layer4.0.conv2", "layer3"),  # the block's input is needed again behind its second convolution
    ("resnet18", "fc", "avgpool"),
    ("mobilenet_v2", "features.9.conv.2", "features.8"),
    ("mobilenet_v3_small", "features.10.block.2.fc1", "features.9"),
    ("shufflenet_v2_x0_5", "stage3.3.branch2.5", "stage3.2"),
    ("squeezenet1_0", "features.10.expand1x1", "features.10.squeeze_activation"),
    ("squeezenet1_0", "classifier.1", "features"),  # behind it is dropout, which training needs
    ("densenet121", "features.denseblock3.denselayer2.conv1", "features.transition2"),
    ("efficientnet_b0", "features.6.2.block.0.0", "features.6.1"),
    ("regnet_y_400mf", "trunk_output.block4.block4-2.f.se.fc2", "trunk_output.block4.block4-1"),
    ("convnext_tiny", "features.5.2.block.5", "features.5.1"),
    ("swin_t", "features.5.1.mlp.3", "features.5.0"),
]


@pytest.mark.parametrize(("name", "first_tied", "last"), CUTS)
def test_a_model_is_cut_where_one_output_is_all_that_follows(name, first_tied, last):
    model, images = torchvision_model(name), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    layers = [layer.name for layer in find_layers(model)]
    cut = find_cut(model, layers[layers.index(first_tied) :], images)
    assert cut.last == last
    with torch.no_grad():
        expected = model(images)
        with cut.given(model, cut.output(model, model.forward, images)):
            got = model(torch.zeros_like(images))
    assert torch.equal(expected, got)


def test_what_training_alone_reads_is_behind_the_cut():
    """GoogLeNet's auxiliary classifiers read from its middle, when it is trained."""
    torch.manual_seed(0)
    model = zoo.googlenet(weights=None, init_weights=False, num_classes=10)
    late = [layer.name for layer in find_layers(model) if layer.name.startswith(("inception5b", "fc"))]
    assert find_cut(model, late, torch.rand(2, 3, 64, 64)).last == "inception4a"
    assert find_cut(model, ["aux1.fc1", *late], torch.rand(2, 3, 64, 64)) is None, "nobody knows when it is needed"


class Odd(nn.Module):
    """A first layer that is used twice, in one way or another."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.first, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second = copy.copy(self.first) if how == "parameter" else nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        x = self.first(images)
        x = self.second(self.norm(x) if self.how != "image" else self.norm(x) + images)
        x = self.last(x)
        if self.how == "call":
            x = self.first(x)
        if self.how == "skip":
            x = x + images
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("how", "last"), [("plain", "norm"), ("image", None), ("call", None), ("skip", None), ("parameter", None)]
)
def test_what_is_used_again_later_is_not_cut_off(how, last):
    torch.manual_seed(0)
    cut = find_cut(Odd(how), ["second", "last"], IMAGES)
    assert (cut and cut.last) == last


def test_nothing_is_cut_off_where_it_would_be_nothing():
    model = PicoNet()
    assert find_cut(model, ["conv1", "fc"], IMAGES) is None, "the first layer is tied"
    assert find_cut(model, [], IMAGES) is None
    assert find_cut(model, ["conv2"], IMAGES).last == "bn1"
    assert find_cut(PicoNet(width=64), ["conv2"], IMAGES) is None, "a twentieth of the multiplications"


def test_where_a_model_is_cut_is_searched_once():
    cuts = Cuts(PicoNet(), IMAGES)
    assert cuts.before(["conv2", "fc"]) is cuts.before(["conv2"]) is not None
    assert len(cuts.found) == 1 and cuts.before(["fc"]).last == "more"


def test_finding_a_cut_leaves_the_model_as_it_is():
    model = PicoNet().train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find_cut(model, ["conv2"], IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state()) and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


# ---- frozen and kept ------------------------------------------------------------------------------------


def test_outputs_are_those_of_the_whole_model_and_no_image_runs_twice():
    model = PicoNet().eval()
    expected, part = model(IMAGES), prefix(model)
    runs = calls_of(model, "conv1")
    with frozen({"a": model}, {"a": part}):
        for order in ([0, 1, 2], [2, 0, 2, 1], [2, 3], [3]):
            torch.testing.assert_close(model(IMAGES[order]), expected[order])
        assert runs == [3, 2], "a batch with a new image runs as it is"
        average = copy.deepcopy(model)
        torch.testing.assert_close(average(IMAGES), expected)
        assert runs == [3, 2], "a copy has the same frozen part"
        average.fc.weight.data.zero_()
        assert not torch.equal(average(IMAGES), model(IMAGES))
    assert type(model) is PicoNet and not hasattr(model, "frozen_prefix")
    model(IMAGES)
    assert runs == [3, 2, 4]


def test_in_training_an_image_runs_alone_and_once():
    """So what comes out for it depends on nothing that came before: a run that is resumed has kept nothing yet."""
    model = PicoNet()
    part = prefix(model)
    runs = calls_of(model, "conv1")
    with frozen({"a": model}, {"a": part}):
        model.eval()(IMAGES), model.train()(IMAGES), model(IMAGES.flip(0))
        assert runs == [4, 1, 1, 1, 1] and len(part.outputs) == 8, "what evaluation kept is not for training"


def test_an_image_of_val_may_be_one_of_train():
    """What evaluation kept was made in inference mode, and gradients are to flow behind it."""
    model = PicoNet().eval()
    part = prefix(model)
    with frozen({"a": model}, {"a": part}):
        with torch.inference_mode():
            model(IMAGES)
        assert len(part.outputs) == 4
        model(IMAGES).sum().backward()
    assert model.conv2.weight.grad is not None and len(part.outputs) == 4


def test_no_more_is_kept_than_the_memory_allows():
    model = PicoNet().eval()
    one = model.conv1(IMAGES[:1]).nbytes
    for limit, kept in ((0, 0), (one - 1, 0), (2 * one, 2), (100 * one, 4)):
        part = prefix(model, limit=limit)
        with frozen({"a": model}, {"a": part}):
            model(IMAGES), model(IMAGES)
        assert len(part.outputs) == kept and part.num_bytes == kept * one


def test_images_that_are_drawn_anew_are_not_kept_in_training():
    model = PicoNet()
    model.more = nn.BatchNorm2d(8)  # has statistics to re-estimate
    part = prefix(model, keeps_training=False)
    runs = calls_of(model, "conv1")
    with frozen({"a": model}, {"a": part}):
        model.train()(IMAGES), model(IMAGES)
        assert runs == [4, 4] and not part.outputs
        reestimate_statistics(model, [(IMAGES, None)], CPU, keep=frozen_modules(model))
        assert runs == [4, 4, 4] and not part.outputs, "they are images of train"
        model.eval()(IMAGES), model(IMAGES)
        assert runs == [4, 4, 4, 4] and len(part.outputs) == 4


def test_a_prefix_is_not_trained_and_its_statistics_stay():
    model = PicoNet()
    model.conv1.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with frozen({"a": model}, {"a": prefix(model)}):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            *("conv2.weight", "conv2.bias", "fc.weight", "fc.bias")
        ]
        F.cross_entropy(model.train()(IMAGES), torch.tensor([0, 1, 2, 0])).backward()
        reestimate_statistics(model, [(IMAGES, None)], CPU, keep=frozen_modules(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    frozen_ones = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen_ones == ["conv1.bias"], "as the user had it"
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {"conv2.weight", "conv2.bias", "fc.weight", "fc.bias"}
    model.zero_grad()
    model.bn1.eval()
    F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 0])).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_prefixes_are_alike_where_cut_and_weights_are():
    model = PicoNet()
    part = prefix(model)
    model.fc.weight.data.add_(1)
    assert prefix(model).computes_the_same_as(part) and not part.computes_the_same_as(None)
    model.bn1.running_mean.add_(1)
    assert not prefix(model).computes_the_same_as(part)


# ---- in a trial -----------------------------------------------------------------------------------------


def late_groups(models):
    """Groups behind the first convolution, of the two classifiers."""
    groups = restrict(find_groups(models), ["north_pico", "south_pico"])
    return tuple(group for group in groups if {o.layer for o in group.occurrences} == {"conv2"})


def test_a_round_trains_what_lies_behind_the_cut_alone(tasks, data):
    models = nn.ModuleDict({name: tasks[name].model for name in ("north_pico", "south_pico")})
    tie(models, late_groups(models), "mean")
    before = copy.deepcopy(models.state_dict())
    parts = {name: prefix(model) for name, model in models.items()}
    trained = {name: tasks[name] for name in models}
    outcome = recover(models, trained, data, LATE, RoundContext(CPU, 0, prefixes=parts))
    assert outcome.success and outcome.steps > 0
    changed = {key for key, value in models.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {
        f"{name}.{kind}"
        for name, layers in {"north_pico": ("conv2", "fc"), "south_pico": ("conv2", "more.0", "fc")}.items()
        for layer in layers
        for kind in (f"{layer}.weight", f"{layer}.bias")
    }
    assert all(p.requires_grad for p in models.parameters())
    for name in models:  # without the prefix the models are what was judged
        assert evaluate(tasks[name], data[name].val) == outcome.accuracies[name]


@pytest.fixture
def run(tasks, data, tmp_path):
    two = {name: tasks[name] for name in ("north_pico", "south_pico")}
    return merger_of(two, data, tmp_path / "results", strategy="gemel", cache_bytes=1 << 22, **asdict(LATE))


def test_the_next_trial_uses_what_the_last_one_kept(run):
    late = late_groups(run.state.models)

    def prefixes_of(groups):
        return run.prefixes.of_round(run.tasks, groups, resumed=False)

    first = prefixes_of(late)
    assert [part.cut.last for part in first.values()] == ["bn1", "bn1"]
    again = prefixes_of(late)
    assert all(again[name] is first[name] for name in first)
    run.state.models["north_pico"].conv1.weight.data.add_(1)
    third = prefixes_of(late)
    assert third["north_pico"] is not first["north_pico"] and third["south_pico"] is first["south_pico"]
    assert prefixes_of(run.record.groups) == {}, "the first layers are tied"


def test_whether_images_come_again(tasks, datasets):
    def said(*transforms) -> bool:
        task = copy.copy(tasks["north_pico"])
        object.__setattr__(task, "train_transform", v2.Compose([*transforms, to_tensor]))
        return repeats(open_task(task, [datasets], device=CPU, seed=0, batch_size=6).train.dataset)

    assert said() and said(v2.RandomHorizontalFlip()) and not said(v2.ColorJitter(0.2, 0.2, 0.2))
    assert not said(v2.RandomHorizontalFlip(), v2.RandomCrop(8))


def test_a_merge_with_frozen_prefixes_holds_what_it_measured(entries, datasets, tmp_path, monkeypatch):
    """Rounds that tie late layers leave the first ones as they were, and the result is as it was judged."""
    cuts, kept = [], []
    real = trainer.recover

    def watched(models, tasks, data, options, around, teachers=None):
        cuts.append({name: part.cut.last for name, part in around.prefixes.items()})
        try:
            return real(models, tasks, data, options, around, teachers)
        finally:
            for name, part in around.prefixes.items():
                kept.append(len(part.outputs) == len(data[name].val.dataset) + len(data[name].train.dataset))
                assert part.limit == CACHE // 2 // 2, "of two tasks, and the other half is for images"

    monkeypatch.setattr(merger, "recover", watched)
    del entries["east_pico"]
    options = {"learning_rate": 0.01, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.85, "strategy": "gemel"}
    results = tmp_path / "results"
    manifest = merge_workload(
        entries, results, datasets=datasets, device="cpu", freeze_prefix=True, cache_bytes=CACHE, **options
    )
    assert {"north_pico": "bn1", "south_pico": "bn1"} in cuts and {} in cuts
    assert kept and all(kept), "of every image of val and of train"
    assert manifest["memory"]["saved_bytes"] > 0 and all(task["met"] for task in manifest["tasks"].values())
    assert not any(hasattr(entry["model"], "frozen_prefix") for entry in entries.values())
    assert all(type(model) is PicoNet for model in load_merged(results, {n: PicoNet(*a) for n, a in SHAPES}).values())


CACHE = 1 << 22
SHAPES = [("north_pico", (3,)), ("south_pico", (4, 1))]


def test_losses_go_through_the_frozen_part(tasks, data):
    """The trainer's own losses, on a batch of its own loader."""
    task = tasks["north_pico"]
    part = prefix(task.model)
    batch = next(iter(data["north_pico"].train))
    with frozen({"a": task.model}, {"a": part}):
        task.model.train()
        losses = task_losses(task, batch, CPU)
        assert len(part.outputs) == len(batch[0])
    task.model.bn1.eval()
    assert losses["cross_entropy"].item() == pytest.approx(task_losses(task, batch, CPU)["cross_entropy"].item())


def test_a_small_sample_is_enough_to_cut(data):
    assert len(plain_images(data["north_pico"], 0, 0, "prefix")[0]) >= 2
