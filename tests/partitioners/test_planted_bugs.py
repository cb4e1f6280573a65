"""`check_partitioner` finds what is wrong with a partitioner: each bug is planted, and the law that it breaks named."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipeflow.errors import Infeasible, Rule
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.chain import chain
from pipeflow.partitioners.exhaustive import exhaustive
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Certificate, Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.variants import variants
from pipeflow.testing.drawn_problems import clusters, costs, problems
from pipeflow.testing.partitioners import check_partitioner
from tests.partitioners.test_rare_rules import for_variants

GRAPHS = costs(min_layers=2, max_layers=5)
CLUSTERS = clusters(max_devices=3)

ROOMY = problems(graphs=GRAPHS, cluster=clusters(max_devices=3, limited=False), constrained=False)

Partitioner = Callable[[PartitionProblem], Partition]


def found_by_laws(
    partitioner: Partitioner,
    drawn: st.SearchStrategy[PartitionProblem] | None = None,
    *,
    exact: bool = False,
    max_examples: int = 150,
) -> str:
    """What the laws say of the partitioner on drawn problems."""

    @given(problem=problems(graphs=GRAPHS, cluster=CLUSTERS) if drawn is None else drawn)
    @settings(max_examples=max_examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def law(problem: PartitionProblem) -> None:
        check_partitioner(partitioner, problem, exact=exact)

    with pytest.raises(AssertionError) as caught:
        law()
    return str(caught.value)


def unchecked(stages: tuple[Stage, ...], seconds: float, bound: float) -> Partition:
    """A partition as a careless author makes it, with nothing looked at."""
    certificate = Certificate.model_construct(partitioner="planted", objective=seconds, lower_bound=bound)
    return Partition.model_construct(stages=stages, certificate=certificate)


def priced(problem: PartitionProblem, stages: tuple[Stage, ...]) -> Partition:
    """With its objective, and a bound about which there is nothing to say."""
    seconds = objective(problem, stages)
    return unchecked(stages, seconds, min(seconds, 1e-9))


def certified_as(change: Callable[[Certificate], dict[str, float]]) -> Partitioner:
    def planted(problem: PartitionProblem) -> Partition:
        found = exhaustive(problem)
        values = {"seconds": found.certificate.objective, "bound": found.certificate.lower_bound}
        return unchecked(found.stages, **{**values, **change(found.certificate)})

    return planted


@pytest.mark.parametrize("name", ["exhaustive", "chain"])
def test_what_keeps_its_promises_passes(name: str) -> None:
    @given(problem=problems(graphs=GRAPHS, cluster=CLUSTERS, together=True, unordered=True, tight=True))
    @settings(max_examples=60, deadline=None)
    def law(problem: PartitionProblem) -> None:
        if name == "exhaustive":
            check_partitioner(exhaustive, problem, exact=True)
        else:
            check_partitioner(chain, problem)

    law()


@pytest.mark.parametrize(
    ("change", "story"),
    [
        (lambda c: {"bound": 0.0}, "the bound of 0 s says nothing"),
        (lambda c: {"bound": -1.0}, "it must be 0 s or more"),
        (lambda c: {"bound": float("nan")}, "it must be 0 s or more"),
        (lambda c: {"bound": c.objective * 1.01 + 1e-6}, "above the objective"),
        (lambda c: {"seconds": c.objective * 0.99 + 1e-6}, "but the objective is"),
        (lambda c: {"seconds": float("nan")}, "but the objective is"),
    ],
)
def test_certificates_that_lie(change: Callable[[Certificate], dict[str, float]], story: str) -> None:
    assert story in found_by_laws(certified_as(change))


def test_a_bound_that_some_partition_beats() -> None:
    """The objective as its own bound: right where the cut is the best, and a lie elsewhere."""

    def sure(problem: PartitionProblem) -> Partition:
        found = chain(problem)
        return unchecked(found.stages, found.certificate.objective, found.certificate.objective)

    assert "not a bound" in found_by_laws(sure)


def test_infeasible_whatever_is_asked() -> None:
    def never(problem: PartitionProblem) -> Partition:
        raise Infeasible(["there is none"])

    def silent(problem: PartitionProblem) -> Partition:
        raise Infeasible([])

    assert "no rule stands in the way" in found_by_laws(never)
    assert "without a reason" in found_by_laws(silent)


def test_infeasible_where_the_rules_that_it_names_leave_a_partition() -> None:
    def blames_memory(problem: PartitionProblem) -> Partition:
        if problem.cluster.devices[0].memory_bytes is None:
            return exhaustive(problem)
        raise Infeasible(["memory"], [Rule("memory", 0, "device 0 is small", devices=(0,))])

    tight = problems(graphs=GRAPHS, cluster=CLUSTERS, tight=True)
    assert "are said to leave no partition, but one takes" in found_by_laws(blames_memory, tight)


def test_exact_that_misses_partitions_or_the_best_one() -> None:
    tight = problems(graphs=GRAPHS, cluster=CLUSTERS, tight=True, constrained=False)
    assert "wrongly Infeasible" in found_by_laws(gives_up_where_one_device_does_not_do, tight, exact=True)
    loose = problems(graphs=GRAPHS, cluster=clusters(max_devices=3, limited=False), constrained=False)
    assert "not exact" in found_by_laws(chain, loose, exact=True)


def gives_up_where_one_device_does_not_do(problem: PartitionProblem) -> Partition:
    single = replace(problem, max_stages=1, max_replicas=1)
    exhaustive(single)
    return exhaustive(problem)


def test_one_more_device_that_raises_the_bound() -> None:
    """Right for one and two devices, where the oracle looks; a third is thought to cost more."""

    def dearer(problem: PartitionProblem) -> Partition:
        found = exhaustive(problem)
        if problem.cluster.num_devices < 3:
            return found
        seconds = sum(layer.seconds for layer in problem.costs.layers)
        one = Stage.replicated([layer.name for layer in problem.costs.layers], [0])
        return unchecked((one,), objective(problem, (one,)), seconds * 0.99)

    small = problems(graphs=GRAPHS, cluster=clusters(min_devices=2, max_devices=2, limited=False), constrained=False)
    assert "is said to be the least with one more device" in found_by_laws(dearer, small)


def test_one_more_device_hurts_what_is_exact() -> None:
    """What it does not see on three devices, it would have found on two."""

    def confused(problem: PartitionProblem) -> Partition:
        if problem.cluster.num_devices < 3:
            return exhaustive(problem)
        found = exhaustive(replace(problem, max_stages=1, max_replicas=1))
        return unchecked(found.stages, objective(problem, found.stages), lower_bound(problem))

    small = problems(graphs=GRAPHS, cluster=clusters(min_devices=2, max_devices=2, limited=False), constrained=False)
    assert "one more device hurts" in found_by_laws(confused, small, exact=True)


def test_what_is_no_partition() -> None:
    assert "not a partition: NoneType" in found_by_laws(lambda problem: None)  # type: ignore[arg-type, return-value]


def with_device(found: Partition, problem: PartitionProblem, device: int) -> Partition:
    one = Stage.replicated([layer.name for layer in problem.costs.layers], [device])
    return unchecked((one,), objective(problem, (one,)), lower_bound(problem))


LIKE = problems(
    graphs=GRAPHS, cluster=clusters(min_devices=2, max_devices=3, limited=False), constrained=False, pinned=False
)


def test_another_partition_each_time() -> None:
    turn = itertools.count()
    assert "not deterministic" in found_by_laws(lambda p: with_device(exhaustive(p), p, next(turn) % 2), LIKE)
    draw = random.Random(3)
    assert "not deterministic" in found_by_laws(lambda p: with_device(exhaustive(p), p, draw.randrange(2)), LIKE)


def test_the_problem_as_an_object_decides() -> None:
    """The first copy that it sees is another problem to it: what it keeps between calls tells."""
    seen: list[GraphCosts] = []

    def planted(problem: PartitionProblem) -> Partition:
        known = any(problem.costs is costs for costs in seen)
        seen.append(problem.costs)
        return with_device(exhaustive(problem), problem, 0 if known or len(seen) % 2 else 1)

    assert "not deterministic" in found_by_laws(planted, LIKE)


def test_names_that_decide() -> None:
    def by_name(problem: PartitionProblem) -> Partition:
        names = [layer.name for layer in problem.costs.layers]
        return with_device(exhaustive(problem), problem, names.index(min(names)) % 2)

    def by_hash(problem: PartitionProblem) -> Partition:
        first = next(iter({layer.name for layer in problem.costs.layers}))  # another one for each PYTHONHASHSEED
        return with_device(exhaustive(problem), problem, problem.costs.position_by_layer[first] % 2)

    def by_device_name(problem: PartitionProblem) -> Partition:
        device = min(range(2), key=lambda d: problem.cluster.devices[d].name)
        return with_device(exhaustive(problem), problem, device)

    for planted in (by_name, by_hash, by_device_name):
        assert "names matter" in found_by_laws(planted, LIKE)


def test_seconds_that_decide() -> None:
    def threshold(problem: PartitionProblem) -> Partition:
        seconds = sum(layer.seconds for layer in problem.costs.layers)
        return chain(problem) if seconds > 0.03 else with_device(chain(problem), problem, 0)

    assert "all seconds doubled" in found_by_laws(threshold, LIKE, max_examples=400)


def test_a_problem_that_is_changed() -> None:
    def drops_a_name(problem: PartitionProblem) -> Partition:
        found = exhaustive(problem)
        problem.costs.position_by_layer.pop("l0", None)  # type: ignore[attr-defined]
        return found

    def adds_to_an_array(problem: PartitionProblem) -> Partition:
        found = exhaustive(problem)
        problem.atoms.parameter_bytes[0] += 1
        return found

    def loosens_a_rule(problem: PartitionProblem) -> Partition:
        object.__setattr__(problem, "max_replicas", 1)
        return exhaustive(problem)

    for planted in (drops_a_name, adds_to_an_array, loosens_a_rule):
        assert "the problem is not what it was" in found_by_laws(planted, ROOMY)


def test_a_bound_above_the_best_way_to_run_layers() -> None:
    """The oracle tries every variant, which `exhaustive` refuses to choose."""

    def only_slow_ways(problem: PartitionProblem) -> Partition:
        slow = {c.name: tuple(v for v in c.variants if v.degree == 1)[-1:] or c.variants for c in problem.costs.layers}
        layers = [c.model_copy(update={"variants": slow[c.name]}) for c in problem.costs.layers]
        found = variants(replace(problem, costs=problem.costs.model_copy(update={"layers": tuple(layers)})))
        return unchecked(found.stages, found.certificate.objective, found.certificate.lower_bound)

    ways = problems(graphs=GRAPHS, cluster=clusters(max_devices=2, is_uniform=True, limited=False), variants=True)
    assert "not a bound" in found_by_laws(only_slow_ways, ways.map(for_variants))
