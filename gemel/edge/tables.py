"""The tables of a profile and of a run, as text."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from gemel.edge.profile import Profile

MIB = 1 << 20


def profile_table(profile: Profile) -> str:
    """A row per task: size, what it shares most, loading, running by batch size, activations."""
    batches = list(next(iter(profile.tasks.values())).run_ms)
    header = ["task", "MiB", "most shared with", "MiB shared", "load ms", *(f"run {n}, ms" for n in batches)]
    header.append(f"activations {batches[-1]}, MiB")
    rows = []
    for name, task in profile.tasks.items():
        other = max(task.shared_bytes, key=task.shared_bytes.__getitem__, default=None)
        shared = 0 if other is None else task.shared_bytes[other]
        row = [name, f"{task.bytes / MIB:.2f}", other if shared else "-", f"{shared / MIB:.2f}", f"{task.load_ms:.2f}"]
        row += [f"{ms:.2f}" for ms in task.run_ms.values()]
        rows.append([*row, f"{task.activation_bytes[batches[-1]] / MIB:.2f}"])
    return _table(header, rows)


def summary_table(summary: Mapping[str, Any]) -> str:
    """A row per task, and a line of totals."""
    header = ["task", "in time", "late", "dropped", "p50 ms", "p95 ms", "p99 ms", "turns", "run s", "swap s"]
    rows = []
    for name, task in summary["tasks"].items():
        percentiles = ["-" if ms is None else f"{ms:.1f}" for ms in task["latency_ms"].values()]
        row = [name, task["processed"], task["late"], task["dropped"], *percentiles, task["turns"]]
        rows.append([*row, f"{task['run_seconds']:.2f}", f"{task['swap_seconds']:.2f}"])
    kind = "merged" if summary["merged"] else "unmerged"
    watched = f"\n\n{_watch_table(summary['watch'])}" if "watch" in summary else ""
    return (
        f"{_table(header, rows)}\n\n{kind}: {summary['bytes_moved'] / MIB:.2f} MiB of weights moved in "
        f"{summary['seconds']:.2f} s, {summary['swap_seconds']:.2f} s of them waited for; at most "
        f"{summary['peak_resident_bytes'] / MIB:.2f} MiB in memory, budget {summary['budget_bytes'] / MIB:.2f} MiB"
        f"{_shared_computation(summary.get('shared_computation', {}))}{watched}"
    )


def _shared_computation(shared: Mapping[str, Any]) -> str:
    """A line per group of tasks that compute their first layers alike, and what that saved; "" if there is none."""
    if not shared.get("groups"):
        return ""
    lines = []
    for group in shared["groups"]:
        shares = ", ".join(f"{task} {100 * share:.0f} %" for task, share in group["share"].items())
        lines.append(f"computed alike, and run once a frame: {shares} of the multiplications")
    lines.append(
        f"first layers not run again for {sum(shared['frames'].values())} frames, {shared['seconds_saved']:.2f} s "
        f"saved; {shared['peak_bytes'] / MIB:.2f} MiB of their outputs kept at most (activations)"
    )
    return "\n" + "\n".join(lines)


def event_text(event: Mapping[str, Any]) -> str:
    """What is printed when a task goes back."""
    return (
        f"{event['task']}: from frame {event['frame']} on served by its unmerged model: of {event['sampled']} sampled "
        f"frames, merged and unmerged agree on {100 * event['agreement_recently']:.1f} % of the newest, "
        f"agreed were {100 * event['agreed']:.1f} %, at least {100 * event['level']:.1f} % are allowed"
    )


def _watch_table(watch: Mapping[str, Any]) -> str:
    """A row per watched task."""
    header = ["task", "frames compared", "agreement", "agreed", "least allowed", "served by"]
    rows = []
    for name, task in watch["tasks"].items():
        shares = ["-" if task[key] is None else f"{100 * task[key]:.1f} %" for key in ("agreement", "agreed", "level")]
        back = task["went_back_at"]
        rows.append([name, task["sampled"], *shares, "merged" if back is None else f"unmerged, from frame {back} on"])
    return f"{_table(header, rows)}\n{watch['seconds']:.2f} s for comparing merged and unmerged models"


def _table(header: list, rows: list) -> str:
    aligned = ("left", *("right" for _ in header[1:]))
    return tabulate(rows, header, tablefmt="simple", colalign=aligned, disable_numparse=True)
