"""Examples: the table, what Infeasible says, single partitioners, this machine's devices."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from pipeflow.errors import ClusterError, Infeasible, PlanError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster, Level
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.partitions import check_partition

MIB = 2**20


def line(*seconds: float, parameter_bytes: int = 0, saved_bytes: int = 0, out: int = 0) -> GraphCosts:
    names = [chr(ord("a") + i) for i in range(len(seconds))]
    return GraphCosts(
        inputs=(TensorCosts(name="x"),),
        layers=tuple(
            LayerCosts(
                name=name,
                inputs=(before,),
                outputs=(TensorCosts(name=name, bytes=out),),
                forward_seconds=s,
                parameter_bytes=parameter_bytes,
                saved_bytes=saved_bytes,
            )
            for name, before, s in zip(names, ["x", *names], seconds, strict=False)
        ),
    )


def shape(partition: Partition) -> list[str]:
    return [f"{''.join(s.layers)}x{s.num_replicas}" for s in partition.stages]


def test_table_is_read_only_and_loads_nothing_heavy() -> None:
    script = (
        "import sys, pipeflow.partitioners as p; list(p.PARTITIONERS); "
        "assert not {'torch', 'numpy', 'networkx', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(TypeError):
        PARTITIONERS["mine"] = PARTITIONERS["chain"]  # type: ignore[index]  # that it fails is the test
    with pytest.raises(KeyError):
        PARTITIONERS["mine"]
    assert all(PARTITIONERS.summary(name) for name in PARTITIONERS)


def test_partitioners_never_load_torch() -> None:
    script = (
        "import sys; from pipeflow.partitioners import PARTITIONERS; "
        "[PARTITIONERS[n] for n in PARTITIONERS]; from pipeflow.partitioners.cluster import Cluster; "
        "Cluster.local(kind='cpu'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_chain_replicates_where_it_pays() -> None:
    problem = PartitionProblem(costs=line(1, 1, 6), cluster=Cluster.uniform(4), num_microbatches=12)
    assert PARTITIONERS["chain"](problem).certificate.objective == 2.0
    one = PartitionProblem(costs=line(1, 1, 6), cluster=Cluster.uniform(4), num_microbatches=12, max_replicas=1)
    # ties go to fewer devices
    assert shape(PARTITIONERS["chain"](one)) == ["abx1", "cx1"]
    assert shape(PARTITIONERS["uniform"](one)) == ["ax1", "bx1", "cx1"]


def test_chain_keeps_the_devices_in_order() -> None:
    problem = PartitionProblem(costs=line(1, 1, 6), cluster=Cluster.uniform(4), num_microbatches=12, replicas=(1, 3))
    assert [s.devices for s in PARTITIONERS["chain"](problem).stages] == [(0,), (1, 2, 3)]


def test_chain_gives_the_slow_device_less() -> None:
    slow = Cluster.uniform(1).devices[0].model_copy(update={"name": "slow", "speed": 0.25})
    cluster = Cluster(devices=(*Cluster.uniform(1).devices, slow), levels=(Level(size=2),))
    problem = PartitionProblem(costs=line(1, 1, 1, 1, 1), cluster=cluster, max_replicas=1)
    assert shape(PARTITIONERS["chain"](problem)) == ["abcdx1", "ex1"]


def test_early_stages_hold_more() -> None:
    """Even work would give two layers each, but the first stage keeps two micro-batches."""
    cluster = Cluster.uniform(2, memory_bytes=3 * MIB)
    costs = line(1, 1, 1, 1, saved_bytes=MIB)
    problem = PartitionProblem(costs=costs, cluster=cluster, num_microbatches=8, max_replicas=1)
    partition = PARTITIONERS["chain"](problem)
    assert shape(partition) == ["ax1", "bcdx1"]
    check_partition(partition, problem)


def reasons(name: str, problem: PartitionProblem) -> str:
    with pytest.raises(Infeasible) as caught:
        PARTITIONERS[name](problem)
    return "\n".join(caught.value.reasons)


@pytest.mark.parametrize("name", sorted(set(PARTITIONERS) - {"beam", "cpsat", "ideals", "milp", "nested", "variants"}))
def test_infeasible_says_what_and_how_much(name: str) -> None:
    costs = line(1, 2, 3, parameter_bytes=MIB, saved_bytes=MIB)

    def problem(num_devices: int = 2, memory: int | None = None, **more: object) -> PartitionProblem:
        cluster = Cluster.uniform(num_devices, memory_bytes=memory)
        return PartitionProblem(costs=costs, cluster=cluster, num_microbatches=4, **more)  # type: ignore[arg-type]

    assert "4 stages are asked for, but the graph has only 3 layers" in reasons(name, problem(8, num_stages=4))
    assert "3 stages, but the cluster has 2 devices" in reasons(name, problem(2, num_stages=3))
    assert "replicas (2, 1) need 3 devices, but the cluster has 2 devices" in reasons(name, problem(2, replicas=(2, 1)))
    layer_alone = reasons(name, problem(2, 4 * MIB))
    assert "layer 'a' needs 5.0 MiB (1.0 MiB of parameters + 1.0 MiB of gradients" in layer_alone
    assert "lacks 1.0 MiB" in layer_alone
    together = reasons(name, problem(2, 5 * MIB))
    assert "have 10.0 MiB together and lack 2.0 MiB" in together
    # 2 + 1 layers: 8 + 2 * 2 in the first stage, or 4 + 2 and 8 + 2
    tight = reasons(name, problem(2, 9 * MIB, max_replicas=1))
    assert "lacks" in tight
    assert "of activations of" in tight


@pytest.mark.skipif(find_spec("ortools") is None, reason="needs OR-tools")
def test_a_model_that_the_solver_presolves_away_is_solved_without() -> None:
    """OR-tools 9.15 called this infeasible, beside a partition that it had been given."""
    layers = tuple(
        LayerCosts(name=f"l{i}", outputs=(TensorCosts(name=f"l{i}"),), forward_seconds=s / 1024)
        for i, s in enumerate((4, 2, 3))
    )
    problem = PartitionProblem(costs=GraphCosts(layers=layers), cluster=Cluster.uniform(2), max_replicas=1, chunks=2)
    assert PARTITIONERS["auto"](problem).certificate.objective == 5 / 1024


def test_exhaustive_refuses_what_it_cannot_finish() -> None:
    problem = PartitionProblem(costs=line(*[1.0] * 17), cluster=Cluster.uniform(2))
    with pytest.raises(PlanError, match="at most 16"):
        PARTITIONERS["exhaustive"](problem)


def test_local_cpu_cluster() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cluster = Cluster.local(kind="cpu")
    assert cluster.num_devices == cores
    assert [d.name for d in cluster.devices] == [f"cpu:{i}" for i in range(cores)]
    crowded = Cluster.local(4 * cores, kind="cpu")
    assert {d.speed for d in crowded.devices} == {0.25}
    memory = cluster.devices[0].memory_bytes
    assert memory is None or memory // 5 < (crowded.devices[0].memory_bytes or 0) <= memory // 4 + 1
    with pytest.raises(ClusterError, match="at least 1"):
        Cluster.local(0, kind="cpu")
