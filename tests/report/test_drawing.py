"""The drawing of a plan: well formed whatever the names, a box for every layer, none upon another."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings

from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.report.drawing import draw_plan
from pipeflow.testing.drawn_plans import plans
from pipeflow.testing.hand import chain_costs, hand_plan

SVG = "{http://www.w3.org/2000/svg}"


def boxes(text: str) -> list[tuple[str, float, float, float, float]]:
    """(title, x, y, width, height) of each layer's box."""
    result = []
    for group in ElementTree.fromstring(text).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None
        assert rect is not None
        x, y, width, height = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
        result.append((title.text or "", x, y, width, height))
    return result


def overlap(a: tuple[str, float, float, float, float], b: tuple[str, float, float, float, float]) -> bool:
    return a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] < b[2] + b[4] and b[2] < a[2] + a[4]


def check(plan: Plan) -> None:
    text = draw_plan(plan)
    drawn, root = boxes(text), ElementTree.fromstring(text)
    assert len(drawn) == len(plan.costs.layers)
    assert not [(a, b) for a, b in itertools.combinations(drawn, 2) if overlap(a, b)]
    width, height = float(root.get("width", "nan")), float(root.get("height", "nan"))
    assert all(x >= 0 and x + w <= width and y >= 0 and y + h <= height for _, x, y, w, h in drawn)
    assert len(list(root.iter(f"{SVG}path"))) == plan.costs.graph.number_of_edges()
    assert text == draw_plan(plan)


@given(plans())
@settings(max_examples=40)
def test_any_plan_can_be_drawn(plan: Plan) -> None:
    check(plan)


@pytest.mark.parametrize("num_layers", [10, 300])
def test_chains_with_skips_of_any_length(num_layers: int) -> None:
    costs = chain_costs(num_layers, skips=((0, num_layers - 1), (1, 5)))
    plan = hand_plan(costs, ((0,), (1, 2), (3,)), 4)
    check(plan)
    root = ElementTree.fromstring(draw_plan(plan))
    # Readable at arm's length: wrapped, not a mile high.
    assert float(root.get("height", "nan")) <= 2000
    assert float(root.get("width", "nan")) <= 3500


def test_names_are_escaped() -> None:
    name = '</text><script>alert("&")</script>\x00\x1b'
    layers = (
        LayerCosts(name=name, inputs=("x",), outputs=(TensorCosts(name="]]>&"),), forward_seconds=1),
        LayerCosts(name="b", inputs=("]]>&",), outputs=(TensorCosts(name="b"),), forward_seconds=2),
    )
    costs = GraphCosts(name="<&>", inputs=(TensorCosts(name="x"),), layers=layers)
    text = draw_plan(hand_plan(costs, ((0,), (1,)), 2))
    assert "<script" not in text
    titles = [title for title, *_ in boxes(text)]
    assert titles[0].startswith('</text><script>alert("&")</script>??')


def test_width_tells_the_cost_and_colour_the_stage() -> None:
    names = ["cheap", "dear", "middling"]
    layers = tuple(
        LayerCosts(name=n, inputs=(i,), outputs=(TensorCosts(name=n),), forward_seconds=s)
        for n, i, s in zip(names, ["x", *names], [0.0, 4.0, 2.0], strict=False)
    )
    plan = hand_plan(GraphCosts(inputs=(TensorCosts(name="x"),), layers=layers), ((0,), (1,), (2,)), 2)
    text = draw_plan(plan)
    cheap, dear, middling = (width for *_, width, _ in boxes(text))
    assert middling - cheap == pytest.approx(dear - middling)
    fills = [g.find(f"{SVG}rect").get("fill") for g in ElementTree.fromstring(text).iter(f"{SVG}g")]  # type: ignore[union-attr]  # boxes found them
    assert len(set(fills)) == 3
    assert text.count("(bottleneck)") == 1
