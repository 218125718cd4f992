"""The tables that people read: the workload and what it could save, one row per round, the closing report.

Every function returns text of at most 100 columns, in which nothing is cut; merger.py and merge_workloads.py print it.
"""

import textwrap
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from gemel.environment.units import duration, layer_name, mib, share
from gemel.forward.arithmetic import STORE_DTYPES
from gemel.forward.modes import Models
from gemel.results_store.points import points_of
from gemel.sharing.groups import Configuration, saved_bytes
from gemel.sharing.precision import stored_bytes
from gemel.sharing.signatures import find_layers
from gemel.strategies.baselines import gemel_units
from gemel.training.outcome import OUT_OF_MEMORY
from gemel.workload import Task

COUNTS = ("images", "objects")  # of a class, among its measures
WIDTH = 100  # columns of a terminal that every line fits
ROUND_COLUMNS = (
    ("round", 5),
    ("tied", 22),
    ("at target", 28),
    ("saved", 10),
    ("of optimal", 10),
    ("steps", 6),
    ("time", 6),
)
BELOW = "below target"
MOST_MISSED = 3  # tasks below target that a round names


def wrap(text: str, indent: str = "  ") -> str:
    """The text in lines of at most 100 columns; those after its first one are indented."""
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned first column, right-aligned others, widths by content."""
    aligned = ("left", *("right" for _ in header[1:]))
    text = tabulate(rows, header, tablefmt="simple", colalign=aligned if rows else None, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def fit_table(header: Sequence[str], rows: Sequence[Sequence[object]], optional: Sequence[str] = ()) -> str:
    """A table of at most 100 columns: optional columns are left out, then names continue on a second line."""
    header, rows = list(header), [list(row) for row in rows]
    left_out = list(optional)
    while (text := table(header, rows)) and _width(text) > WIDTH and left_out:
        index = header.index(left_out.pop(0))
        header, rows = [*header[:index], *header[index + 1 :]], [[*row[:index], *row[index + 1 :]] for row in rows]
    too_wide = _width(text) - WIDTH
    if too_wide <= 0:
        return text
    first = max(10, max(len(str(row[0])) for row in rows) - too_wide)
    return table(header, [["\n".join(textwrap.wrap(str(row[0]), first)), *row[1:]] for row in rows])


def _width(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


def workload_table(
    tasks: Mapping[str, Task], models: Models, groups: Configuration, store_dtype: str = "float32"
) -> str:
    """One row per task, and what the workload could save; bytes are those in a store of that type, as the groups'."""
    dtype = STORE_DTYPES[store_dtype]
    shared = dict.fromkeys(tasks, 0)
    for group in groups:
        for member in group.tasks:
            shared[member] += group.bytes
    rows = []
    for name, task in tasks.items():
        size = stored_bytes({name: models[name]}, dtype)
        rows.append(
            (
                name,
                task.kind.replace("_", " "),
                type(task.model).__name__,
                len(find_layers(models[name])),
                mib(size),
                share(shared[name], size),
                f"{task.unmerged_acc:.3f}",
                f"{task.target_acc:.3f}",
            )
        )
    total, optimal = stored_bytes(models, dtype), saved_bytes(groups)
    header = ("task", "kind", "model", "layers", "size", "shareable", "unmerged", "target")
    last = f"{mib(total)} in all; sharing every identical layer would save {mib(optimal)} ({share(optimal, total)})"
    return f"{fit_table(header, rows, ('layers', 'kind', 'model'))}\n{wrap(last)}"


def dataset_notes(notes: Mapping[str, Sequence[str]]) -> str:
    """What was passed over or put right in the datasets, a line each; "" if there is nothing to say."""
    lines = [f"  {name}: {line.removeprefix('1 times: ')}" for name, found in notes.items() for line in found]
    return "\n".join(["of the datasets:", *lines]) if lines else ""


def plan_table(groups: Configuration, total_bytes: int, limit: int = 20) -> str:
    """What could be saved, by unit of equal signature and tasks, largest first."""
    units = gemel_units(groups)
    rows = [
        (layer_name(unit[0].signature), len(unit), len(unit[0].tasks), mib(saved_bytes(unit))) for unit in units[:limit]
    ]
    text = fit_table(("identical layers", "groups", "tasks", "could save"), rows)
    rest = units[limit:]
    more = f"\nand {len(rest)} more, {mib(sum(map(saved_bytes, rest)))}" if rest else ""
    optimal = saved_bytes(groups)
    return f"{text}{more}\nin all {mib(optimal)} of {mib(total_bytes)} ({share(optimal, total_bytes)})"


def round_header() -> str:
    return "  ".join(title.ljust(width) for title, width in ROUND_COLUMNS).rstrip()


def round_row(row: Mapping) -> str:
    """One round, as RunRecord.add_round records it, in fixed columns; below it, the tasks that missed their targets."""
    groups = f"{row['num_new_groups']} group{'s' * (row['num_new_groups'] != 1)}"
    verdict = f"{len(row['met'])}/{len(row['trained'])} {_verdict(row)}"
    cells = (
        str(row["round"]),
        f"{groups}, {len(row['tasks'])} tasks",
        verdict,
        mib(row["saved_bytes"]),
        share(row["saved_bytes"], row["optimal_saved_bytes"]),
        str(row["steps"]),
        duration(row["seconds"]),
    )
    line = "  ".join(cell.ljust(width) for cell, (_, width) in zip(cells, ROUND_COLUMNS, strict=True)).rstrip()
    return "\n".join([line, *_missed(row)])


def _missed(row: Mapping) -> list[str]:
    """Which tasks are below their targets and how far, the furthest first; a task never evaluated is only named."""
    below = [task for task in row["trained"] if task not in row["met"]]
    targets = row.get("targets", {})
    reached = {task: row["accuracies"][task] for task in below if task in targets and row["reason"] != OUT_OF_MEMORY}
    below.sort(key=lambda task: reached[task] / targets[task] if task in reached else 0.0)
    said = [f"{task} {reached[task]:.3f} of {targets[task]:.3f}" if task in reached else task for task in below]
    more = [f"and {len(said) - MOST_MISSED} more"] if len(said) > MOST_MISSED else []
    return [_indented(f"{BELOW}: {', '.join([*said[:MOST_MISSED], *more])}")] if said else []


def _indented(text: str) -> str:
    indent = " " * (ROUND_COLUMNS[0][1] + 2)
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _verdict(row: Mapping) -> str:
    if not row["kept"]:
        return f"undone: {row['reason']}"
    kept_for = row.get("kept_for", row["trained"])  # results of before kept whole trials only
    return "kept" if len(kept_for) == len(row["trained"]) else f"kept for {len(kept_for)}"


def closing_report(manifest: Mapping, per_class: bool, goal: int | None = None) -> str:
    """The closing table, every class where asked for, how the memory goal (bytes) fared, whether the search is over."""
    parts = [closing_table(manifest), *([per_class_table(manifest)] if per_class else [])]
    over = "the time is over before everything was tried: the same command resumes"
    lines = [] if goal is None else [goal_report(manifest, goal)]
    lines += shared_normalisation(manifest["run"].get("shared_normalisation"))
    if not manifest["run"]["finished"]:
        lines.append("without --memory the same command saves more" if lines and fits(manifest, goal) else over)
    return "\n".join(["\n\n".join(parts), *lines])


def memory_use(measured: Sequence[Mapping]) -> str:
    """`memory_use` of a run, a line per memory, of the machine or of a device: what was used and predicted, at most."""
    lines = []
    for one in measured:
        name = "machine" if one["memory_of"] == "cpu" else one["memory_of"]
        used, predicted = mib(one["used_bytes"]), mib(one["predicted_bytes"])
        lines.append(f"memory of the {name} in this run: {used} used, {predicted} predicted")
    return "\n".join(lines)


def shared_normalisation(found: Mapping | None) -> list[str]:
    """What sharing normalisation saves and costs, a line a group; nothing where it was not asked for."""
    if found is None:
        return []
    if not found["layers"]:
        return [
            wrap(f"normalisation: none is shared, after {found['trials']} trials: no two tasks would run more once")
        ]
    lines = [f"normalisation: {found['layers']} layers are shared, which saves {mib(found['saved_bytes'])}"]
    if tied := found.get("tied_layers"):  # earlier results do not say it
        lines.append(f"first layers that the search had left out: {tied} are tied for that")
    for group in found["groups"]:
        parts = (
            f"{name} {share(part, 1)} (accuracy of target "
            f"{found['accuracy_of_target'][name][0]:.3f} -> {found['accuracy_of_target'][name][1]:.3f})"
            for name, part in group.items()
        )
        lines.append(wrap(f"needs to run once a frame, of the multiplications: {', '.join(parts)}"))
    return lines


def fits(manifest: Mapping, goal: int | None) -> bool:
    """Whether the merged workload takes no more than so many bytes; without a goal it always fits."""
    return goal is None or manifest["memory"]["merged_bytes"] <= goal


def goal_report(manifest: Mapping, goal: int) -> str:
    """Whether the goal (bytes) is reached; if not, what it would take, or the trial that came nearest."""
    memory, run = manifest["memory"], manifest["run"]
    if fits(manifest, goal):
        untouched = " without sharing anything" if not memory["saved_bytes"] else ""
        return f"it fits{untouched}: {mib(memory['merged_bytes'])} of {mib(goal)}"
    missed = f"it does NOT fit: {mib(memory['merged_bytes'])} of {mib(goal)}"
    of_goal = run.get("goal") if (run.get("goal") or {}).get("bytes") == goal else None
    if of_goal and of_goal["would_take"]:
        return f"{missed}\n{_would_take(of_goal['would_take'])}"
    points = [point for point in points_of(manifest) if point["bytes"] <= goal]
    if not points:
        return f"{missed}\nno trial that would fit was made; --fresh searches for this goal from the start"
    near = max(points, key=lambda point: point["worst_accuracy_of_target"])
    worst, target = near["worst_task"], manifest["tasks"][near["worst_task"]]["target_acc"]
    return (
        f"{missed}\nnearest was round {near['round']}: {mib(near['bytes'])}, with {worst} at about "
        f"{near['accuracies'][worst]:.3f} of its target {target:.3f}"
    )


def _would_take(needed: Mapping) -> str:
    """Tolerances with which a search from the start fits: its first trials do not depend on them."""
    each = [
        f"a tolerance of {tolerance:g} for {name} (it then reaches {needed['accuracy'][name]:.3f}; its target now is "
        f"{needed['target'][name]:.3f})"
        for name, tolerance in needed["tolerance"].items()
    ]
    enough = f"tried, and {mib(needed['bytes'])} are then enough (--fresh, or another --results)"
    return f"without training it would take {' and '.join(each)}: {enough}"


def closing_table(manifest: Mapping) -> str:
    """Accuracy per task and memory, from the manifest of a finished run."""
    rows = []
    for name, task in manifest["tasks"].items():
        on_test = "-" if task["test_acc"] is None else f"{task['unmerged_test_acc']:.3f} -> {task['test_acc']:.3f}"
        unmerged, merged = f"{task['measured_unmerged_acc']:.3f}", f"{task['merged_acc']:.3f}"
        rows.append((name, unmerged, f"{task['target_acc']:.3f}", merged, "yes" if task["met"] else "NO", on_test))
    memory = manifest["memory"]
    saved, optimal, unmerged = memory["saved_bytes"], memory["optimal_saved_bytes"], memory["unmerged_bytes"]
    weights = manifest.get("precision", {}).get("weights", "float32")
    stored = "" if weights == "float32" else f" with weights in {weights}, in which tasks were judged"
    last = (
        f"memory {mib(unmerged)} -> {mib(memory['merged_bytes'])}{stored}: saved {mib(saved)} "
        f"({share(saved, unmerged)}), {share(saved, optimal)} of the optimal {mib(optimal)}, "
        f"in {manifest['run']['seconds']:.0f} s"
    )
    header = ("task", "unmerged", "target", "merged", "met", "on the test split")
    return "\n".join([fit_table(header, rows), wrap(last), *_time_of_steps(manifest["run"].get("rounds", []))])


def _time_of_steps(rounds: Sequence[Mapping]) -> list[str]:
    """How long training took, and how much of it went into waiting for images; nothing where nothing was trained."""
    training, reading = (sum(row.get(f"{what}_seconds", 0.0) for row in rounds) for what in ("training", "reading"))
    if not training:
        return []
    steps = sum(row["steps"] for row in rounds)
    return [f"training: {steps} steps in {training:.1f} s, of which {reading:.1f} s waiting for images"]


def per_class_table(manifest: Mapping) -> str:
    """One row per class of every task whose eval method can judge class by class."""
    rows = []
    for name, task in manifest["tasks"].items():
        for class_id, measured in (task["per_class"] or {}).items():
            names = task["class_names"] or ()
            called = names[int(class_id)] if int(class_id) < len(names) else class_id
            before, after = measured["unmerged"], measured["merged"]
            count = next((str(before[key]) for key in COUNTS if key in before), "-")
            values = (f"{key} {value:.3f} -> {after[key]:.3f}" for key, value in before.items() if key not in COUNTS)
            rows.append((name, called, count, "  ".join(values)))
    return fit_table(("task", "class", "on val", "unmerged -> merged"), rows)
