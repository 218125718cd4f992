"""--help, a wrong flag and `python -m gemel --help` answer at once: before torch is imported."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "merge_workloads.py"
IMPORTS = """
import runpy, sys
sys.argv = {argv!r}
try:
    {run}
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "arguments, code",
    [
        ([SCRIPT, "--help"], 0),
        ([SCRIPT, "--no-such-flag"], 2),
        ([SCRIPT, "--strategy", "best"], 2),
        ([SCRIPT, "--device", "tpu"], 2),
        ([SCRIPT, "--time-budget", "soon"], 2),
        (["-m", "gemel", "--help"], 0),
        (["-m", "gemel", "verify", "--help"], 0),
        (["-m", "gemel", "verify"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_wrong_flags_take_less_than_a_cpu_second(arguments, code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    assert "usage:" in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("module", [False, True])
def test_torch_is_not_imported_for_help(module):
    argv = ["-m gemel" if module else SCRIPT, "--help"]
    run = (
        'runpy.run_module("gemel", run_name="__main__")' if module else f'runpy.run_path("{SCRIPT}", None, "__main__")'
    )
    code = IMPORTS.format(argv=argv, run=run)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
