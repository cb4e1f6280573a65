"""What a file of costs says, beside the costs themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.values import Bytes, Count, Value, told


class Profile(Value):
    """A graph with its costs, and the rules that its format attaches to them.

    Attributes:
        format: the name of the format.
        costs: the graph; layer names are the file's own ids or names.
        seconds_per_unit: the unit of time in which the file counts.
        num_devices: that the file is meant for.
        memory_bytes: of one device.
        unit_bytes: the bytes that one of the costs' bytes stands for: less than 1 where the file has
            fractions of them. `memory_bytes` and `bandwidth` count in it too.
        bandwidth: of the links, where the file gives it, or for which tensor bytes were made up
            from transfer times.
        times_transfers: whether the file gives times of transfers instead of bytes, so that no other
            bandwidth makes sense.
        unordered: layers that the order of stages does not bind (backward nodes of a training graph).
        unsupported: layers that the file's accelerators cannot run.
        memory: what a device has to hold: parameters with gradients, optimizer state and activations
            of "training"; the "sizes" in the file and nothing else; or the "stashes" of activations
            and weights of micro-batches in flight beyond a stage, as PipeDream's optimizer counts; or
            what each of the layers' "variants" says, activations that it receives included.
        transfers, reduction, reduce_every: how the format's own planner counts transfers and
            reductions, as in `pipeflow.partitioners.problem`.
        even_replicas: whether numbers of replicas have to divide the micro-batches.
        nested: whether it plans levels of links one inside the other.
        sends_once: whether a producer pays once for all stages that read its output.
        num_microbatches: of a batch, where the file fixes it.
        state_ratio: bytes of gradients and optimizer state for each byte of parameters.
    """

    format: str
    costs: GraphCosts
    seconds_per_unit: float = Field(default=1.0, gt=0)
    num_devices: Count | None = None
    memory_bytes: Bytes | None = None
    unit_bytes: float = Field(default=1.0, gt=0, le=1)
    bandwidth: float | None = Field(default=None, gt=0)
    times_transfers: bool = False
    unordered: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    memory: Literal["training", "sizes", "stashes", "variants"] = "training"
    transfers: Literal["added", "overlapped", "relayed", "free"] = "added"
    reduction: Literal["ring", "server"] = "ring"
    reduce_every: Literal["iteration", "microbatch"] = "iteration"
    nested: bool = False
    even_replicas: bool = False
    sends_once: bool = False
    num_microbatches: Count | None = None
    state_ratio: float = Field(default=3.0, ge=0)


@contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a reader trips over in a file into a `FormatError` with the file's name.

    Args:
        path: of the file.
        what: it should have been, for example "a Piper workload".
    """
    try:
        yield
    except FormatError as error:
        raise error if str(path) in str(error) else FormatError(f"{path} is not {what}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        story = told(error) if isinstance(error, ValidationError) else str(error)
        raise FormatError(f"{path} is not {what}: {story}") from error
