import copy

import pytest
import torch
from pico import PicoNet
from rank_processes import on_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eval_methods import classification_eval
from gemel.environment import ranks
from gemel.evaluation.split_outputs import measured_with_others

TASK = "north_pico"


class Counting(PicoNet):
    """Counts its forward passes; puts out something else than a tensor where it is asked to."""

    calls = 0
    wraps = False

    def forward(self, images):
        self.calls += 1
        output = super().forward(images)
        return {"logits": output, "kind": type(self)} if self.wraps else output


def loader(num_images: int = 20) -> DataLoader:
    source = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, 3, 16, 16, generator=source)
    return DataLoader(TensorDataset(images, torch.randint(3, (num_images,), generator=source)), batch_size=4)


def evaluated(method, wraps: bool = False, batches: DataLoader | None = None) -> list:
    """What an eval method returns on the task's own rank, and how often the model ran on each rank."""
    batches = loader() if batches is None else batches
    torch.manual_seed(ranks.rank())  # the other rank's weights are out of date
    model = Counting().eval()
    model.wraps = wraps
    ranks.assign({TASK: 0}, evaluations={TASK: (1.0, 2.0)})
    found = measured_with_others([TASK], lambda name: method(model, batches), {TASK: (model, batches)})
    assert "forward" not in vars(model)
    return [found.get(TASK), model.calls]


def logits(model: nn.Module, batches: DataLoader) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in batches])


def test_each_rank_runs_its_share_of_the_batches_and_nothing_differs():
    (value, calls), (nothing, calls_of_other) = on_ranks(2, lambda: evaluated(logits))
    assert nothing is None and (calls, calls_of_other) == (2, 3)
    expected, calls_of_one = evaluated(logits)
    assert torch.equal(value, expected) and calls_of_one == 5
    (accuracy, _), _ = on_ranks(2, lambda: evaluated(classification_eval))
    assert accuracy == evaluated(classification_eval)[0]


def with_gradients(model, batches):
    return torch.cat([model(images).detach() for images, _ in batches])


def twice(model, batches):
    return logits(model, batches) * 0 + logits(model, batches)


def of_a_copy(model, batches):
    copied = copy.deepcopy(model)
    copied.fc.weight.data.mul_(2)
    return logits(copied, batches)


def of_other_weights(model, batches):
    with torch.no_grad():
        model.fc.weight.mul_(2)
        found = logits(model, batches)
        model.fc.weight.div_(2)
    return found


def of_other_images(model, batches):
    with torch.no_grad():
        return torch.cat([model(images.flip(-1)) for images, _ in batches])


def by_a_hook(model, batches):
    features = []
    handle = model.conv2.register_forward_hook(lambda layer, inputs, output: features.append(output.mean((2, 3))))
    logits(model, batches)
    handle.remove()
    return torch.cat(features)


def in_train_mode(model, batches):
    model.train()
    found = logits(model, batches)
    model.eval()
    return found


METHODS = [with_gradients, twice, of_a_copy, of_other_weights, of_other_images, by_a_hook, in_train_mode]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_an_eval_method_that_does_something_else_gets_what_it_gets_in_one_process(method):
    (value, calls), _ = on_ranks(2, lambda: evaluated(method))
    assert torch.equal(value, evaluated(method)[0])
    assert calls >= 5 or method is of_a_copy  # whose calls are its own


def test_what_other_ranks_cannot_read_is_computed_by_the_eval_method():
    def method(model, batches):
        with torch.no_grad():
            return torch.cat([model(images)["logits"] for images, _ in batches])

    (value, calls), (_, calls_of_other) = on_ranks(2, lambda: evaluated(method, wraps=True))
    assert torch.equal(value, evaluated(method, wraps=True)[0])
    assert (calls, calls_of_other) == (2 + 5, 3)


def test_an_error_of_the_model_is_left_to_the_eval_method(caplog):
    def method(model, batches):
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 5, 16, 16))
        return "raised"

    wrong = DataLoader(TensorDataset(torch.rand(8, 5, 16, 16), torch.zeros(8)), batch_size=4)
    assert on_ranks(2, lambda: evaluated(method, batches=wrong))[0][0] == "raised"


def of_two_tasks(fails: bool) -> list:
    """The first rank has both tasks; what it does in which order."""
    ranks.assign({}, evaluations={TASK: (1.0, 2.0)})
    models, done = {name: Counting().eval() for name in (TASK, "other")}, []

    def measure(name):
        done.append([name, models[TASK].calls])
        if fails and name == "other":
            raise torch.OutOfMemoryError("no memory")
        return logits(models[name], loader()).shape[0]

    try:
        found = measured_with_others(models, measure, {TASK: (models[TASK], loader())})
    except torch.OutOfMemoryError:
        found = {"failed": 1}
    return [found, done]


def test_what_is_not_shared_is_measured_before_ranks_wait_for_each_other():
    (found, done), other = on_ranks(2, lambda: of_two_tasks(False))
    assert found == {TASK: 20, "other": 20} and done == [["other", 2], [TASK, 2]]
    assert other == [{}, []]


def test_a_rank_that_runs_out_of_memory_raises_when_the_others_have_what_they_wait_for():
    (found, done), other = on_ranks(2, lambda: of_two_tasks(True))
    assert found == {"failed": 1} and done == [["other", 2]] and other == [{}, []]


def test_one_process_runs_the_model_as_it_is():
    model = Counting().eval()
    batches = loader()
    assert measured_with_others([TASK], lambda name: "forward" in vars(model), {TASK: (model, batches)}) == {
        TASK: False
    }
    assert model.calls == 0
