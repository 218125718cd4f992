"""The plan as a page, and as JSON."""

from pathlib import Path

from gemel.environment.units import box_size, layer_name, mib, share
from gemel.merging.plan import Plan
from gemel.report.html import Html, as_html, number, section, table
from gemel.report.style import page
from gemel.results_store import files
from gemel.results_store.manifest import json_bytes
from gemel.sharing.groups import saved_bytes
from gemel.strategies.baselines import gemel_units
from gemel.workload import Problem

MOST_PAIRS, MOST_UNITS = 300, 100  # rows of a table


def writable_problems(*names: str | None) -> list[Problem]:
    """A problem for each file that is to be written, but has no folder."""
    problems = []
    for name, suffix in zip(names, (".json", ".html"), strict=False):
        if name is not None and not (Path(name).suffix == suffix and Path(name).absolute().parent.is_dir()):
            allowed = f"the name of a {suffix} file in a folder that exists"
            problems.append(Problem("options", suffix.replace(".", "--"), repr(name), allowed))
    return problems


def write_plan(planned: Plan, memory: int | None, json_file: str | None, html_file: str | None) -> None:
    """Writes the plan into the files that are named. memory: bytes of a box."""
    if json_file:
        files.write(Path(json_file), [json_bytes(planned.to_plain())])
    if html_file:
        files.write(Path(html_file), [plan_page(planned, memory).encode()])


def plan_page(planned: Plan, memory: int | None = None) -> str:
    """The whole page."""
    total, optimal = planned.total_bytes, planned.optimal_saved_bytes
    title = f"{len(planned.models)} models: {mib(total)}, at best {mib(total - optimal)}"
    lead = (
        "Sharing every identical layer would save ", number("optimal_saved_bytes", optimal, mib(optimal)), " of ",
        number("total_bytes", total, mib(total)), f" ({share(optimal, total)}). "
        "What of it can be kept within tolerance, a merge finds out.",
    )  # fmt: skip
    text = Html(f'<h1>{as_html(title)}</h1><p class="lead">{"".join(map(as_html, lead))}</p>')
    return page(title, (text, _models(planned), _boxes(planned, memory), _pairs(planned), _units(planned)))


def _models(planned: Plan) -> Html:
    rows = [
        (name, number(f"models.{name}", size, mib(size)), mib(planned.added[name]), share(planned.added[name], size))
        for name, size in planned.models.items()
    ]
    caption = "What each model takes, and what it adds at best to those above it"
    return section("Models", table(("model", "size", "adds at best", "of its size"), rows, caption))


def _boxes(planned: Plan, memory: int | None) -> Html:
    fits = {True: Html('<span class="good">yes</span>'), False: Html('<span class="bad">no</span>')}
    rows = [(box_size(box), fits[before], fits[after]) for box, before, after in planned.boxes(memory)]
    caption = "Whether the weights fit; images and activations need memory besides"
    return section("Boxes", table(("memory", "before merging", "at best after"), rows, caption))


def _pairs(planned: Plan) -> Html:
    closest = sorted(planned.pairs, key=lambda pair: -pair[2])[:MOST_PAIRS]
    rows = [
        (f"{a} and {b}", share(common, planned.models[a] + planned.models[b]), mib(common)) for a, b, common in closest
    ]
    title = (
        f"The closest {len(closest)} of {len(planned.pairs)} pairs" if len(closest) < len(planned.pairs) else "Pairs"
    )
    return section(title, table(("pair", "share of its bytes in common", "could save"), rows, "Pairs of models"))


def _units(planned: Plan) -> Html:
    rows = [
        (layer_name(unit[0].signature), len(unit), len(unit[0].tasks), mib(saved_bytes(unit)))
        for unit in gemel_units(planned.groups)[:MOST_UNITS]
    ]
    caption = "Identical layers of the same models, the largest saving first"
    return section("Heaviest groups", table(("layer", "groups", "models", "could save"), rows, caption))
