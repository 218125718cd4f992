"""The workload file: a Python file of the user's with `create_model_dict()`, loaded as a module of its own."""

import importlib.util
import os
import sys
from pathlib import Path

from workload import Problem, WorkloadError


def load_model_dict(path: str | Path) -> dict:
    """The task dictionary of a workload file; runs the file. Raises WorkloadError if it is none."""
    file = Path(os.path.abspath(path))  # as import writes it, so that a second load is recognised
    allowed = "a Python file that defines create_model_dict()"
    if not file.is_file():
        raise WorkloadError([Problem("workload", "--workload", f"{path}, which is no file", allowed)])
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(file):
        got = f"{path}, whose name is that of a module in use here"
        raise WorkloadError([Problem("workload", "--workload", got, "another file name")])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # loader processes import what the file defines by this name, from this folder
    sys.path.append(str(file.parent))
    spec.loader.exec_module(module)
    if not callable(getattr(module, "create_model_dict", None)):
        raise WorkloadError([Problem("workload", "--workload", f"{path} without it", allowed)])
    return module.create_model_dict()
