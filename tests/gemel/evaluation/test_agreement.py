"""How much two outputs agree: classes, boxes, and what is neither."""

import copy

import pytest
import torch

from gemel.evaluation.agreement import agreement_of, have_equal_tensors, mean_agreement
from gemel.workload import CLASSIFICATION, DETECTION


def found(*detections) -> dict:
    """(left, label, score) each, of boxes 10 pixels a side."""
    boxes = torch.tensor([[left, 0.0, left + 10.0, 10.0] for left, *_ in detections]).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in detections], dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "scores": torch.tensor([float(score) for *_, score in detections])}


def test_classifiers_agree_on_the_class():
    one = torch.tensor([0.1, 2.0, -1.0])
    assert agreement_of(CLASSIFICATION, one, torch.tensor([0.0, 0.1, 0.05])) == 1
    assert agreement_of(CLASSIFICATION, one, torch.tensor([0.2, 0.1, 0.05])) == 0


def test_a_single_logit_is_above_zero_or_not():
    for one, other, expected in ((0.2, 3.0, 1), (0.2, -3.0, 0), (-1.0, -3.0, 1)):
        assert agreement_of(CLASSIFICATION, torch.tensor([one]), torch.tensor([other])) == expected


def test_of_a_map_the_share_of_places():
    one, other = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    one[1, 0, 0] = 1
    assert agreement_of(CLASSIFICATION, one, other) == 0.75


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_agrees_with_nothing(value):
    broken = torch.tensor([value, 0.0])
    assert agreement_of(CLASSIFICATION, broken, broken.clone()) == 0


@pytest.mark.parametrize(
    "one, other, expected",
    [
        (found(), found(), 1),
        (found((0, 1, 0.9)), found(), 0),
        (found((0, 1, 0.9)), found((2, 1, 0.8)), 1),  # 8 of 12 pixels
        (found((0, 1, 0.9)), found((4, 1, 0.8)), 0),  # 6 of 14 pixels
        (found((0, 1, 0.9)), found((0, 2, 0.9)), 0),
        (found((0, 1, 0.9)), found((0, 1, 0.49)), 0),  # below the least score
        (found((0, 1, 0.9)), found((0, 1, 0.9), (0, 1, 0.8)), 2 / 3),  # one box is matched once
        (found((0, 1, 0.9), (50, 1, 0.9)), found((50, 1, 0.6)), 2 / 3),
    ],
)
def test_detectors_agree_by_f1(one, other, expected):
    assert agreement_of(DETECTION, one, other) == pytest.approx(expected)
    assert agreement_of(DETECTION, other, one) == pytest.approx(expected)


def test_outputs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"got a tensor \[2\] and a tensor \[3\]; allowed: two rows of logits"):
        agreement_of(CLASSIFICATION, torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="got a dict; allowed: a dictionary with boxes, scores, labels"):
        agreement_of(DETECTION, {"boxes": torch.zeros(0, 4)}, found())


def test_the_mean_is_over_images():
    """Batches of two and one: each image counts once."""
    one, other = torch.nn.Identity(), torch.nn.Hardtanh(0, 1)
    images = torch.tensor([[3.0, 2.0], [0.0, 1.0], [5.0, 9.0]])  # the last two logits become equal: class 0
    loader = [(images[:2], None), (images[2:], None)]
    assert mean_agreement(CLASSIFICATION, loader, one, other) == pytest.approx(2 / 3)


def test_models_with_the_same_parameters_and_buffers_have_equal_tensors():
    one = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other = copy.deepcopy(one)
    assert have_equal_tensors(one, other)
    other[1].running_mean += 1e-6
    assert not have_equal_tensors(one, other)
    assert not have_equal_tensors(one, one[0])
