"""Answers as lines of JSON."""

import json
from typing import Any

from torch import Tensor

from gemel.edge.runtime import Result

LEAST_SCORE = 0.05  # of a detection that is written; torchvision's detectors use the same


def json_line(result: Result) -> str:
    """One line: task, frame, latency_ms, in_time, and `class` and `score`, or `detections` (box in pixels, XYXY);
    and `unmerged` (true) if the task went back to its unmerged model.
    """
    line = {"task": result.task, "frame": result.frame, "latency_ms": round(result.latency * 1e3, 3)}
    by = {"unmerged": True} if result.unmerged else {}
    return json.dumps({**line, "in_time": result.in_time, **by, **_answer(result.output)})


def _answer(output: Any) -> dict[str, Any]:
    if isinstance(output, Tensor):
        score, index = output.float().softmax(-1).max(-1)
        return {"class": int(index), "score": round(float(score), 4)}
    found = zip(output["boxes"].tolist(), output["scores"].tolist(), output["labels"].tolist(), strict=True)
    detections = [
        {"box": [round(x, 1) for x in box], "score": round(score, 4), "label": label}
        for box, score, label in found
        if score >= LEAST_SCORE
    ]
    return {"detections": detections}
