"""What an engine may be asked to run: programs are bound once for each."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pipeflow.runtime.decoding import DecodeSession

Work = Literal["step", "measured", "accumulate", "infer"]
"""A "measured" step has its bytes counted, and is slower for it."""


class Job(NamedTuple):
    """What is run.

    Attributes:
        phase: of the graph; None for all of it.
        outputs: the tensors to keep of a prediction; None for no prediction.
        session: of decoding, with states of its own.
    """

    work: Work
    phase: str | None = None
    outputs: tuple[str, ...] | None = None
    session: DecodeSession | None = None
