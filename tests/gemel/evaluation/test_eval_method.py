"""Running an eval method: what it returns and prints."""

from types import SimpleNamespace

import pytest

from gemel.evaluation.eval_method import evaluate


@pytest.mark.parametrize("value, got", [(1.5, "1.5"), (-1, "-1"), (None, "None"), (float("nan"), "nan")])
def test_what_an_eval_method_returns_is_checked(value, got):
    """Published fault: -1 (no ground truth) flows on as an accuracy."""
    task = SimpleNamespace(name="a_x", model=None, eval_method=lambda model, loader: value)
    with pytest.raises(ValueError, match=f"a_x: eval_method: got {got}; allowed: a number in"):
        evaluate(task, [])


def test_an_eval_method_may_print(capsys):
    task = SimpleNamespace(name="a_x", model="own", eval_method=lambda model, loader: print("pages") or len(model) / 10)
    assert evaluate(task, []) == 0.3 and evaluate(task, [], "other") == 0.5 and capsys.readouterr().out == ""
