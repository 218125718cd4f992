"""Every measured threshold names an entry of benchmarks/LOG.md that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADINGS = re.findall(r"^## (.*)$", (ROOT / "benchmarks" / "LOG.md").read_text(), re.M)
ENTRY = re.compile(r'"(\d{4}-\d\d-\d\d [^"]+)"')
SOURCES = sorted((ROOT / "gemel").rglob("*.py"))


def test_the_thresholds_name_their_entries():
    """In the comment above a threshold, or in the docstring of its part for all of them; or it says "unmeasured"."""
    parts = (ROOT / "gemel" / "thresholds.py").read_text().split("@dataclass")[1:]
    fields = 0
    for part in parts:
        of_all = ENTRY.search(part.split('"""')[1])
        above = ""
        for line in part.splitlines():
            if re.match(r"    \w+: (int|float|str) = ", line):
                fields += 1
                assert of_all or ENTRY.search(above) or "unmeasured" in above, f"no entry of the log: {line}"
            above = line
    assert fields > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_entries_exist(path):
    for named in ENTRY.findall(path.read_text()):
        assert any(heading.startswith(named) for heading in HEADINGS), f"{path}: benchmarks/LOG.md has no {named!r}"
