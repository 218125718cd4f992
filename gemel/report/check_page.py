"""What --check found, and a contact sheet: images of train after their transform, with labels and boxes."""

from collections.abc import Sequence

from gemel.merging.rehearsal import OK, PROBLEM, Rehearsal
from gemel.report.examples import label_box, picture
from gemel.report.html import Html, as_html, section, table
from gemel.report.style import page

CLASS = {OK: "good", PROBLEM: "bad"}


def check_page(found: Rehearsal, class_names: dict[str, Sequence[str]]) -> str:
    """The whole page. class_names: by task and class id."""
    number = found.num_problems
    title = f"{number} problem{'s' * (number != 1)} found" if number else "Nothing stands in the way of merging"
    rows = [
        (finding.task or "all", Html(f'<span class="{CLASS.get(finding.verdict, "muted")}">{finding.verdict}</span>'),
         finding.text)
        for finding in found.findings
    ]  # fmt: skip
    sheets = [_sheet(task, shown, class_names.get(task, ())) for task, shown in found.sheet.items()]
    findings = section("Checks", table(("task", "verdict", "what was found"), rows, "What was tried with each task"))
    intro = Html("<p>After the train transform, as the models get them; brightness stretched.</p>")
    return page(title, (Html(f"<h1>{as_html(title)}</h1>"), findings, section("Contact sheet", intro, *sheets)))


def _sheet(task: str, shown: Sequence[dict], names: Sequence[str]) -> Html:
    cards = []
    for example in shown:
        boxes = "".join(label_box(box, names, example) for box in example["boxes"])
        label = example.get("label")
        called = names[label] if label is not None and 0 <= label < len(names) else label
        text = f"{len(example['boxes'])} boxes" if label is None else f"label: {called}"
        cards.append(f'<div class="card">{picture(example, text, boxes)}<p>{as_html(text)}</p></div>')
    return Html(f'<h3>{as_html(task)}</h3><div class="cards">{"".join(cards)}</div>')
