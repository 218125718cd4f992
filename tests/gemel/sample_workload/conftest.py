"""A prepared embedded default, small enough for tests."""

import pytest
from tiny_sample import METHODS, TINY

from gemel.sample_workload.prepare import prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder of a small embedded default; a test that changes it must restore it."""
    root = tmp_path_factory.mktemp("sample")
    prepare(METHODS, root, TINY, processes=1)
    return root
