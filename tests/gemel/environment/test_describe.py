"""The text of a value: equal for what does the same, different where a setting, a constant or a closure differs."""

import functools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from gemel.environment.describe import describe, digest, is_plain

FACTOR = 2


class Resize:
    """A transform of a user, without a repr."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return image


def closure(size):
    def resize(image):
        return image, size

    return resize


def with_global(image):
    return image * FACTOR


@pytest.mark.parametrize(
    "one, other",
    [
        (Resize(1), Resize(2)),
        (closure(1), closure(2)),
        (lambda x: x + 1, lambda x: x + 2),
        (functools.partial(closure, 1), functools.partial(closure, 2)),
        (v2.Lambda(lambda x: x + 1), v2.Lambda(lambda x: x - 1)),
        (v2.Compose([Resize(1)]), v2.Compose([Resize(2)])),
        (Resize(1).__call__, Resize(2).__call__),
        (torch.zeros(2), torch.ones(2)),
        (np.zeros(2), np.ones(2)),
        ({"a": [1]}, {"a": [2]}),
        ((1, 2), [1, 2]),
        (torch.float32, torch.float16),
    ],
)
def test_what_differs(one, other):
    assert describe(one) != describe(other) and digest(one) != digest(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resize(3),
        lambda: closure(3),
        lambda: v2.Compose([v2.Resize(8), v2.RandomCrop(4), v2.Lambda(closure(2))]),
        lambda: {1, 2, 3},
        lambda: random.Random(),
    ],
)
def test_what_is_the_same(make):
    assert describe(make()) == describe(make())


def test_a_global_setting_of_the_file_counts(monkeypatch):
    before = describe(with_global)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)
    assert describe(with_global) != before


def test_a_circle_ends():
    loop: list = [1]
    loop.append(loop)
    one = Resize(1)
    one.own = one
    assert describe(loop) and describe(one)


SOURCE = """
from gemel.environment.describe import digest

def letters(image, size=3):
    'Text.'
    return [letter for letter in {'a', 'b', 'c'}], size

print(digest([letters, {'a', 'b', 'c'}, object()]))
"""


def test_another_process_says_the_same(capsys):
    """Sets have another order there, and objects another address."""
    exec(SOURCE, {"__name__": "__main__"})
    here = capsys.readouterr().out
    there = subprocess.run([sys.executable, "-c", SOURCE], capture_output=True, text=True, check=True).stdout
    assert here == there != ""


def test_plain_values():
    assert is_plain({"a": [1, (2.0, None)], "b": torch.float32}) and not is_plain([torch.zeros(1)])
    assert not is_plain(closure(1))
