"""A merged workload on a box with too little memory: profile, runtime, order and batch sizes, simulator.

Needs a results folder alone. Open runtime.py for how models take turns under a budget of memory, residency.py for what
moves when. `from gemel.edge import Runtime`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.edge.runtime import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    """`Runtime`, imported when it is first asked for: the command line is read without torch."""
    if name == "Runtime":
        from gemel.edge.runtime import Runtime

        return Runtime
    raise AttributeError(f"module 'gemel.edge' has no attribute {name!r}")
