"""The map: which layers of which models are one. Own drawing: a row a model, layers by depth, width by bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemel.environment.units import mib
from gemel.report.html import Html, as_html
from gemel.report.record import Layer, read_record
from gemel.report.style import COLOURS

WIDTH, PITCH, BAR, LABEL = 1000, 44, 18, 13  # of a row, in units of the picture
TOP, LEAST_WIDTH = LABEL + 7, 0.7
THIN = 0.5  # private layers of less width are drawn as lines without a name of their own
HUE_STEP = 137.5  # degrees: neighbours in the list of groups differ most
MOST_HIGHLIGHTED = 300  # groups that light up together under the pointer


def layer_map(layers: Mapping[str, Sequence[Layer]], label: str) -> Html:
    """An svg element; under the pointer a layer says its name, and the layers that are one with it stand out."""
    longest = max((sum(layer.bytes for layer in found) for found in layers.values()), default=0) or 1
    rows = "".join(_row(task, found, i, WIDTH / longest) for i, (task, found) in enumerate(layers.items()))
    height = PITCH * len(layers)
    return Html(
        f'<svg class="map" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{as_html(label)}">{rows}</svg>'
    )


def map_of(results_path: str | Path) -> Html:
    """The map of a results folder by itself, for a notebook. Raises ResultsError if the folder holds no result."""
    record = read_record(results_path)
    light = "".join(f"--{name}:{colours[0]};" for name, colours in COLOURS.items())
    css = f".alone{{{light}}}{map_css(len(record.manifest['shared_layers']))}"
    drawn = layer_map(record.layers, "Layers of one colour are one set of weights; grey ones are private")
    return Html(f'<style>{css}</style><div class="alone">{drawn}</div>')


def map_css(num_groups: int) -> str:
    """Rules for a map with so many groups."""
    groups = range(min(num_groups, MOST_HIGHLIGHTED))
    hover = "".join(f".map:has(.g{i}:hover) rect:not(.g{i}){{opacity:.2}}" for i in groups)
    fills = "".join(f".map .g{i}{{fill:hsl({i * HUE_STEP % 360:.0f} 60% 52%)}}" for i in range(num_groups))
    place = (
        f".map rect{{fill:var(--private);y:{TOP}px;height:{BAR}px}}.map path{{stroke:var(--private);stroke-width:.7}}"
    )
    return f"{place}{fills}.map .a{{stroke:var(--adapter);stroke-width:2}}{hover}"


def _row(task: str, layers: Sequence[Layer], index: int, scale: float) -> str:
    left, drawn, thin = 0.0, [], []
    for layer in layers:
        width = layer.bytes * scale
        if width < THIN and layer.group is None:
            thin.append(f"M{left:.1f} {TOP}v{BAR}")
        else:
            drawn.append(_rect(layer, left, width))
        left += width
    said = f"{len(thin)} private layers of less than {mib(THIN / scale)}, most of them normalisation"
    thin_ones = f'<path d="{"".join(thin)}"><title>{said}</title></path>' if thin else ""
    name = f'<text y="{LABEL + 2}" font-size="{LABEL - 1}">{as_html(task)}</text>'
    return f'<g transform="translate(0 {index * PITCH})">{name}{thin_ones}{"".join(drawn)}</g>'


def _rect(layer: Layer, left: float, width: float) -> str:
    classes = [*([f"g{layer.group}"] if layer.group is not None else []), *(["a"] if layer.adapter_bytes else [])]
    marked = f' class="{" ".join(classes)}"' if classes else ""
    place = f'x="{left:.1f}" width="{max(width - 0.4, LEAST_WIDTH):.1f}"'
    return f"<rect{marked} {place}><title>{as_html(_said(layer))}</title></rect>"


def _said(layer: Layer) -> str:
    if layer.group is None:
        return f"{layer.name}, {mib(layer.bytes)}, private"
    beside = f", {mib(layer.adapter_bytes)} private beside it" if layer.adapter_bytes else ""
    return f"{layer.name}, {mib(layer.bytes)}, group {layer.group + 1}{beside}"
