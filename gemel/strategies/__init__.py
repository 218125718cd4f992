"""Which groups to try next. A strategy sees groups and outcomes, never weights or data.

Open base.py for what a strategy is; a new one is a class in a file here and a line in STRATEGIES.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemel.strategies.base import Strategy

# Name -> where the class is; imported when it is asked for, so that the command line knows the names without torch.
STRATEGIES = {
    "adaptive": "gemel.strategies.adaptive:Adaptive",
    "gemel": "gemel.strategies.baselines:Gemel",
    "all": "gemel.strategies.baselines:All",
    "stem": "gemel.strategies.baselines:Stem",
}
STEM = "stem"  # its layers pair by their place, not by likeness


def strategy_class(name: str) -> "Callable[..., Strategy]":
    """The class of a strategy of STRATEGIES, to be called with (models, groups=...)."""
    module, _, attribute = STRATEGIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
