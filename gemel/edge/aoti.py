"""Models of a merged workload compiled by AOTInductor, which all compute with one set of tensors in memory.

    aoti/<task>.pt2       the machine code of a task, without weights
    aoti/export.json      how each task is run

`open_compiled` loads the results once, as `load_merged` does, and hands every program the tensors of its task: what
models share is in memory once, on the memory map of the store. A classifier is compiled whole, a torchvision detector
up to the features of its backbone, as in export.py. Compiled for the CPU of the machine that exports; a C++ compiler is
needed there (g++, or what CXX names), and none where programs run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemel.edge.export import RECORD, body_of, read_record
from gemel.results_store import files
from gemel.results_store.files import ResultsError, sha256_of
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import json_bytes, read_manifest
from gemel.workload import DETECTION

FOLDER = "aoti"
CONFIG = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,  # folded weights would be copies
    "freezing": False,
}
NO_COMPILER = "export: needs a C++ compiler, and none was found; install g++, or name one with the variable CXX"


def export_compiled(
    results: str | Path, size: int, tasks: Sequence[str] | None = None, models: Mapping[str, nn.Module] | None = None
) -> Path:
    """Writes the folder `aoti` into a results folder; its path.

    size, tasks, models: as of `gemel.edge.export.export`. Takes a minute or so a model, for the compiler. Raises
    ResultsError if there is no compiler, a model cannot be compiled, or a write is refused.
    """
    _check_compiler()
    manifest = read_manifest(results)
    kinds = {task: record["task"] for task, record in manifest["tasks"].items()}
    folder = Path(results) / FOLDER
    files.make_folder(folder)
    record: dict[str, Any] = {"size": size, "store": manifest["store"]["file"], "tasks": {}}
    for task, model in load_merged(results, models, tasks=tasks, dtype=torch.float32).items():
        body, example, features = body_of(task, model, kinds[task], size)
        package = folder / f"{task}.pt2"
        _compile(task, body, example, kinds[task] != DETECTION, package)
        record["tasks"][task] = {"kind": kinds[task], "features": features, "sha256": sha256_of(package)}
    files.write(folder / RECORD, [json_bytes(record)])
    return folder


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ResultsError(NO_COMPILER) from None


def _compile(task: str, body: nn.Module, example: Tensor, dynamic: bool, package: Path) -> None:
    """Writes the program of a model; its weights are not in it."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    try:
        with torch.no_grad():
            program = torch.export.export(body.eval(), (example,), dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=CONFIG)
        names = torch._inductor.aoti_load_package(str(package)).get_constant_fqns()
    except Exception as error:  # the exporter and the compiler raise nearly anything for what they do not understand
        raise ResultsError(f"{task}: cannot be exported: {files.first_line(error)}") from None
    if unknown := sorted(set(names) - set(_constants_of(body))):
        raise ResultsError(
            f"{task}: cannot be exported: the program holds tensors that the model does not: {unknown[:3]}"
        )


def _constants_of(body: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, those that are named twice under both names."""
    found = {**dict(body.named_parameters(remove_duplicate=False)), **dict(body.named_buffers(remove_duplicate=False))}
    return {name: tensor.detach() for name, tensor in found.items()}


# ---- running --------------------------------------------------------------------------------------------


def open_compiled(
    results: str | Path, tasks: Sequence[str] | None = None, models: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The exported tasks as modules that take what the models took: a classifier's program, or a detector with one.

    They hold one set of tensors. models: by task, where the results name no architecture. Runs machine code from the
    folder: open only what you trust. Raises ResultsError if the export is missing, damaged or of other results, and as
    `load_merged` does.
    """
    record = read_record(results, FOLDER)["tasks"]
    chosen = list(record) if tasks is None else list(tasks)
    if unknown := [task for task in chosen if task not in record]:
        raise ResultsError(f"{results}: tasks: got {', '.join(unknown)}; allowed: {', '.join(record)}")
    opened: dict[str, nn.Module] = {}
    for task, model in load_merged(results, models, tasks=chosen, dtype=torch.float32).items():
        file = Path(results) / FOLDER / f"{task}.pt2"
        if not file.is_file() or sha256_of(file) != record[task]["sha256"]:
            raise ResultsError(f"{file}: is missing or damaged; export the results again")
        body, _, _ = body_of(task, model, record[task]["kind"], 32)
        program = CompiledModule(file, _constants_of(body), record[task]["features"])
        if record[task]["kind"] == DETECTION:
            model.backbone = program
            opened[task] = model
        else:
            opened[task] = program
    return opened


class CompiledModule(nn.Module):
    """A program as a module: a tensor, or a dictionary of features, from a batch on the CPU.

    It computes with the tensors that it is given, which stay where they are.
    """

    def __init__(self, file: Path, constants: Mapping[str, Tensor], features: Sequence[str] | None):
        super().__init__()
        self.program: Any = torch._inductor.aoti_load_package(str(file))
        self.tensors = {name: constants[name] for name in self.program.get_constant_fqns()}  # kept alive
        self.program.load_constants(self.tensors, check_full_update=True, user_managed=True)
        self.features = features

    def forward(self, images: Tensor) -> Any:
        outputs = self.program(images.contiguous())
        if self.features is not None:
            return dict(zip(self.features, outputs, strict=True))
        return outputs if isinstance(outputs, Tensor) else outputs[0]
