"""Charts as inline SVG, drawn by matplotlib: saving over time, accuracy through the rounds, memory by model.

Colours are placeholders while matplotlib draws, and variables of the page afterwards, so that a chart follows light and
dark. Text stays text.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gemel.environment.units import MIB
from gemel.report.html import Html, as_html
from gemel.report.record import TaskMemory
from gemel.report.style import COLOURS

PLACEHOLDERS = {
    name: f"#0{i:x}0b0c" for i, name in enumerate(COLOURS)
}  # what matplotlib draws with -> the page's colour
SETTINGS: Any = {  # matplotlib names the keys one by one in its types
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"axes.{part}": PLACEHOLDERS["muted"] for part in ("edgecolor", "labelcolor")},
    **{f"{axis}tick.color": PLACEHOLDERS["muted"] for axis in "xy"},
    "grid.color": PLACEHOLDERS["line"],
}
WIDTH = 8.0  # inches at 72 points
PANEL_COLUMNS, PANEL_HEIGHT, LETTERS = 4, 1.35, 116  # of a row of panels
MOST_MARKS = 200  # points that have a mark each


def saving_chart(
    rounds: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], optimal: int, label: str
) -> Html:
    """What is saved over time; each round is a mark at what it would have saved, kept or undone."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(2.6)
        ends = [row["ended_at"] for row in rounds if "ended_at" in row]
        last = max([*ends, *(entry["seconds"] for entry in history)], default=1.0)
        times = [0.0, *(entry["seconds"] for entry in history), last]
        saved = [0.0, *(entry["saved_bytes"] / MIB for entry in history)]
        axes.step(times, [*saved, saved[-1]], where="post", color=PLACEHOLDERS["shared"], linewidth=1.8)
        axes.axhline(optimal / MIB, color=PLACEHOLDERS["muted"], linestyle="--", linewidth=1)
        axes.annotate("optimal", (0, optimal / MIB), (3, 3), textcoords="offset points", color=PLACEHOLDERS["muted"])
        for kept, marker, colour in ((True, "o", "good"), (False, "x", "bad")):
            chosen = [row for row in rounds if row["kept"] == kept and "ended_at" in row]
            heights = [(row["saved_bytes"] if kept else row["trial_saved_bytes"]) / MIB for row in chosen]
            axes.scatter([r["ended_at"] for r in chosen], heights, marker=marker, color=PLACEHOLDERS[colour], zorder=3)
        axes.set(xlabel="seconds since the run began", ylabel="saved, MiB", ylim=(0, max(optimal / MIB, 1e-6) * 1.15))
        axes.set_xlim(0, last * 1.03)
        return _svg(figure, "saving", label)


def accuracy_chart(accuracies: Mapping[str, Sequence[tuple]], targets: Mapping[str, float], label: str) -> Html:
    """One panel a task, each with its own scale: accuracy in each round, filled where kept, against the target.

    accuracies: task -> (round, accuracy, whether it was kept), round 0 being the unmerged model. Where there are many
    points, those that were not kept are a line.
    """
    columns = min(PANEL_COLUMNS if len(targets) > 3 else 2, len(targets))
    rows = math.ceil(len(targets) / columns)
    marks = sum(map(len, accuracies.values())) <= MOST_MARKS
    with mpl.rc_context({**SETTINGS, "font.size": 7}):
        figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * rows + 0.3), layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for panel, (task, target) in zip(grid.flat, targets.items(), strict=False):
            _accuracy_panel(panel, accuracies[task], target, marks)
            letters = LETTERS // columns
            shown = task if len(task) <= letters else f"{task[: letters - 1]}…"
            panel.set_title(shown, fontsize=7, loc="left", color=PLACEHOLDERS["ink"])
        for panel in grid.flat[len(targets) :]:
            panel.set_axis_off()
        for panel in grid[-1]:
            panel.set_xlabel("round")
        return _svg(figure, "accuracy", label)


def _accuracy_panel(axes: Axes, points: Sequence[tuple], target: float, marks: bool) -> None:
    axes.patch.set_alpha(0)
    kept, undone = ([point[:2] for point in points if point[2] == which] for which in (True, False))
    if undone and not marks:
        axes.plot(*zip(*undone, strict=True), color=PLACEHOLDERS["bad"], linewidth=0.8)
    for chosen, face, edge in ((kept, "good", "good"), (undone if marks else [], None, "bad")):
        if chosen:
            numbers, reached = zip(*chosen, strict=True)
            colour = PLACEHOLDERS[face] if face else "none"
            axes.scatter(numbers, reached, s=12, facecolor=colour, edgecolor=PLACEHOLDERS[edge], linewidth=1)
    axes.axhline(target, color=PLACEHOLDERS["muted"], linestyle="--", linewidth=0.8)
    values = [target, *(point[1] for point in points)]
    margin = 0.1 * (max(values) - min(values)) + 0.005  # the differences to the target are what is looked at
    axes.set_ylim(max(0.0, min(values) - margin), min(1.0, max(values)) + margin)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def memory_chart(memory: Mapping[str, TaskMemory], label: str) -> Html:
    """Per model a thin bar for before, and one for after with its parts."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(0.42 * len(memory) + 0.7)
        for i, task in enumerate(memory.values()):
            axes.barh(i - 0.24, task.before / MIB, 0.16, color=PLACEHOLDERS["line"])
            left = 0.0
            for part, size in (("private", task.private), ("adapter", task.adapters), ("shared", task.shared)):
                if size:
                    axes.barh(i + 0.1, size / MIB, 0.42, left=left / MIB, color=PLACEHOLDERS[part])
                left += size
        axes.set_yticks(range(len(memory)), list(memory))
        axes.invert_yaxis()
        axes.set_xlabel("MiB; the thin bar is the model before merging")
        return _svg(figure, "memory", label)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(axis="x" if height < 1 else "both", linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, prefix: str, label: str) -> Html:
    """The figure as an svg element: names of its parts unique on the page, colours those of the page."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), text)  # not what is written
    text = _with_classes(re.sub(r"font-family: [^;\"]*;? ?", "", _without_idle_parts(text)), prefix)
    for name, colour in PLACEHOLDERS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"\s*\n\s*", "\n", text)
    opening = rf'<svg viewBox="\1" role="img" aria-label="{as_html(label)}">'
    return Html(re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', opening, text, count=1).strip())


def _without_idle_parts(text: str) -> str:
    """The same without what is not seen: panels without a colour, groups of one, line breaks within paths."""
    text = re.sub(r"\s*\n\s*", "\n", text)
    text = re.sub(r"\n([LMCz])", r"\1", text)
    text = re.sub(r'<path [^>]*style="fill: none; opacity: 0"/>\n', "", text)
    while True:
        shorter = re.sub(r"<g>\n((?:<(?:path|use|text)\b[^>]*/>|<text\b[^>]*>[^<]*</text>)?)\n?</g>", r"\1", text)
        if shorter == text:
            return text
        text = shorter


def _with_classes(text: str, prefix: str) -> str:
    """The same with classes in place of styles that occur often; matplotlib repeats them at every mark and tick."""
    counts = Counter(re.findall(r'style="([^"]+)"', text))
    often = {style: f"{prefix}-{i}" for i, (style, count) in enumerate(counts.most_common()) if count > 2}
    text = re.sub(r'style="([^"]+)"', lambda m: f'class="{often[m[1]]}"' if m[1] in often else m[0], text)
    rules = "".join(f".{name}{{{style}}}" for style, name in often.items())
    end = text.index(">", text.index("<svg")) + 1
    return f"{text[:end]}<style>{rules}</style>{text[end:]}"
