"""The time that a frozen prefix saves."""

import pytest

from benchmarks import frozen_prefix


@pytest.mark.exhaustive
def test_a_frozen_prefix_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(frozen_prefix, "REPEATS", 3)
    given = ["squeezenet1_0:features.12.squeeze", "resnet18:conv1", "--size", "64"]
    assert frozen_prefix.main(given) == 0
    squeezenet, resnet = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    assert squeezenet[2] == "features.11" and resnet[2] == "-", "the first layer is tied"
    whole, frozen, kept = (float(squeezenet[i]) for i in (7, 9, 11))
    assert kept < whole and frozen < whole
    for wrong in (["resnet18"], ["resnet17:fc"], ["resnet18:fc2"]):
        with pytest.raises(SystemExit):
            frozen_prefix.main(wrong)
        assert "allowed: " in capsys.readouterr().err
