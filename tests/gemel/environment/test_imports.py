"""Files of one name in two folders: the user's and the checkout's each get their own."""

import sys
from pathlib import Path

import pytest

from gemel.environment.imports import CHECKOUT, imported_from
from gemel.workload import WorkloadError, load_model_dict


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Puts back what was imported under the names that are used here."""
    import eval_methods
    import trainer
    import transforms

    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("mine", "mynet", "other"):
        sys.modules.pop(name, None)
    sys.modules.update(transforms=transforms, eval_methods=eval_methods, trainer=trainer)


@pytest.fixture
def folder(tmp_path):
    """As a folder of torchvision's detection references, with files of the same names as ours."""
    (tmp_path / "transforms.py").write_text("WIDTH = 7\n")
    (tmp_path / "trainer.py").write_text("WIDTH = 8\n")
    (tmp_path / "mine.py").write_text(
        "import transforms\nfrom eval_methods import classification_eval\nfrom trainer import WIDTH\n"
        "def create_model_dict():\n"
        "    from transforms import WIDTH as later\n"
        "    return {'x': (transforms.WIDTH, WIDTH, later, classification_eval)}\n"
    )
    return tmp_path


def test_files_beside_the_workload_file_come_first(folder):
    import merger  # has imported our trainer already
    from eval_methods import classification_eval

    assert load_model_dict(folder / "mine.py") == {"x": (7, 8, 7, classification_eval)}
    assert merger.recover.__module__ == "trainer" and not hasattr(merger, "WIDTH")


def test_a_process_that_imports_the_file_again_finds_the_same(folder):
    """As a loader process does: first the script, then the file that a transform comes from."""
    for name in ("transforms", "trainer"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    with imported_from(CHECKOUT):
        from transforms import detection_transforms
    import mine

    assert mine.create_model_dict()["x"][:3] == (7, 8, 7) and callable(detection_transforms)


def test_what_was_imported_from_elsewhere_stays(tmp_path):
    (tmp_path / "other.py").write_text("WHERE = 'elsewhere'")
    (tmp_path / "transforms.py").write_text("WHERE = 'elsewhere'")
    sys.modules.pop("transforms")
    sys.path.insert(0, str(tmp_path))
    import transforms as theirs

    with imported_from(CHECKOUT):
        import transforms as ours
    import transforms as again

    assert again is theirs and ours is not theirs and Path(ours.__file__).parent == CHECKOUT
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize("name", ["mine.txt", "mine.ipynb", "mine"])
def test_a_file_of_another_suffix(tmp_path, name):
    (tmp_path / name).write_text("def create_model_dict(): return {}")
    with pytest.raises(WorkloadError, match="whose name does not end in .py; allowed: a Python file that defines"):
        load_model_dict(tmp_path / name)


@pytest.mark.parametrize(
    "text, said",
    [
        ("def create_model_dict(:\n", "SyntaxError in {} line 1: invalid syntax"),
        ("x = 1\nimport nothing_of_this_name\n", "ModuleNotFoundError in {} line 2: No module named 'nothing_of"),
        ("def create_model_dict():\n    return {}['a']\n", "KeyError in {} line 2: 'a'"),
        ("def create_model_dict():\n    raise MemoryError\n", "MemoryError in {} line 2: "),
    ],
)
def test_a_file_that_fails_says_where(tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(WorkloadError) as error:
        load_model_dict(tmp_path / "mine.py")
    assert said.format(tmp_path / "mine.py") in str(error.value)
    (tmp_path / "mine.py").write_text("def create_model_dict(): return {'a': 1}")  # a notebook's second try
    assert load_model_dict(tmp_path / "mine.py") == {"a": 1}
