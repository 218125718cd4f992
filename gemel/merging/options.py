"""How a workload is merged: what may be asked for, and what is best for a strategy where nothing was."""

import math
from collections.abc import Callable

from gemel.alignment.align import METHODS as ALIGNMENTS
from gemel.alignment.matching import BY_ORDER, MATCHINGS
from gemel.environment import DEVICES
from gemel.environment.device import has_device
from gemel.merging.initialisation import (
    ADAPTER_BUDGET_OF,
    ALIGNMENT_OF,
    LEAST_SQUARES,
    MATCHING_OF,
    MAX_ADAPTER_BUDGET,
    NO_ALIGNMENT,
    WEIGHTS_OF,
)
from gemel.sharing.initial_weights import INITIAL_WEIGHTS
from gemel.strategies import STEM, STRATEGIES
from gemel.training.options import TrainingOptions
from gemel.workload import Problem

MAY_BE_NONE = ("warmup_steps", "statistics_batches", "screening_images")  # training options that 0 turns off


def with_defaults(how: dict) -> dict:
    """The options given, and for those left open (None) what the strategy does best with."""
    strategy, price = how["strategy"], how["adapter_budget"]
    return {
        **how,
        "initial_weights": how["initial_weights"] or WEIGHTS_OF.get(strategy, "mean"),
        "alignment": how["alignment"] or ALIGNMENT_OF.get(strategy, NO_ALIGNMENT),
        "matching": how["matching"] or MATCHING_OF.get(strategy, BY_ORDER),
        "adapter_budget": ADAPTER_BUDGET_OF.get(strategy, 0.0) if price is None else float(price),
    }


def option_problems(how: dict, device, time_budget, seed, num_workers, cache_bytes, training) -> list[Problem]:
    """What is wrong with the options of merge_workload; how: those that a strategy has defaults for."""
    problems = []

    def check(ok: bool, key: str, got: object, allowed: str) -> None:
        if not ok:
            problems.append(Problem("options", key, repr(got), allowed))

    allowed = {
        "strategy": [*STRATEGIES],
        "initial_weights": [None, *INITIAL_WEIGHTS, LEAST_SQUARES],
        "alignment": [None, NO_ALIGNMENT, *ALIGNMENTS],
        "matching": [None, *([BY_ORDER] if how["strategy"] == STEM else MATCHINGS)],
    }
    for key, values in allowed.items():
        check(how[key] in values, key, how[key], ", ".join(filter(None, values)))
    price, most = how["adapter_budget"], MAX_ADAPTER_BUDGET if how["strategy"] in [*ADAPTER_BUDGET_OF] else 0.0
    adapted = price is None or (_is_number(price) and 0 <= price <= most)
    check(adapted, "adapter_budget", price, f"None or a number in [0, {most:g}] with strategy {how['strategy']}")
    check(isinstance(seed, int) and seed >= 0, "seed", seed, "a whole number from 0 on")
    budgeted = time_budget is None or (isinstance(time_budget, (int, float)) and time_budget > 0)
    check(budgeted, "time_budget", time_budget, "seconds, more than 0")
    check(type(cache_bytes) is int and cache_bytes >= 0, "cache_bytes", cache_bytes, "a whole number from 0 on")
    workers = num_workers is None or (isinstance(num_workers, int) and num_workers >= 0)
    check(workers, "num_workers", num_workers, "None or a whole number from 0 on")
    check(device in DEVICES, "device", device, ", ".join(DEVICES))
    if not has_device(device):
        check(False, "device", device, "auto or cpu: torch sees no CUDA device")
    fields = TrainingOptions.__dataclass_fields__
    for key, value in training.items():
        allowed = (
            _allowed(key, fields[key].default) if key in fields else (lambda v: False, f"one of {', '.join(fields)}")
        )
        check(allowed[0](value), key, value, allowed[1])
    return problems


def _allowed(key: str, default: object) -> tuple[Callable[[object], bool], str]:
    """(check, what is allowed) of one training option."""
    if isinstance(default, bool):
        return lambda v: isinstance(v, bool), "True or False"
    if isinstance(default, int):
        least = 0 if key in MAY_BE_NONE else 2
        none = " (none)" * (least == 0)
        return lambda v: type(v) is int and v >= least, f"a whole number of at least {least}{none}"
    if key == "average_decay":
        return lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 (no average), below 1"
    if key.endswith("_weight") or key == "private_epochs":
        return lambda v: _is_number(v) and v >= 0, "a number of at least 0"
    return lambda v: _is_number(v) and v > 0, "a number greater than 0"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
