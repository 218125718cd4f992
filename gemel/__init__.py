"""The library behind merge_workloads.py: everything that decides, fits, trains, stores and loads shared weights.

On a box that only loads results: `from gemel import load_merged`, or `python -m gemel verify RESULTS`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.results_store.load import load_merged

__all__ = ["load_merged"]


def __getattr__(name: str) -> Any:
    """`load_merged`, imported when it is first asked for: `import gemel` alone needs no torch."""
    if name == "load_merged":
        from gemel.results_store.load import load_merged

        return load_merged
    raise AttributeError(f"module 'gemel' has no attribute {name!r}")
