"""Running an eval method: what it returns and prints."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gemel.evaluation.eval_method import EvalMethodError, evaluate


@pytest.mark.parametrize("value, got", [(1.5, "1.5"), (-1, "-1"), (None, "None"), (float("nan"), "nan")])
def test_what_an_eval_method_returns_is_checked(value, got):
    """Published fault: -1 (no ground truth) flows on as an accuracy."""
    task = SimpleNamespace(name="a_x", model=None, eval_method=lambda model, loader: value)
    with pytest.raises(ValueError, match=f"a_x: eval_method: got {got}; allowed: a number in"):
        evaluate(task, [])


@pytest.mark.parametrize(
    "value, allowed", [(93.1, "not a percentage"), (100, "not a percentage"), (101, "a number in [0, 1]")]
)
def test_a_percentage_is_named_as_such(value, allowed):
    task = SimpleNamespace(name="a_x", model=None, eval_method=lambda model, loader: value)
    with pytest.raises(EvalMethodError) as raised:
        evaluate(task, [])
    assert raised.value.allowed.endswith(allowed) and raised.value.got == repr(value)


def test_an_eval_method_may_print(capsys):
    task = SimpleNamespace(name="a_x", model="own", eval_method=lambda model, loader: print("pages") or len(model) / 10)
    assert evaluate(task, []) == 0.3 and evaluate(task, [], "other") == 0.5 and capsys.readouterr().out == ""


def loader_of(batch_size):
    return DataLoader(TensorDataset(torch.arange(8)), batch_size=batch_size)


def test_without_memory_the_batch_is_halved(caplog):
    def fits(model, loader):
        if loader.batch_size > 2:
            raise torch.OutOfMemoryError
        return 0.1 * loader.batch_size

    assert evaluate(SimpleNamespace(name="a_x", model=None, eval_method=fits), loader_of(8)) == 0.2
    assert caplog.text.count("a_x: repeats the evaluation with batches of") == 2


def test_a_dead_loader_process_is_replaced_once():
    calls = []

    def dies(model, loader):
        calls.append(loader)
        if len(calls) <= deaths:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed")
        return 0.5

    task = SimpleNamespace(name="a_x", model=None, eval_method=dies)
    deaths = 1
    assert evaluate(task, loader_of(4)) == 0.5 and calls[0] is not calls[1] and calls[1].batch_size == 4
    calls, deaths = [], 2
    with pytest.raises(RuntimeError, match="killed by signal"):
        evaluate(task, loader_of(4))
    assert len(calls) == 2


@pytest.mark.parametrize("change", [torch.nn.Module.double, lambda m: m.add_module("extra", torch.nn.Linear(1, 1))])
def test_a_method_that_changes_the_model_is_named(tasks, data, change):
    def eval_method(model, loader):
        change(model)
        return 0.5

    task = dataclasses.replace(tasks["north_pico"], eval_method=eval_method)
    with pytest.raises(
        ValueError,
        match="north_pico: eval_method: got a method that changes .* of the model from .*; allowed: one that reads",
    ):
        evaluate(task, data["north_pico"].val)


def rounds_to_half(model):
    model.half().float()


def adapts_statistics(model):
    model.train()(torch.rand(4, 3, 16, 16))


def swaps_a_layer(model):
    model.fc = copy.deepcopy(model.fc)


@pytest.mark.parametrize(
    "change, said",
    [
        (rounds_to_half, "the values of .* of the model"),
        (adapts_statistics, "the values of bn1.running_mean of the model"),
        (swaps_a_layer, "the parameter fc.bias of the model for another object"),
        (lambda model: model.requires_grad_(False), "from requires_grad True to requires_grad False"),
    ],
)
def test_a_method_that_changes_what_no_type_or_shape_shows_is_named(tasks, data, change, said):
    """What ships would not be what was judged: other values, layers that are no longer shared or trained."""

    def eval_method(model, loader):
        change(model)
        return 0.5

    task = dataclasses.replace(tasks["north_pico"], eval_method=eval_method)
    with pytest.raises(ValueError, match=f"north_pico: eval_method: got a method that changes .*({said})"):
        evaluate(task, data["north_pico"].val)


@pytest.mark.parametrize(
    "harmless",
    [
        torch.nn.Module.train,
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: copy.deepcopy(model).half(),
        lambda model: model.double().float(),
    ],
)
def test_a_method_that_leaves_all_values_may_do_so(tasks, data, harmless):
    def eval_method(model, loader):
        harmless(model)
        return 0.5

    assert evaluate(dataclasses.replace(tasks["north_pico"], eval_method=eval_method), data["north_pico"].val) == 0.5


def test_a_method_that_forgets_eval_mode_is_given_it(tasks, data):
    """In train mode it would judge by the statistics of each batch, and change those of the model."""
    modes = []

    def eval_method(model, loader):
        modes.append(model.training)
        model(next(iter(loader))[0])
        return 0.5

    tasks["north_pico"].model.train()
    assert evaluate(dataclasses.replace(tasks["north_pico"], eval_method=eval_method), data["north_pico"].val) == 0.5
    assert modes == [False]


def test_processes_that_die_again_are_done_without(caplog):
    """Once more with new ones, then in the main process; not for ever."""
    used = []

    def dies(model, loader):
        used.append(loader.num_workers)
        if loader.num_workers:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        return 0.5

    loader = DataLoader(TensorDataset(torch.arange(8)), batch_size=4, num_workers=2, persistent_workers=True)
    task = SimpleNamespace(name="a_x", model=None, eval_method=dies)
    assert evaluate(task, loader) == 0.5 and used == [2, 2, 0] and "0 loader processes" in caplog.text
    assert evaluate(task, loader) == 0.5 and used == [2, 2, 0, 0], "what worked is not found out again"


def test_what_fits_the_memory_is_remembered():
    sizes = []

    def fits(model, loader):
        sizes.append(loader.batch_size)
        if loader.batch_size > 3:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return 0.5

    loader, task = loader_of(6), SimpleNamespace(name="a_x", model=None, eval_method=fits)
    assert [evaluate(task, loader) for _ in range(2)] == [0.5, 0.5] and sizes == [6, 3, 3]
