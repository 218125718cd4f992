"""Unmerged, merged in the given order, merged in our order, and everything in memory, over budgets: a table and a plot.

Accuracy on the stream is the share of frames answered in time times the accuracy that the manifest states, on average
over tasks: an answer that comes too late is worth nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gemel.edge.blocks import Blocks
from gemel.edge.counts import Counts
from gemel.edge.profile import Profile
from gemel.edge.schedule import best_batches, best_order
from gemel.edge.simulator import Load, Plan, budgets_between, simulate
from gemel.results_store.files import ResultsError

MIB = 1 << 20
RESIDENT = "everything in memory"


class Row(NamedTuple):
    """One way to run the workload at one budget."""

    way: str
    budget_bytes: int
    share: float  # of frames answered in time
    least_share: float  # of the task that fares worst
    accuracy: float  # on the stream
    bytes_moved: int
    swap_seconds: float


def compare(
    blocks: tuple[Blocks, Blocks],
    profile: Profile,
    load: Load,
    budgets: int | Sequence[int],
    accuracies: Mapping[str, float],
    eager: bool = False,
) -> list[Row]:
    """A row per way and budget that holds its largest model.

    blocks: (merged, unmerged). budgets: in bytes, or how many, from the largest model alone to all without sharing.
    Raises ValueError if no model fits.
    """
    merged, unmerged = blocks
    sizes = budgets_between(merged, unmerged, budgets) if isinstance(budgets, int) else list(budgets)
    rows = []
    for budget in sizes:
        order = best_order(merged, budget, eager, profile.groups)
        batches = best_batches(merged, profile, budget, load, order, eager)
        ways = {
            "unmerged": (unmerged, Plan(eager=eager, shared_computation=False)),
            "merged, given order": (merged, Plan(eager=eager)),
            "merged, our order": (merged, Plan(order, eager=eager)),
            "merged, our order and batches": (merged, Plan(order, batches, eager)),
        }
        for way, (own, plan) in ways.items():
            rows.append(_row(way, budget, simulate(own, profile, budget, load, plan), accuracies))
    everything = simulate(unmerged, profile, unmerged.distinct_bytes, load, Plan(shared_computation=False))
    return [*rows, _row(RESIDENT, unmerged.distinct_bytes, everything, accuracies)]


def _row(way: str, budget: int, counts: Counts, accuracies: Mapping[str, float]) -> Row:
    shares = {task: counted.share for task, counted in counts.tasks.items()}
    accuracy = sum(shares[task] * accuracies[task] for task in shares) / len(shares)
    swap = sum(counted.swap_seconds for counted in counts.tasks.values())
    return Row(way, budget, counts.share, min(shares.values()), accuracy, counts.bytes_moved, swap)


def rows_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    from tabulate import tabulate

    header = ("MiB", "way", "frames in time", "worst task", "accuracy on the stream", "GiB moved", "s waited")
    cells = [
        (
            f"{row.budget_bytes / MIB:.1f}",
            row.way,
            f"{100 * row.share:.1f} %",
            f"{100 * row.least_share:.1f} %",
            f"{row.accuracy:.3f}",
            f"{row.bytes_moved / (1 << 30):.2f}",
            f"{row.swap_seconds:.2f}",
        )
        for row in rows
    ]
    aligned = ("right", "left", *("right" for _ in header[2:]))
    return tabulate(cells, header, tablefmt="simple", colalign=aligned, disable_numparse=True)


def draw(rows: Sequence[Row], file: str | Path) -> None:
    """A plot of frames in time against memory. Raises ResultsError if matplotlib is missing or refuses the file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ResultsError(f"{file}: a plot needs matplotlib: pip install 'gemel-merging[edge]'") from None
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        budgets, shares = [row.budget_bytes / MIB for row in own], [100 * row.share for row in own]
        if way == RESIDENT:
            axes.axhline(shares[0], linestyle="--", color="grey", label=way)
        else:
            axes.plot(budgets, shares, marker="o", label=way)
    axes.set(xlabel="memory for weights, MiB", ylabel="frames answered in time, %", ylim=(0, 102))
    axes.legend()
    try:
        figure.savefig(file, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ResultsError(f"{file}: cannot be written: {error}") from None
