"""What may be in a checkpoint, and how often one is written."""

from typing import NamedTuple

import pytest
import torch
from results_samples import pico_models, write

from gemel.results_store import checkpoint
from gemel.results_store.checkpoint import CHECKPOINT_SHARE, read_checkpoint, throttled, write_checkpoint
from gemel.results_store.verify import verify


class Pair(NamedTuple):
    one: int
    other: int


class Numbers(list):
    """A list of a class of its own."""


@pytest.mark.parametrize(
    "state, where",
    [
        ({"a": Pair(1, 2)}, "state['a']: got a Pair"),
        ({"a": Numbers()}, "state['a']: got a Numbers"),
        ({"a": {1.5: 2}}, "state['a']: got a dict"),
        ({"a": [1, (2, {3})]}, "state['a'][1][1]: got a set"),
        ({"a": {"b": b"x"}}, "state['a']['b']: got a bytes"),
    ],
)
def test_what_would_not_come_back_as_it_was_is_not_written(state, where, tmp_path):
    write(tmp_path, pico_models())
    with pytest.raises(TypeError) as raised:
        write_checkpoint(tmp_path, state)
    assert str(raised.value).startswith(f"{where}; allowed: ")
    assert read_checkpoint(tmp_path) is None


def test_what_is_plain_comes_back_as_it_was(tmp_path):
    write(tmp_path, pico_models())
    state = {"a": [1, (2.5, None, True)], 3: {"b": "text"}, "weights": [torch.arange(3)]}
    write_checkpoint(tmp_path, state)
    found = read_checkpoint(tmp_path)
    assert torch.equal(found["weights"][0], state["weights"][0])
    assert {key: found[key] for key in ("a", 3)} == {key: state[key] for key in ("a", 3)}
    assert type(found["a"][1]) is tuple


class Time:
    """A clock that goes on by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_saving_takes_its_share_of_the_time_and_the_last_state_is_always_saved(monkeypatch):
    time, saved = Time(), []

    def save(state):
        saved.append(state["step"])
        time.now += 2.0

    monkeypatch.setattr(checkpoint, "time", time)
    save_some = throttled(save)
    save_some({"step": 0}, False)
    save_some({"step": 1}, False)
    assert saved == [0]
    save_some({"step": 2}, True)
    assert saved == [0, 2]
    began = time.now
    time.now = began + 2.0 / CHECKPOINT_SHARE - 0.1
    save_some({"step": 3}, False)
    assert saved == [0, 2]
    time.now = began + 2.0 / CHECKPOINT_SHARE
    save_some({"step": 4}, False)
    assert saved == [0, 2, 4]


def test_verify_says_to_which_result_it_belongs(tmp_path):
    said = []
    for seed in (0, 1):  # the second result does not know the first one's checkpoint
        write(tmp_path / str(seed), pico_models(seed))
        if seed == 0:
            write_checkpoint(tmp_path / "0", {"step": 1})
        else:
            (tmp_path / "1" / "in_flight.pt").write_bytes((tmp_path / "0" / "in_flight.pt").read_bytes())
        (check,) = (check for check in verify(tmp_path / str(seed)) if "in_flight.pt" in check[1])
        said.append(check[1].partition("in_flight.pt: ")[2])
    assert said == ["the round in flight", "the round in flight of another result; the next run removes it"]
