"""ONNX models of a merged workload whose shared weights lie once in one file, and once in memory across sessions.

    onnx/<task>.onnx      the graph; its weights are references into
    onnx/weights.bin      every distinct tensor of all graphs once
    onnx/export.json      how each task is run

A classifier is exported whole. A torchvision detector is exported up to the features of its backbone; its heads and
post-processing stay in PyTorch (`open_models`). What makes sharing survive in ONNX Runtime: graphs are exported without
optimisation, as folding normalisation into convolutions gives every task convolutions of its own; sessions map the
file instead of reading it, do not prepack weights, and do not fuse normalisation (SESSION_ENTRIES, NOT_RUN).
Needs onnx, onnxscript and onnxruntime: pip install 'gemel-merging[onnx]'. TensorRT: its engines carry their weights
with them, so models do not share any there.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemel.results_store import files
from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import json_bytes, read_manifest
from gemel.workload import DETECTION

FOLDER, WEIGHTS, RECORD = "onnx", "weights.bin", "export.json"
ALIGNMENT = 4096  # of a tensor in the file: sessions map it, and pages begin there
LEAST_BYTES = 1024  # smaller tensors stay in the graph
SESSION_ENTRIES = {"session.disable_prepacking": "1"}
NOT_RUN = ["ConvBNFusion", "ConvAddFusion", "ConvMulFusion", "ConvActivationFusion", "NchwcTransformer"]
MISSING = "export: needs {}: pip install 'gemel-merging[onnx]'"


def export(
    results: str | Path, size: int, tasks: Sequence[str] | None = None, models: Mapping[str, nn.Module] | None = None
) -> Path:
    """Writes the folder `onnx` into a results folder; its path.

    size: pixels a side of the images that the models will take; a classifier takes any number of them at once, a
    detector one. Raises ResultsError if a package is missing, a model cannot be exported, or a write is refused.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ResultsError(MISSING.format(error.name)) from None
    kinds = {task: record["task"] for task, record in read_manifest(results)["tasks"].items()}
    folder = Path(results) / FOLDER
    files.make_folder(folder)
    weights = _Weights()
    record: dict[str, Any] = {"size": size, "store": read_manifest(results)["store"]["file"], "tasks": {}}
    for task, model in load_merged(results, models, tasks=tasks, dtype=torch.float32).items():
        body, example, keys = body_of(task, model, kinds[task], size)
        proto = _proto_of(task, body, example, dynamic=kinds[task] != DETECTION)
        weights.take_from(proto)
        files.write(folder / f"{task}.onnx", [proto.SerializeToString()])
        record["tasks"][task] = {"kind": kinds[task], "features": keys}
    files.write(folder / WEIGHTS, weights.chunks())
    files.write(folder / RECORD, [json_bytes(record)])
    return folder


def body_of(task: str, model: nn.Module, kind: str, size: int) -> tuple[nn.Module, Tensor, list[str] | None]:
    """(what is exported, an example of its input, names of a detector's features).

    Raises ResultsError for a detector that is not torchvision's.
    """
    images = torch.zeros(2, 3, size, size)
    if kind != DETECTION:
        return _Logits(model), images, None
    if not hasattr(model, "backbone") or not hasattr(model, "transform"):
        raise ResultsError(
            f"{task}: export: got a {type(model).__name__}; allowed: classifiers, torchvision's detectors"
        )
    with torch.inference_mode():
        batch, _ = model.transform([images[0]])  # type: ignore[operator]  # torchvision's own transform
        features = model.backbone(batch.tensors)  # type: ignore[operator]
    keys = list(features) if isinstance(features, dict) else None
    return _Features(model.backbone), batch.tensors.clone(), keys  # type: ignore[arg-type]


class _Logits(nn.Module):
    """A classifier that returns a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return getattr(output, "logits", output)


class _Features(nn.Module):
    """A backbone that returns a tuple."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        return tuple(features.values()) if isinstance(features, dict) else (features,)


def _proto_of(task: str, body: nn.Module, example: Tensor, dynamic: bool) -> Any:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                body.eval(), (example,), dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:  # the exporter raises nearly anything for a model that it does not understand
        raise ResultsError(f"{task}: cannot be exported: {files.first_line(error)}") from None
    assert program is not None, "without a file to write, the exporter returns the program"
    return program.model_proto


class _Weights:
    """Tensors of all graphs, by content."""

    def __init__(self) -> None:
        self.places: dict[bytes, int] = {}
        self.data: list[bytes] = []
        self.end = 0

    def take_from(self, proto: Any) -> None:
        """Replaces the large tensors of a graph by references."""
        for tensor in proto.graph.initializer:
            data = tensor.raw_data
            if len(data) < LEAST_BYTES:
                continue
            place = self._place(data)
            tensor.ClearField("raw_data")
            tensor.data_location = 1  # TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", place), ("length", len(data))):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)

    def _place(self, data: bytes) -> int:
        digest = hashlib.sha256(data).digest()
        if digest not in self.places:
            self.places[digest] = self.end
            self.data.append(data)
            self.end += -(-len(data) // ALIGNMENT) * ALIGNMENT
        return self.places[digest]

    def chunks(self) -> Iterator[bytes]:
        for data in self.data:
            yield data
            yield bytes(-len(data) % ALIGNMENT)


# ---- running --------------------------------------------------------------------------------------------


def open_session(results: str | Path, task: str, threads: int = 1) -> Any:
    """An onnxruntime.InferenceSession of a task, in which weights stay on the memory map of the shared file.

    Raises ResultsError if onnxruntime is missing, or the task was not exported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ResultsError(MISSING.format(error.name)) from None
    file = Path(results) / FOLDER / f"{task}.onnx"
    if not file.is_file():
        raise ResultsError(f"{file}: not found; `python -m gemel edge export` writes it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_RUN
    )


def open_models(results: str | Path, tasks: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The exported tasks as modules that take what the models took: a classifier's graph, or a detector around its own.

    Raises ResultsError as `open_session` and `load_merged` do.
    """
    record = read_record(results, FOLDER)
    chosen = list(record["tasks"]) if tasks is None else tasks
    opened: dict[str, nn.Module] = {}
    for task in chosen:
        graph = OnnxModule(open_session(results, task), record["tasks"][task]["features"])
        if record["tasks"][task]["kind"] == DETECTION:
            (model,) = load_merged(results, tasks=[task], dtype=torch.float32).values()
            model.backbone = graph
            opened[task] = model
        else:
            opened[task] = graph
    return opened


def read_record(results: str | Path, folder: str) -> dict[str, Any]:
    """What was written beside an export. Raises ResultsError if there is none, or it is of other results."""
    file = Path(results) / folder / RECORD
    if not file.is_file():
        raise ResultsError(f"{file}: not found; `python -m gemel edge export` writes it")
    with files.naming(file, "read"):
        record = json.loads(file.read_bytes())
    if record["store"] != read_manifest(results)["store"]["file"]:
        raise ResultsError(f"{file}: is of other results; export them again")
    return record


class OnnxModule(nn.Module):
    """A graph as a module: a tensor, or a dictionary of features, from a batch on the CPU."""

    def __init__(self, session: Any, features: Sequence[str] | None):
        super().__init__()
        self.session, self.features = session, features

    def forward(self, images: Tensor) -> Any:
        name = self.session.get_inputs()[0].name
        outputs = [torch.from_numpy(array) for array in self.session.run(None, {name: images.contiguous().numpy()})]
        return outputs[0] if self.features is None else dict(zip(self.features, outputs, strict=True))
