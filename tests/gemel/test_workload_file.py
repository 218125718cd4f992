"""The user's file with the task dictionary. (Wrong files, through the script: test_merge_workloads.py.)"""

import sys

import pytest

from gemel.workload import WorkloadError, load_model_dict


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine", None)


def test_the_file_is_run_as_a_module_beside_its_own(tmp_path):
    (tmp_path / "beside_mine.py").write_text("NAME = 'a_x'")
    (tmp_path / "mine.py").write_text("from beside_mine import NAME\ndef create_model_dict(): return {NAME: __name__}")
    assert load_model_dict(tmp_path / "mine.py") == {"a_x": "mine"}
    sys.modules.pop("beside_mine")


@pytest.mark.parametrize("content, message", [(None, "which is no file"), ("create_model_dict = 3", "without it")])
def test_a_file_that_is_none(tmp_path, content, message):
    if content:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(WorkloadError, match=f"mine.py,? {message}; allowed: a Python file that defines"):
        load_model_dict(tmp_path / "mine.py")
