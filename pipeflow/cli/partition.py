"""`pipeflow partition`: cuts costs from anywhere into stages, and says how good the cut is at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import click

from pipeflow.cli.console import infeasible_document, print_json, show
from pipeflow.cli.options import json_option, parse_amount, parse_amounts, parse_counts, parse_levels
from pipeflow.cli.pins import pin_options
from pipeflow.errors import Infeasible
from pipeflow.graphs.formats import FORMATS
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.problem import Transfers
from pipeflow.report.table import Table

if TYPE_CHECKING:
    from pipeflow.partitioners.pins import Pins
    from pipeflow.partitioning import PartitionReport


@click.command()
@click.argument("profile", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--format", "form", type=click.Choice(list(FORMATS)), default="pipeflow", show_default=True, help="Of the file."
)
@click.option(
    "--devices",
    type=parse_levels,
    metavar="N[xN...]",
    help="How many alike devices; by default as the file says. 4x2 is 2 machines of 4 devices.",
)
@click.option("--cluster", type=click.Path(exists=True, dir_okay=False), help="A cluster file, instead.")
@click.option(
    "--memory",
    type=parse_amount,
    metavar="BYTES",
    help="Of each device, for example 16GiB; by default the file's limit.",
)
@click.option(
    "--bandwidth",
    type=parse_amounts,
    metavar="BYTES[,BYTES...]",
    help="Of every link, per second, for example 10GB, or of the links of each level; by default the file's.",
)
@click.option("--microbatches", type=click.IntRange(min=1), help="Into how many a batch is cut.")
@click.option("--stages", type=click.IntRange(min=1), help="Exactly so many stages.")
@click.option("--max-stages", type=click.IntRange(min=1), help="At most so many stages.")
@click.option(
    "--replicas", type=parse_counts, metavar="N,N,...", help="Replicas of each stage in turn, for example 2,1."
)
@click.option("--max-replicas", type=click.IntRange(min=1), help="At most so many of any stage; 1 forbids them.")
@click.option(
    "--chunks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many stages a device may hold (virtual stages, as interleaved schedules place them); what that gains "
    "over contiguous stages is told.",
)
@click.option("--partitioner", default="auto", show_default=True, help=f"One of {', '.join(PARTITIONERS)}.")
@click.option(
    "--transfers",
    type=click.Choice(get_args(Transfers)),
    help="How they count beside compute: added to it, overlapped with it, relayed from stage to stage beside it, or "
    "free; by default as the format's own planner counts them.",
)
@pin_options
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    profile: str,
    form: str,
    devices: tuple[int, ...] | None,
    cluster: str | None,
    memory: int | None,
    bandwidth: tuple[int, ...] | None,
    microbatches: int | None,
    stages: int | None,
    max_stages: int | None,
    replicas: tuple[int, ...] | None,
    max_replicas: int | None,
    chunks: int,
    partitioner: str,
    transfers: Transfers | None,
    as_json: bool,
    pins: Pins | None,
) -> None:
    """Cut the graph in PROFILE into stages, without a schedule and without torch.

    Seconds are in the unit of the file. Exit code 1 means that no partition satisfies the limits.
    """
    from pipeflow.partitioners.cluster import Cluster
    from pipeflow.partitioning import partition

    try:
        found = partition(
            profile,
            format=form,
            num_devices=devices,
            cluster=None if cluster is None else Cluster.from_file(cluster),
            memory_bytes=memory,
            bandwidth=bandwidth[0] if bandwidth is not None and len(bandwidth) == 1 else bandwidth,
            num_microbatches=microbatches,
            num_stages=stages,
            max_stages=max_stages,
            replicas=replicas,
            max_replicas=max_replicas,
            chunks=chunks,
            partitioner=partitioner,
            transfers=transfers,
            pins=pins,
        )
    except Infeasible as error:
        if not as_json:
            raise
        print_json(infeasible_document(error))
        context.exit(1)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show(_table(found))


def _table(found: PartitionReport) -> Table:
    return Table(
        title=(
            f"{found.partitioner}: bottleneck {found.objective:.6g} per micro-batch, lower bound "
            f"{found.lower_bound:.6g}, gap {found.gap:.1%}, found in {found.seconds:.3g} s"
        ),
        headings=(">stage", "devices", ">replicas", ">layers", "from", "to"),
        rows=tuple(
            (str(index), _devices(devices), str(count), str(len(layers)), layers[0], layers[-1])
            for index, (layers, count, devices) in enumerate(
                zip(found.stages, found.replicas, found.devices, strict=True)
            )
        ),
        notes=(_gain(found),) if found.chunks > 1 else (),
    )


def _devices(devices: tuple[int, ...]) -> str:
    first, last = devices[0], devices[-1]
    runs = devices == tuple(range(first, last + 1))
    return f"{first}..{last}" if runs and len(devices) > 2 else ", ".join(map(str, devices))


def _gain(found: PartitionReport) -> str:
    """What several chunks on a device gain, in a sentence."""
    most = f"up to {found.chunks} stages on a device"
    if found.contiguous_objective is None or found.gain_over_contiguous is None:
        return f"{most}: {found.objective:.6g}; contiguous stages do not fit"
    return (
        f"{most}: {found.objective:.6g}, against {found.contiguous_objective:.6g} with contiguous stages, a gain of "
        f"{found.gain_over_contiguous:.1%}"
    )
