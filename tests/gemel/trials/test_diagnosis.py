"""Why a model is less accurate here than stated: each common cause is measured and named."""

import copy

import pytest
import torch
from pico import to_tensor
from PIL import Image

from dataset_manager import open_task
from gemel.trials.diagnosis import explanations
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload

CPU = torch.device("cpu")


def said_of(entry, datasets, name="north_pico", measured=0.0):
    (task,) = read_workload({name: entry})[0].values()
    val = open_task(task, [datasets], device=CPU, seed=0, batch_size=5).val
    before = copy.deepcopy(task.model.state_dict())
    found = explanations(task, val, measured)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    return found


def test_classes_in_another_order(entries, datasets):
    entry = entries["north_pico"]
    with torch.no_grad():
        for parameter in entry["model"].fc.parameters():
            parameter.copy_(parameter[[1, 2, 0]].clone())
    found = said_of(entry, datasets)
    assert found[0].startswith("on 24 images of val 0.0")
    (other,) = [line for line in found if "another order" in line]
    assert "it would be 1.000 (it says class 0 as 2, 1 as 0, 2 as 1): see class_ids" in other
    ids = {"class0": 2, "class1": 0, "class2": 1}
    assert said_of({**entry, "class_ids": ids}, datasets)[0] == "on 24 images of val 1.000 get the right class"


def test_predictions_of_one_class_alone(entries, datasets):
    entry = entries["north_pico"]
    with torch.no_grad():
        entry["model"].fc.bias[1] = 1e3
    found = said_of(entry, datasets, measured=1 / 3)
    assert "the dataset has the classes 0 (33%), 1 (33%), 2 (33%), and the model says 1 (100%)" in found
    assert not any("another order" in line or "eval method" in line for line in found)


def test_an_eval_method_that_counts_otherwise(entries, datasets):
    found = said_of(entries["north_pico"], datasets, measured=0.5)
    assert "the eval method, which returns 0.500, counts otherwise or changes the images" in found


@pytest.mark.parametrize(
    "transform, looks",
    [
        (to_tensor, "not normalised by mean and standard deviation"),
        (lambda image: to_tensor(image) * 255, "as pixels of 8 bits, neither divided by 255 nor normalised"),
        (lambda image: (to_tensor(image) - 0.5) / 0.25, "as normalised images do"),
    ],
)
def test_how_inputs_look(entries, datasets, transform, looks):
    entry = {**entries["north_pico"], "transforms": {"train": transform, "val": transform}}
    assert any(line.startswith("inputs lie between ") and looks in line for line in said_of(entry, datasets))


class UpperHalf(torch.nn.Module):
    """Class 0 where the upper half is brighter."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        upper, lower = (half.mean((1, 2, 3)) for half in images.chunk(2, 2))
        return torch.stack([upper, lower], 1) * self.scale


def test_images_turned_by_exif(entries, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for split in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "north_CL" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(3):
                image = Image.new("RGB", (16, 16))
                image.paste((250, 250, 250), (0, 8 * label, 16, 8 * label + 8))
                image.save(folder / f"{number}.png", exif=exif)
    entry = {**entries["north_pico"], "model": UpperHalf()}
    assert "with exif_orientation False it would be 1.000" in said_of(entry, tmp_path)
    assert said_of({**entry, "exif_orientation": False}, tmp_path)[0].startswith("on 6 images of val 1.000")


def test_a_detector_whose_labels_are_shifted(entries, datasets):
    entry = {**entries["east_pico"], "background_class": False}
    found = said_of(entry, datasets, "east_pico")
    assert found[0] == "on 15 objects of val 0.000 get the right class" or found[0].startswith(
        "on 15 objects of val 0."
    )
    (other,) = [line for line in found if "another order" in line]
    assert "(it says class 0 as 1, 1 as 2)" in other and "background_class" in other
    right = said_of(entries["east_pico"], datasets, "east_pico")
    assert float(right[0].split()[5]) > 0.8 and not any("another order" in line for line in right)


def test_a_detector_that_finds_nothing(entries, datasets):
    entry = entries["east_pico"]
    with torch.no_grad():
        entry["model"].offsets.bias += 100
    assert any("over 100% of the objects it finds nothing" in line for line in said_of(entry, datasets, "east_pico"))


def test_a_model_that_raises_still_ends_in_the_listed_problem(entries, datasets):
    entry = {**entries["north_pico"], "model": torch.nn.Linear(2, 2)}
    (line,) = said_of(entry, datasets)
    assert line.startswith("looking for the cause failed: RuntimeError: ")


def test_the_refusal_says_it(entries, datasets, tmp_path):
    entry = {**entries["north_pico"], "eval_method": lambda model, loader: 0.125}
    with pytest.raises(WorkloadError) as error:
        merge_workload({"north_pico": entry}, tmp_path / "results", datasets=datasets, device="cpu")
    text = str(error.value)
    assert "reaches 0.1250 on val" in text and "Measured: on 24 images of val " in text
    assert "the eval method, which returns 0.125, counts otherwise" in text and not (tmp_path / "results").exists()
