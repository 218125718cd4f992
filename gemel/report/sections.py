"""The sections of the report, each from the record alone."""

from collections.abc import Mapping
from typing import Any

from gemel.environment.units import duration, layer_name, mib, share
from gemel.report.charts import accuracy_chart, memory_chart, saving_chart
from gemel.report.html import Html, as_html, figure, number, paragraph, section, table
from gemel.report.layer_map import layer_map
from gemel.report.record import Record
from gemel.results_store.schema import private_bytes_of

MOST_NAMED = 6  # occurrences of a group that a table names


def summary(record: Record) -> Html:
    """What was reached, in one sentence, and accuracy by task."""
    memory, tasks = record.manifest["memory"], record.manifest["tasks"]
    met = sum(task["met"] for task in tasks.values())
    who = "Every task is" if met == len(tasks) else f"{met} of {len(tasks)} tasks are"
    saved, unmerged, optimal = memory["saved_bytes"], memory["unmerged_bytes"], memory["optimal_saved_bytes"]
    lead = (
        f"{len(tasks)} tasks took ", number("memory.unmerged_bytes", unmerged, mib(unmerged)), " and now take ",
        number("memory.merged_bytes", memory["merged_bytes"], mib(memory["merged_bytes"])), ": ",
        number("memory.saved_bytes", saved, mib(saved)), f" less ({share(saved, unmerged)}), {share(saved, optimal)} "
        "of the ", number("memory.optimal_saved_bytes", optimal, mib(optimal)),
        f" that sharing every identical layer would save. {who} at its target.",
    )  # fmt: skip
    header = ("task", "unmerged", "target", "merged", "met", "test, unmerged", "test, merged")
    keys = ("measured_unmerged_acc", "target_acc", "merged_acc", "met", "unmerged_test_acc", "test_acc")
    rows = [[name, *(_task_cell(name, key, task[key]) for key in keys)] for name, task in tasks.items()]
    text = Html(f'<p class="lead">{"".join(map(as_html, lead))}</p>')
    accuracies = table(header, rows, "Accuracy of each task, on val unless it says test")
    return section("What was reached", text, accuracies, _shared_normalisation(record))


def _shared_normalisation(record: Record) -> Html:
    """What sharing normalisation costs and saves; nothing where none is shared."""
    found = record.manifest["run"].get("shared_normalisation")
    if not found or not found["layers"]:
        return Html("")
    rows = [
        (name, share(part, 1), *(f"{ratio:.3f}" for ratio in found["accuracy_of_target"][name]))
        for group in found["groups"]
        for name, part in group.items()
    ]
    caption = f"{found['layers']} normalisation layers are shared: tasks that see the same frames run these parts once"
    header = ("task", "multiplications that run once", "accuracy of target before", "after")
    return table(header, rows, caption)


def _task_cell(name: str, key: str, value: Any) -> Html:
    if key == "met":
        return Html('<span class="good">yes</span>' if value else '<span class="bad">no</span>')
    return as_html("-") if value is None else number(f"tasks.{name}.{key}", value, f"{value:.3f}")


def saving(record: Record) -> Html:
    """Saving over time, and every round."""
    run, optimal = record.manifest["run"], record.manifest["memory"]["optimal_saved_bytes"]
    caption = "Saving over time: the line is what is kept; a dot is a round that was kept, a cross one that was undone"
    header = ("round", "ended", "tasks at target", "verdict", "would save", "kept by then", "steps")
    rows = [
        (
            row["round"],
            duration(row["ended_at"]) if "ended_at" in row else "-",
            f"{len(row['met'])} of {len(row['trained'])}",
            _verdict(row),
            mib(row["trial_saved_bytes"]),
            mib(row["saved_bytes"]),
            row["steps"],
        )
        for row in record.rounds
    ]
    if not rows:
        return section("Saving over time", paragraph("No round was played."))
    chart = saving_chart(record.rounds, run.get("history", []), optimal, caption)
    return section("Saving over time", figure(chart, caption, table(header, rows, "Every round")))


def _verdict(row: Mapping[str, Any]) -> str:
    if not row["kept"]:
        return f"undone: {row['reason']}"
    return "kept" if len(row["kept_for"]) == len(row["trained"]) else f"kept for {len(row['kept_for'])}"


def accuracy(record: Record) -> Html:
    """Accuracy of each task against its target through the rounds."""
    targets = {name: task["target_acc"] for name, task in record.manifest["tasks"].items()}
    points: dict[str, list[tuple[int, float, bool]]] = {
        name: [(0, task["measured_unmerged_acc"], True)] for name, task in record.manifest["tasks"].items()
    }
    for row in record.rounds:
        for name, reached in row["accuracies"].items():
            if name in points:
                points[name].append((row["round"], reached, name in row["kept_for"]))
    caption = "Accuracy through the rounds: filled where it was kept, open where it was undone; the line is the target"
    rows = [
        (name, f"{targets[name]:.3f}", ", ".join(f"{n}: {a:.3f}{'' if kept else ' undone'}" for n, a, kept in found))
        for name, found in points.items()
    ]
    numbers = table(("task", "target", "round: accuracy (0: unmerged)"), rows, "Accuracy of each task in each round")
    return section("Accuracy", figure(accuracy_chart(points, targets, caption), caption, numbers))


def the_map(record: Record) -> Html:
    """Which layers of which models are one."""
    groups = record.manifest["shared_layers"]
    caption = "Layers by depth, width by bytes. Layers of one colour are one set of weights; grey ones are private"
    header = ("group", "layer", "bytes of one set", "private beside it, each", "layers that are one")
    rows = [
        (
            i,
            layer_name(group["signature"]),
            number(f"shared_layers.{i - 1}.bytes", group["bytes"], mib(group["bytes"])),
            mib(private_bytes_of(group)) if private_bytes_of(group) else "-",
            _of_tasks(group["occurrences"], len(record.manifest["tasks"])),
        )
        for i, group in enumerate(groups, 1)
    ]
    picture = layer_map(record.layers, caption)
    return section("Which layers are one", figure(picture, caption, table(header, rows, "Every shared layer")))


def _of_tasks(occurrences: list[Mapping[str, str]], num_tasks: int) -> str:
    """Layers that are one, with their tasks, or that these are all tasks."""
    names = {occurrence["layer"] for occurrence in occurrences}
    everywhere = len(occurrences) == num_tasks > 2 and len(names) == 1
    return f"{names.pop()} of all {num_tasks} tasks" if everywhere else _named(occurrences, None)


def _named(occurrences: list[Mapping[str, str]], most: int | None = MOST_NAMED) -> str:
    """Layers, and the tasks that they are of; tasks in which a layer has one name are named together."""
    tasks: dict[str, list[str]] = {}
    for occurrence in occurrences:
        tasks.setdefault(occurrence["layer"], []).append(occurrence["task"])
    shown = (f"{layer} of {', '.join(of[:most])}{' and others' * (most is not None and len(of) > most)}"
             for layer, of in tasks.items())  # fmt: skip
    return "; ".join(shown)


def memory(record: Record) -> Html:
    """Memory by model before and after."""
    caption = "Memory by model. A shared tensor counts for each of its n models with 1/n, so that all sum up"
    keys = "".join(
        f'<span class="key {part}"></span>{text}'
        for part, text in (("private", "private"), ("adapter", "adapters, scales and biases"), ("shared", "shared"))
    )
    rows = [
        (name, mib(task.before), mib(task.private), mib(task.adapters), mib(task.shared), mib(task.after))
        for name, task in record.memory.items()
    ]
    whole = record.manifest["memory"]
    rows.append(("all", mib(whole["unmerged_bytes"]), "", "", "", mib(whole["merged_bytes"])))
    numbers = table(("model", "before", "private", "adapters", "its part of shared", "after"), rows, "Memory by model")
    chart = memory_chart(record.memory, caption)
    return section("Memory", Html(f"<p>{keys}</p>"), figure(chart, caption, numbers))


def why_not(record: Record) -> Html:
    """Why groups that could be shared are not."""
    entries = record.manifest["run"].get("not_shared")
    if entries is None:
        return Html("")
    if not entries:
        return section("Why not more?", paragraph("Every group of identical layers is shared."))
    rows = [
        (
            layer_name(entry["signature"]),
            number(f"run.not_shared.{i}.could_save_bytes", entry["could_save_bytes"], mib(entry["could_save_bytes"])),
            reason(entry),
            "-" if entry["sensitivity"] is None else f"{entry['sensitivity']:.2g}",
            _named(entry["occurrences"]),
        )
        for i, entry in enumerate(entries)
    ]
    text = (
        "Sensitivity: how much sharing was predicted to hurt the task, as error at its outputs (their variance is 1)."
    )
    header = ("layer", "could save", "why not", "sensitivity", "left out")
    return section("Why not more?", paragraph(text), table(header, rows, "Groups that are not wholly shared"))


def reason(entry: Mapping[str, Any]) -> str:
    """Why a group is not shared, in a few words with a number."""
    if "task" in entry:
        reached = f"{entry['accuracy']:.3f} of {entry['target']:.3f}"
        return f"round {entry['round']} was undone for it: {entry['task']} reached about {reached}"
    if "round" in entry:
        return f"round {entry['round']}: {entry['why']}"
    return f"{entry['why']}: {entry['detail']}" if entry.get("detail") else entry["why"]


def per_class(record: Record) -> Html:
    """Accuracy by class, of tasks that were measured so."""
    parts = []
    for name, task in record.manifest["tasks"].items():
        names = task.get("class_names") or ()
        rows = []
        for class_id, measured in (task.get("per_class") or {}).items():
            called = names[int(class_id)] if 0 <= int(class_id) < len(names) else class_id
            values = (f"{key} {value:g} → {measured['merged'][key]:g}" if value != measured["merged"][key] else
                      f"{key} {value:g}" for key, value in measured["unmerged"].items())  # fmt: skip
            rows.append((called, ", ".join(_rounded(v) for v in values)))
        if rows:
            parts.append(table(("class", "unmerged → merged"), rows, name))
    missing = "Not measured in this run; the flag --per-class of merge_workloads.py does."
    return section("Classes", *(parts or [paragraph(missing)]))


def _rounded(text: str) -> str:
    words = (f"{float(w):.3f}" if "." in w and w.replace(".", "").isdigit() else w for w in text.split(" "))
    return " ".join(words)


def card(record: Record) -> Html:
    """How the run was started, and what it was made with."""
    run = record.manifest["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    flags = ", ".join(f"{key} {value}" for key, value in run.get("flags", {}).items() if value is not None)
    rows = (
        ("folder", record.path.resolve().name),
        ("command", run.get("command") or "not recorded"),
        ("started", run.get("date", "not recorded")),
        ("time", f"{duration(run.get('seconds', 0))}, {len(run.get('rounds', []))} rounds"),
        ("search", "everything was tried" if run.get("finished") else "ended before everything was tried"),
        ("strategy", f"{run.get('strategy')}, seed {run.get('seed')}"),
        ("versions", versions),
        ("options", flags),
        ("manifest", f"sha256 {record.manifest['sha256']}"),
        ("data", "; ".join(_data(record))),
    )
    inner = "".join(f"<dt>{as_html(key)}</dt><dd>{as_html(value)}</dd>" for key, value in rows)
    return section("This run", Html(f"<dl>{inner}</dl>"))


def _data(record: Record) -> list[str]:
    """The dataset of each task, with the digest of its files."""
    marks = record.manifest["run"].get("fingerprint", {}).get("tasks", {})
    return [
        f"{name}: {mark['dataset']}" for name, mark in marks.items() if isinstance(mark, dict) and "dataset" in mark
    ]
