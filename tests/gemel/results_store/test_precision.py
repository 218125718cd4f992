"""Whether a result runs as it was judged, by its type of weights and the device."""

import warnings

import pytest
import torch

from gemel.results_store import precision
from gemel.results_store.precision import precision_of, unjudged, warn_if_unjudged, weights_dtype

HALF = {"precision": {"weights": "float16", "arithmetic": "float32"}}
ON_GPU = {"precision": {"weights": "float16", "arithmetic": "float16"}}


@pytest.fixture(autouse=True)
def gpu_computes_in_16_bits(monkeypatch):
    monkeypatch.setattr(precision, "arithmetic_on", lambda device, weights: weights if device == "cuda" else "float32")


def test_a_result_of_an_earlier_version_is_in_float32():
    assert precision_of({}) == {"weights": "float32", "arithmetic": "float32", "device": "cpu"}
    assert weights_dtype({}) == torch.float32 and weights_dtype(HALF) == torch.float16


@pytest.mark.parametrize(
    "manifest, weights, device, said",
    [
        ({}, "float32", "cpu", None),
        ({}, "float32", "cuda", None),
        ({}, "float16", "cpu", "weights are loaded in float16, and were judged in float32"),
        (HALF, "float16", "cpu", None),
        (HALF, "float32", "cpu", None),
        (HALF, "bfloat16", "cpu", "weights are loaded in bfloat16, and were judged in float16"),
        (HALF, "float16", "cuda", "on cuda they are computed in float16, and were judged in float32"),
        (ON_GPU, "float16", "cuda", None),
        (ON_GPU, "float16", "cpu", "on cpu they are computed in float32, and were judged in float16"),
    ],
)
def test_what_differs_from_how_the_tasks_were_judged(manifest, weights, device, said):
    assert unjudged(manifest, weights, device) == said
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_unjudged("results", manifest, weights, device)
    allowed = [] if said is None else [f"results: {said}: accuracies may differ from those in the manifest"]
    assert [str(warning.message) for warning in caught] == allowed
