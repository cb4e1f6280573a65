"""A plan as a drawing of its graph: SVG, a column for each stage, layers as boxes as wide as they cost.

Within a stage, rows are the topological generations of its layers, wrapped into several columns
where there are many. Edges inside a stage run down, edges between stages to the right, as thick as
the bytes that they carry. All text is escaped: names of layers can be anything.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import networkx as nx

from pipeflow.execution_plan import Plan
from pipeflow.partitioners.explain import bottleneck_of
from pipeflow.partitioners.objective import StageTerms, stage_terms
from pipeflow.plan_problem import problem_of_plan
from pipeflow.units import format_bytes, format_seconds

_MOST_ROWS = 40
"""Generations in one column; a stage with more takes several."""

_NARROW, _WIDE, _HIGH = 84.0, 230.0, 24.0
_ROW, _GAP, _STAGE_GAP, _MARGIN, _HEAD = 42.0, 14.0, 110.0, 24.0, 64.0
_LETTER = 6.4
"""Width of a letter of the boxes' font, at most, on average."""


@dataclass(frozen=True, slots=True)
class _Box:
    """A layer's place; x and y of its upper left corner."""

    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def draw_plan(plan: Plan) -> str:
    """The drawing, as the text of an SVG file.

    A box is wider the more seconds its layer takes on a device of speed 1; pointing at it shows its
    whole name, seconds and bytes.
    """
    boxes, spans = _place(plan)
    right = max(end for _, end in spans) + _MARGIN
    bottom = max(box.y for box in boxes.values()) + _HIGH + _MARGIN
    terms = stage_terms(problem_of_plan(plan), plan.stages)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right:.0f}" height="{bottom:.0f}" '
        f'viewBox="0 0 {right:.0f} {bottom:.0f}" font-family="sans-serif" font-size="11">',
        f"<title>{_text(plan.costs.name)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *_stages(plan, terms, spans, bottom),
        *_edges(plan, boxes),
        *_layers(plan, boxes),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _place(plan: Plan) -> tuple[dict[str, _Box], list[tuple[float, float]]]:
    """The box of every layer, and where each stage begins and ends from left to right."""
    costs = plan.costs
    longest = max((layer.seconds for layer in costs.layers), default=0.0) or 1.0
    width = {c.name: _NARROW + (_WIDE - _NARROW) * c.seconds / longest for c in costs.layers}
    boxes: dict[str, _Box] = {}
    spans = []
    left = _MARGIN
    for stage in plan.stages:
        rows = [
            sorted(row, key=costs.position_by_layer.__getitem__)
            for row in nx.topological_generations(costs.graph.subgraph(stage.layers))
        ]
        start = left
        # As even as can be, so that the last column is no stub.
        per_column = math.ceil(len(rows) / math.ceil(len(rows) / _MOST_ROWS))
        for first in range(0, len(rows), per_column):
            column = rows[first : first + per_column]
            widest = max(sum(width[n] for n in row) + _GAP * (len(row) - 1) for row in column)
            for place, row in enumerate(column):
                x = left + (widest - sum(width[n] for n in row) - _GAP * (len(row) - 1)) / 2
                for name in row:
                    boxes[name] = _Box(x, _HEAD + _MARGIN + place * _ROW, width[name])
                    x += width[name] + _GAP
            left += widest + 2 * _GAP
        spans.append((start - _GAP, left - _GAP))
        left += _STAGE_GAP
    return boxes, spans


def _stages(
    plan: Plan, terms: Sequence[StageTerms], spans: Sequence[tuple[float, float]], bottom: float
) -> Iterator[str]:
    bottleneck = bottleneck_of(plan.stages, terms)
    for index, ((start, end), stage, term) in enumerate(zip(spans, plan.stages, terms, strict=True)):
        light, dark = _colours(index)
        heavy = ' stroke-width="2.5"' if index == bottleneck else ""
        yield (
            f'<rect x="{start:.1f}" y="8" width="{end - start:.1f}" height="{bottom - 16:.1f}" rx="8" fill="{light}" '
            f'fill-opacity="0.35" stroke="{dark}"{heavy}/>'
        )
        heads = (
            f"stage {index}" + (" (bottleneck)" if index == bottleneck else ""),
            f"device{'s' * (len(stage.devices) > 1)} {', '.join(map(str, stage.devices))}",
            f"{format_seconds(term.seconds)}, {format_bytes(term.total_bytes)}",
        )
        for line, text in enumerate(heads):
            weight = ' font-weight="bold"' if line == 0 else ""
            yield f'<text x="{start + 10:.1f}" y="{28 + 15 * line}" fill="{dark}"{weight}>{_text(text)}</text>'


def _edges(plan: Plan, boxes: dict[str, _Box]) -> Iterator[str]:
    costs, stage_of = plan.costs, plan.stage_by_layer
    tensors = {edge: costs.graph.edges[edge]["tensors"] for edge in costs.graph.edges}
    amounts = {edge: sum(costs.tensor_by_name[t].bytes for t in names) for edge, names in tensors.items()}
    most = max(amounts.values(), default=0) or 1
    for (a, b), amount in amounts.items():
        thick = 0.8 + 3.2 * amount / most
        crosses = stage_of[a] != stage_of[b]
        colour = _colours(stage_of[a])[1] if crosses else "#888888"
        told = f"{a} to {b}: {', '.join(tensors[a, b])}, {format_bytes(amount)}"
        yield (
            f'<path d="{_path(boxes[a], boxes[b], crosses)}" fill="none" stroke="{colour}" stroke-opacity="0.7" '
            f'stroke-width="{thick:.2f}"><title>{_text(told)}</title></path>'
        )


def _path(source: _Box, target: _Box, crosses: bool) -> str:
    """From the right side to the left side between columns, from below to above within one."""
    if crosses or target.y <= source.y:
        x, y, u, v = source.x + source.width, source.y + _HIGH / 2, target.x, target.y + _HIGH / 2
        bend = max(30.0, abs(u - x) / 2)
        return f"M{x:.1f} {y:.1f}C{x + bend:.1f} {y:.1f} {u - bend:.1f} {v:.1f} {u:.1f} {v:.1f}"
    x, y, u, v = source.middle, source.y + _HIGH, target.middle, target.y
    if v - y <= _ROW:
        return f"M{x:.1f} {y:.1f}L{u:.1f} {v:.1f}"
    # A skip goes round the boxes between, on the left.
    out = min(source.x, target.x) - min(34.0, 6 + (v - y) / 12)
    x, y, u, v = source.x, source.y + _HIGH / 2, target.x, target.y + _HIGH / 2
    return f"M{x:.1f} {y:.1f}C{out:.1f} {y:.1f} {out:.1f} {v:.1f} {u:.1f} {v:.1f}"


def _layers(plan: Plan, boxes: dict[str, _Box]) -> Iterator[str]:
    for layer in plan.costs.layers:
        box, (light, dark) = boxes[layer.name], _colours(plan.stage_by_layer[layer.name])
        told = (
            f"{layer.name}: {format_seconds(layer.seconds)}, {format_bytes(layer.parameter_bytes)} of parameters, "
            f"{format_bytes(sum(t.bytes for t in layer.outputs))} out"
        )
        yield (
            f'<g><title>{_text(told)}</title><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
            f'height="{_HIGH:.0f}" rx="4" fill="{light}" stroke="{dark}"/><text x="{box.middle:.1f}" '
            f'y="{box.y + 16:.1f}" text-anchor="middle">{_text(_short(layer.name, box.width))}</text></g>'
        )


def _colours(stage: int) -> tuple[str, str]:
    """A light and a dark colour; those of neighbouring stages differ widely."""
    hue = (stage * 0.618034 + 0.57) % 1
    return _hex(colorsys.hls_to_rgb(hue, 0.86, 0.7)), _hex(colorsys.hls_to_rgb(hue, 0.32, 0.55))


def _hex(colour: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _short(name: str, width: float) -> str:
    """The name if it fits, else its end, where names of layers differ."""
    most = int((width - 8) / _LETTER)
    return name if len(name) <= most else "…" + name[1 - most :]


def _text(text: str) -> str:
    """Text for XML: escaped, and without the characters that XML cannot hold."""
    return escape(re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text))
