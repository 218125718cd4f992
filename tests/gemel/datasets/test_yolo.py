"""Text files with a line per object."""

import torch
from dataset_samples import detector_task, write_detection_split

from gemel.datasets.folders import open_split
from gemel.datasets.records import BYTE_ORDER_MARK, WINDOWS_LINES
from gemel.datasets.yolo import TextFile


def test_bom_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff1 0.5 0.5 0.2 0.2\r\n\r\n0 0.5 0.5 0.1 0.1\r\n".encode())
    objects = TextFile(path).read()
    assert [(box.place, box.class_id) for box in objects.boxes] == [("line 1", 1), ("line 3", 0)]
    assert objects.faults == [] and objects.repairs == {BYTE_ORDER_MARK: 1, WINDOWS_LINES: 1}


def test_boxes_are_clipped_to_the_image(tmp_path):
    write_detection_split(tmp_path / "cars_OD" / "train", {"a": "0 0.9502 0.5 0.1 1.0008"})
    _, target = open_split(detector_task(), tmp_path / "cars_OD", "train")[0]
    assert torch.allclose(target["boxes"], torch.tensor([[18.004, 0, 20, 10]]), atol=1e-4)
