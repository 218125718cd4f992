import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.fitting.rows import (
    collect_rows,
    input_rows,
    is_linear_map,
    is_normalised,
    matrix_of,
    output_rows,
    output_width,
    sample_inputs,
    sample_outputs,
    set_matrix,
    shape_of,
)

LAYERS = {
    "linear": (nn.Linear(5, 3), (4, 7, 5)),
    "no_bias": (nn.Linear(5, 3, bias=False), (4, 5)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(2, 1)), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), padding_mode="reflect", bias=False), (2, 4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 6, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv3d": (nn.Conv3d(2, 3, (2, 3, 1), padding=(0, 1, 0)), (2, 2, 4, 5, 3)),
    "single_image": (nn.Conv2d(4, 6, 3), (4, 6, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 6)),
    "transposed_grouped": (nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), dilation=(1, 2), groups=2), (2, 4, 5, 6)),
    "transposed_cropped": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=3), (2, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_outputs_are_rows_times_matrix(name):
    layer, shape = LAYERS[name]
    inputs = torch.rand(shape)
    outputs = layer(inputs)
    positions = outputs.numel() // output_width(layer)
    picked = torch.randperm(positions, generator=torch.Generator().manual_seed(0))[:11]
    x, matrix = input_rows(layer, inputs, outputs.shape, picked), matrix_of(layer)
    assert matrix.shape == shape_of(layer) and x.shape[2] == matrix.shape[1]
    assert torch.allclose(x @ matrix, output_rows(layer, outputs, picked), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_is_written_where_it_was_read(name):
    layer = LAYERS[name][0]
    before = [p.detach().clone() for p in layer.parameters()]
    set_matrix(layer, 2 * matrix_of(layer))
    assert all(torch.equal(2 * b, p) for b, p in zip(before, layer.parameters(), strict=True))
    set_matrix(layer, matrix_of(layer) / 2)


def test_a_layer_with_a_forward_of_its_own_is_no_linear_map():
    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 2

    class Renamed(nn.Linear):
        pass

    assert not is_linear_map(Squared(2, 2)) and not is_linear_map(nn.LSTM(2, 2)) and is_linear_map(Renamed(2, 2))


def test_only_a_batch_norm_right_after_the_layer_removes_the_mean():
    model = PicoNet()
    assert is_normalised(model, "conv1") and not is_normalised(model, "conv2") and not is_normalised(model, "fc")


def test_outputs_are_sampled_before_operations_in_place_and_modes_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Dropout(0.5))
    model[2].train()
    model[0].eval()
    (sample,) = sample_outputs(model, {"0": 50}, torch.rand(2, 3, 6, 6), torch.Generator())["0"]
    assert sample.y.min() < 0 and sample.y.shape == (1, 32, 4)
    assert model[2].training and not model[0].training and not model[0]._forward_hooks


class Pyramid(nn.Module):
    """One head over two levels, as in RetinaNet."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        stacked = torch.stack(list(images))
        return self.head(stacked), self.head(stacked[..., ::2, ::2])


def test_rows_are_gathered_over_all_calls_and_batches():
    model, generator = Pyramid(), torch.Generator().manual_seed(0)
    batches = [[torch.rand(3, 8, 8)] * 2, [torch.rand(3, 8, 8)]]
    rows = collect_rows(model, {"head": 10_000}, batches, generator)["head"]
    assert rows.x.shape == (1, 3 * (64 + 16), 28) and rows.y.shape == (1, 240, 4)
    assert torch.allclose(rows.x @ matrix_of(model.head), rows.y, atol=1e-5)
    fewer = collect_rows(model, {"head": 30}, batches, generator)["head"]
    assert 30 <= fewer.x.shape[1] <= 34 and torch.allclose(fewer.x @ matrix_of(model.head), fewer.y, atol=1e-5)


def test_inputs_of_the_student_and_outputs_of_the_teacher_are_of_the_same_positions():
    torch.manual_seed(0)
    teacher, student = PicoDetector(), PicoDetector()
    batches = [[torch.rand(3, 16, 16) for _ in range(3)]]
    names = {"conv2": 20, "scores": 20}
    rows = collect_rows(teacher, names, batches, torch.Generator().manual_seed(0), student)
    again = collect_rows(teacher, names, batches, torch.Generator().manual_seed(0))
    assert torch.equal(rows["conv2"].y, again["conv2"].y) and not torch.equal(rows["conv2"].x, again["conv2"].x)
    own = collect_rows(student, names, batches, torch.Generator().manual_seed(0))
    assert torch.equal(rows["conv2"].x, own["conv2"].x) and torch.equal(rows["scores"].x, own["scores"].x)


class Regions(nn.Module):
    """A second stage on as many regions as the first stage finds."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.box = number, nn.Linear(3, 2)

    def forward(self, images):
        return self.box(images.mean((2, 3)).repeat(self.number, 1) + self.number)


def test_inputs_on_regions_are_those_of_the_teacher():
    batches = [torch.rand(2, 3, 4, 4)]
    for number in (1, 2, 5):
        teacher, student = Regions(2), Regions(number)
        rows = collect_rows(teacher, {"box": 50}, batches, torch.Generator(), student)["box"]
        assert torch.allclose(rows.x @ matrix_of(teacher.box), rows.y, atol=1e-5)


def test_a_pass_that_ends_early_gives_the_same_inputs_and_computes_no_more():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3)).eval()
    images, late = torch.rand(2, 3, 9, 9), []
    samples = sample_outputs(model, {"0": 20, "2": 20}, images, torch.Generator().manual_seed(0))
    whole = sample_inputs(model, samples, images)
    model[4].register_forward_hook(lambda *_: late.append("called"))
    early = sample_inputs(model, samples, images, ends_early=True)
    assert not late and set(early) == set(whole) == {"0", "2"}
    assert all(torch.equal(early[name], whole[name]) for name in whole)
