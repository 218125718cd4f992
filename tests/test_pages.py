"""README and docs name what exists, and list every option, flag and room."""

import dataclasses
import re
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, blocks_of
from test_house import FLOORS

from gemel.console import tables
from gemel.console.flags import parse_arguments
from gemel.options import DEFAULTS, DEFAULTS_OF, TRAINING_OF, MergeOptions
from gemel.training.options import TrainingOptions


def test_the_readme_is_short():
    assert len(PAGES[0].read_bytes()) <= 8000


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        assert "://" in target or (page.parent / path).exists(), target
        assert not anchor or anchor in slugs(page.parent / path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\s]+)`", text):
        if re.match(r"(gemel|tests|benchmarks|docs|model_architectures)/|\w+\.py$", span) and span != "mine.py":
            assert (ROOT / span).exists() or span == "__init__.py", span


def test_the_tree_of_the_readme_exists():
    (tree,) = (block for block in blocks_of(PAGES[0]) if block.text.startswith("merge_workloads.py"))
    for line in tree.text.splitlines():
        assert (ROOT / line.split()[0]).exists() and len(line.split()) > 1, line


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_every_table_stands_under_a_command(name):
    for section in re.split(r"^## ", (ROOT / name).read_text(), flags=re.MULTILINE):
        for match in re.finditer(r"^\|---", section, re.MULTILINE):
            above = section[: match.start()]
            shown = "```sh\n" in above or re.search(r"`python -m [^`]+`", above)
            # in a table of commands, each row names its own
            assert shown or "\n| `python -m" in section[match.start() :], section.splitlines()[0]


def test_the_output_in_the_readme_has_the_columns_of_the_console():
    (output,) = (block.text for block in blocks_of(PAGES[0]) if "round  tied" in block.text)
    titles = [title for title, _ in tables.ROUND_COLUMNS]
    line = next(line for line in output.splitlines() if line.startswith("round"))
    assert re.split(r"\s{2,}", line) == titles
    source = Path(tables.__file__).read_text()
    for line in output.splitlines():
        if line.startswith("task "):
            columns = [column for column in re.split(r"\s{2,}", line) if column != ".."]
            assert all(f'"{column}"' in source or f"'{column}'" in source for column in columns), line


def rows_of(page: str) -> dict[str, list[str]]:
    """First cell, without backquotes -> the other cells, of all tables of a page."""
    lines = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_option_is_listed_with_its_default():
    rows = rows_of("strategies.md")
    for options in (MergeOptions, TrainingOptions):
        for field in dataclasses.fields(options):
            if field.name == "training":
                continue
            expected = f"`{field.default!r}`".replace("'", '"')
            if field.name in DEFAULTS:
                both = DEFAULTS_OF["adaptive"][field.name], DEFAULTS[field.name]
                expected = " / ".join(f"`{value!r}`".replace("'", '"') for value in both)
            assert rows[field.name][0] == expected, field.name
    said = " ".join((ROOT / "docs" / "strategies.md").read_text().split())
    assert "With `adaptive`, `feature_weight` and `probability_weight` are 1.0 and `private_epochs` is 0.5." in said
    assert TRAINING_OF == {"adaptive": {"feature_weight": 1.0, "probability_weight": 1.0, "private_epochs": 0.5}}


def test_every_flag_is_listed():
    flags = {name.split()[0] for name in rows_of("strategies.md") if name.startswith("--")} - {"--strategy"}
    assert flags == {f"--{name.replace('_', '-')}" for name in vars(parse_arguments([]))} - {"--strategy"}


def test_rooms_stand_on_their_floors():
    rows = re.findall(r"^\| (\d) \| `gemel/(\w+)(?:/|\.py)`", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    listed_rooms = {room: int(floor) for floor, room in rows}
    expected = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    there = {room for room in expected if list((ROOT / "gemel").glob(f"{room}*"))}
    assert listed_rooms == {room: floor for room, floor in expected.items() if room in there}
