"""Bytes, shares, seconds and signatures as text."""

import pytest
from torch import nn

from gemel.environment.units import box_size, clock_time, duration, layer_name, mib, share
from gemel.sharing.signatures import signature_of


@pytest.mark.parametrize(
    "size, text",
    [(0, "0.00 MiB"), (2048, "2.00 KiB"), (1 << 20, "1.00 MiB"), (9999 << 20, "9999.00 MiB"), (10 << 34, "160.00 GiB")],
)
def test_bytes(size, text):
    assert mib(size) == text


def test_boxes_and_shares():
    assert (box_size(2 << 30), box_size(600 << 20)) == ("2 GiB", "600.00 MiB")
    assert share(0, 0) == "100.0 %" and share(1, 3) == "33.3 %"


@pytest.mark.parametrize(
    "seconds, text, clock", [(7.4, "7 s", "0:07"), (999, "999 s", "16:39"), (7300, "2.0 h", "2:01:40")]
)
def test_seconds(seconds, text, clock):
    assert duration(seconds) == text and clock_time(seconds) == clock


class Own(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module, text",
    [
        (nn.Conv2d(3, 8, 3, padding=1), "Conv2d(3, 8, 3x3)"),
        (nn.Conv2d(8, 8, (1, 3), 2, groups=4, bias=False), "Conv2d(8, 8, 1x3, stride 2, groups 4, no bias)"),
        (nn.Conv2d(8, 8, 3, dilation=2), "Conv2d(8, 8, 3x3, dilation 2)"),
        (nn.Linear(4, 2), "Linear(4, 2)"),
        (nn.Embedding(10, 4), "Embedding(10, 4)"),
        (nn.MultiheadAttention(8, 2), "MultiheadAttention"),
        (Own(4, 2), "Own(4, 2)"),
    ],
)
def test_signatures(module, text):
    assert layer_name(signature_of(module)) == text
