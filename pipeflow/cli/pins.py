"""The options that fix layers, and how they are written: one value, `pins`, for the commands that cut.

Knows how pins are written on a command line; what they mean is `pipeflow.partitioners.pins`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pipeflow.partitioners.pins import Pins

_NAMES = ("pin", "together", "apart", "no_cut", "max_layers")

_OPTIONS = (
    click.option("--pin", multiple=True, metavar="LAYER=stage:N|device:N", help="A place; stage:-1 is the last."),
    click.option("--together", multiple=True, metavar="LAYER,LAYER,...", help="Layers that share a stage."),
    click.option("--apart", multiple=True, metavar="LAYER,LAYER,...", help="Layers of which no two share a stage."),
    click.option("--no-cut", multiple=True, metavar="LAYER,LAYER", help="An edge that stays within a stage."),
    click.option("--max-layers", type=click.IntRange(min=1), help="At most so many layers on a stage."),
)


def pin_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which is given their value as `pins`; None where there is none."""

    @wraps(function)
    def with_pins(*args: Any, **options: Any) -> Any:
        return function(*args, pins=parse_pins(**{name: options.pop(name) for name in _NAMES}), **options)

    for option in reversed(_OPTIONS):
        with_pins = option(with_pins)
    return with_pins


def parse_pins(
    *,
    pin: tuple[str, ...],
    together: tuple[str, ...],
    apart: tuple[str, ...],
    no_cut: tuple[str, ...],
    max_layers: int | None,
) -> Pins | None:
    """The pins that the options say.

    Raises:
        click.BadParameter: a text that is not in the form of its option.
        PlanError: pins that contradict themselves.
    """
    if not (pin or together or apart or no_cut or max_layers):
        return None
    from pipeflow.partitioners.pins import Pin, Pins

    places = []
    for text in pin:
        match = re.fullmatch(r"(.+)=(stage|device):(-?[0-9]+)", text)
        if match is None or (match[2] == "device" and match[3].startswith("-")):
            raise click.BadParameter(f"{text!r} is no pin; write for example head=stage:-1 or head=device:0")
        places.append(Pin.model_validate({"layer": match[1], match[2]: int(match[3])}))
    edges = [tuple(text.split(",")) for text in no_cut]
    if wrong := [text for text, edge in zip(no_cut, edges, strict=True) if len(edge) != 2]:
        raise click.BadParameter(f"{wrong[0]!r} is no edge; write its two layers, for example stem,body")
    return Pins(
        on=tuple(places),
        together=tuple(tuple(text.split(",")) for text in together),
        apart=tuple(tuple(text.split(",")) for text in apart),
        no_cut=tuple((a, b) for a, b in edges),
        max_layers=max_layers,
    )
