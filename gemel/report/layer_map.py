"""The map: which layers of which models are one. Own drawing: a row a model, layers by depth, width by bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemel.environment.units import layer_name, mib
from gemel.report.html import Html, as_html
from gemel.report.record import Layer

WIDTH, PITCH, BAR, LABEL = 1000, 38, 18, 13  # of a row, in units of the picture
LEAST_WIDTH = 0.7
HUE_STEP = 137.5  # degrees: neighbours in the list of groups differ most
MOST_HIGHLIGHTED = 300  # groups that light up together under the pointer


def layer_map(layers: Mapping[str, Sequence[Layer]], shared_layers: Sequence[Mapping[str, Any]], label: str) -> Html:
    """An svg element; under the pointer a layer says its name, and the layers that are one with it stand out."""
    longest = max((sum(layer.bytes for layer in found) for found in layers.values()), default=0) or 1
    rows = "".join(
        _row(task, found, i, WIDTH / longest, shared_layers) for i, (task, found) in enumerate(layers.items())
    )
    height = PITCH * len(layers)
    return Html(
        f'<svg class="map" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{as_html(label)}">{rows}</svg>'
    )


def map_css(num_groups: int) -> str:
    """Rules for a map with so many groups."""
    groups = range(min(num_groups, MOST_HIGHLIGHTED))
    hover = "".join(f".map:has(.g{i}:hover) rect:not(.g{i}){{opacity:.2}}" for i in groups)
    fills = "".join(f".map .g{i}{{fill:hsl({i * HUE_STEP % 360:.0f} 60% 52%)}}" for i in range(num_groups))
    return f".map rect{{fill:var(--private)}}{fills}.map .a{{stroke:var(--adapter);stroke-width:2}}{hover}"


def _row(
    task: str, layers: Sequence[Layer], index: int, scale: float, shared_layers: Sequence[Mapping[str, Any]]
) -> str:
    top, left, parts = index * PITCH, 0.0, []
    for layer in layers:
        width = max(layer.bytes * scale - 0.4, LEAST_WIDTH)
        classes = [*([f"g{layer.group}"] if layer.group is not None else []), *(["a"] if layer.adapter_bytes else [])]
        marked = f' class="{" ".join(classes)}"' if classes else ""
        place = f'x="{left:.1f}" y="{top + LABEL + 3}" width="{width:.1f}" height="{BAR}"'
        parts.append(f"<rect{marked} {place}><title>{as_html(_said(layer, shared_layers))}</title></rect>")
        left += layer.bytes * scale
    return f'<text x="0" y="{top + LABEL - 1}" font-size="{LABEL - 1}">{as_html(task)}</text>{"".join(parts)}'


def _said(layer: Layer, shared_layers: Sequence[Mapping[str, Any]]) -> str:
    if layer.group is None:
        return f"{layer.name}, {mib(layer.bytes)}, private"
    group = shared_layers[layer.group]
    beside = f", {mib(layer.adapter_bytes)} private beside it" if layer.adapter_bytes else ""
    what = layer_name(group["signature"])
    return (
        f"{layer.name}, {what}, {mib(layer.bytes)}, group {layer.group + 1}, {len(group['occurrences'])} tasks{beside}"
    )
