"""Mutants of a small file, and the command over it at small size."""

import ast

import pytest

from benchmarks import mutation

SOURCE = '''
def larger(a: int | None, b: int) -> int | None:
    """The larger number."""
    if a > b:
        return a
    return b
'''
TESTS = """
import importlib.util

spec = importlib.util.spec_from_file_location("larger", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def test_the_first():
    assert module.larger(2, 1) == 2


def test_both():
    assert {{module.larger(2, 1), module.larger(1, 2)}} == {{2}}
"""


def test_mutants_are_single_changes_outside_of_annotations():
    found = list(mutation.mutants_of("larger.py", SOURCE))
    assert [(mutant.line, mutant.text.split("->")[1].strip()) for mutant in found] == [
        (4, "if not a > b:"),
        (6, "return None"),
        (4, "a >= b"),
        (5, "return None"),
    ]
    original = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in found:
        changed = ast.unparse(mutation.mutated(SOURCE, mutant)).splitlines()
        assert len([1 for one, other in zip(original, changed, strict=True) if one != other]) == 1


@pytest.mark.parametrize(
    "before, after",
    [
        ("x += 1", ["x -= 1", "pass", "x += 2"]),
        ("x.part = y", ["pass"]),
        ("x = y", []),
        ("a and b", ["a or b"]),
        ("not a", ["a"]),
        ("a in b is c", ["a not in b is c", "a in b is not c"]),
        ("f(True, 0.5)", ["pass", "f(False, 0.5)", "f(True, 1.5)"]),
        ("while True:\n    break", ["while not True: break", "while False: break", "while True: pass"]),
    ],
)
def test_what_stands_in_the_place_of_what(before, after):
    found = [mutation.mutated(before, mutant) for mutant in mutation.mutants_of("x.py", before)]
    assert sorted(" ".join(ast.unparse(tree).split()) for tree in found) == sorted(after)


@pytest.mark.exhaustive
def test_the_command_prints_which_mutants_survive(tmp_path, monkeypatch, capsys):
    (tmp_path / "gemel").mkdir()
    (tmp_path / "tests").mkdir()
    file = tmp_path / "gemel" / "larger.py"
    file.write_text(SOURCE)
    (tmp_path / "tests" / "test_larger.py").write_text(TESTS.format(file=str(file)))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    monkeypatch.setattr(mutation, "WARM", ("json",))
    monkeypatch.chdir(tmp_path)
    assert mutation.main(["--room", "larger.py", "--sample", "0", "--tests", str(tmp_path / "tests")]) == 0
    *lines, share, _ = capsys.readouterr().out.splitlines()
    (survivor,) = (line for line in lines if line.endswith("survived"))
    assert "a > b  ->  a >= b" in survivor and len([line for line in lines if "  killed: " in line]) == 3
    assert "3 of 4 mutants killed (75%" in share


def test_the_interval_of_a_share():
    """Against the table in Newcombe, "Two-sided confidence intervals for the single proportion", 1998: 81 of 263."""
    assert mutation.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
