"""What `from gemel import load_merged` imports: nothing that a machine which only loads results does not have."""

import json
import subprocess
import sys
from pathlib import Path

from results_samples import slim_models, write

ROOT = Path(__file__).resolve().parents[2]
# Rooms of gemel/ that loading needs.
ROOMS = {"gemel.results_store", "gemel.sharing", "gemel.forward", "gemel.environment", "gemel.workload"}
PACKAGES = {"gemel", "model_architectures", "safetensors"}  # beyond those that torchvision itself imports


def imported_by(code: str) -> set[str]:
    """Modules that a fresh process has after running the code."""
    code = f"import sys, json\nsys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def test_loading_imports_only_the_store_and_the_builders(tmp_path):
    """No dataset readers, pycocotools, yaml, scipy, and no more of PIL or tqdm than torchvision imports."""
    write(tmp_path, slim_models())
    alone = imported_by("import torchvision")
    loading = imported_by(f"from gemel import load_merged\nload_merged({str(tmp_path)!r})")
    added = {module for module in loading - alone if not is_standard(module)}
    others = {module for module in added if module.partition(".")[0] not in PACKAGES}
    assert {module for module in others if not module.startswith(("torch.", "numpy."))} == set()
    rooms = {".".join(module.split(".")[:2]) for module in added if module.startswith("gemel.")}
    assert rooms == ROOMS


def test_gemel_alone_imports_no_torch():
    assert not {module for module in imported_by("import gemel") if module.partition(".")[0] in ("torch", "numpy")}
