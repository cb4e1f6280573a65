"""The laws that every partitioner keeps, as one check of one problem: for users' own algorithms.

Draw problems with `problems()` and hand each to `check_partitioner`; the oracle looks at every
partition, so keep the drawn graphs to about seven layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners.normalise import memory_binds
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.rules import held_to
from pipeflow.partitioners.stage_ways import ways_of
from pipeflow.testing.oracle import optimum
from pipeflow.testing.partitions import check_partition
from pipeflow.testing.restated import copied, picture, renamed, scaled, with_one_more_device

_ROUNDING = 1e-9


def check_partitioner(
    partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem, *, exact: bool = False
) -> None:
    """Checks that the partitioner keeps its promises on the problem.

    Of every partitioner:
        valid      the partition keeps all rules of the problem (see `check_partition`), and recomputes nothing;
        certified  no better than the optimum, and the lower bound is none that a partition beats, nor 0 where
                   layers take time;
        pure       the same again from an equal problem, and the problem is as it was;
        blind      the same under other names, and twice as dear when everything is;
        monotone   with one more device, no bound above what fewer devices reach.

    `Infeasible` counts as an answer, except where it depends on names or scale, where the rules that it names
    leave a partition, or where no rule stands in the way of one. A partitioner may refuse what it cannot
    express with any other `PlanError`, which is passed on: draw problems that it takes.

    Args:
        exact: whether the partitioner claims to be. Then also: it finds a partition wherever there is one, the
            best one, and one more device never hurts.

    Raises:
        AssertionError: says which promise is broken.
    """
    before = picture(problem)
    found = _attempt(partitioner, problem)
    _require(picture(problem) == before, "not pure: the problem is not what it was; leave what one is given as it is")
    if isinstance(found, Infeasible):
        _check_refusal(found, problem, exact)
    else:
        _check_certificate(found, problem, exact)
    _check_again(partitioner, problem, found)
    _check_scale(partitioner, problem, found)
    if isinstance(found, Partition):
        _check_one_more_device(partitioner, problem, found, exact)


def _attempt(partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem) -> Partition | Infeasible:
    try:
        found = partitioner(problem)
    except Infeasible as error:
        return error
    _require(isinstance(found, Partition), f"not a partition: {type(found).__name__}; return a pf.Partition")
    return found


def _check_refusal(error: Infeasible, problem: PartitionProblem, exact: bool) -> None:
    _require(any(error.reasons), "Infeasible without a reason; say which layer or device lacks what")
    if error.rules:
        left = optimum(held_to(problem, error.rules))
        told = " and ".join(rule.text for rule in error.rules)
        _require(left is None, f"wrongly Infeasible: {told} are said to leave no partition, but one takes {left} s")
    said = f"wrongly Infeasible ({error})"
    _require(not _fits_one_device(problem), f"{said}: no rule stands in the way of all layers on one device")
    if exact:
        least = optimum(problem)
        _require(least is None, f"{said}: a partition takes {least} s, and an exact partitioner finds it")


def _fits_one_device(problem: PartitionProblem) -> bool:
    """Whether, as far as one sees at a glance, any way to cut the problem will do."""
    if problem.pins or problem.stage_count is not None:
        return False
    if problem.costs.has_variants or problem.unordered or problem.chunks > 1:
        is_limited = any(device.memory_bytes is not None for device in problem.cluster.devices)
        return not is_limited and all(any(w.degree == 1 for w in ways_of(problem, c)) for c in problem.costs.layers)
    return not memory_binds(problem)


def _check_certificate(found: Partition, problem: PartitionProblem, exact: bool) -> None:
    check_partition(found, problem)
    again = [name for stage in found.stages for name in stage.recompute]
    _require(not again, f"layers {again} are recomputed; a problem does not leave that open, return no recompute")
    objective, bound = found.certificate.objective, found.certificate.lower_bound
    least = optimum(problem)
    if least is None:
        raise AssertionError("the oracle finds no partition of the problem; please report it with the problem")
    _require(
        objective >= least * (1 - _ROUNDING),
        f"better than the optimum: {objective} s, but no partition takes less than {least} s",
    )
    _require(
        bound <= least * (1 + _ROUNDING),
        f"not a bound: {bound} s is said to be the least, but {least} s is possible",
    )
    work = math.fsum(min(way.seconds for way in ways_of(problem, layer)) for layer in problem.costs.layers)
    _require(
        bound > 0 or work == 0,
        f"the bound of 0 s says nothing, and layers take {work} s; pipeflow.partitioners.bounds.lower_bound gives one",
    )
    _require(
        not exact or objective <= least * (1 + _ROUNDING),
        f"not exact: {objective} s, but a partition takes {least} s",
    )


def _check_again(
    partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem, found: Partition | Infeasible
) -> None:
    again = _attempt(partitioner, copied(problem))
    _require(
        again == found if isinstance(found, Partition) else isinstance(again, Infeasible),
        "not deterministic: the same problem, another partition",
    )
    changed = renamed(problem)
    other = _attempt_restated(partitioner, changed, "names matter: renamed layers are refused")
    _require(
        _shape(other, changed) == _shape(found, problem),
        "names matter: renamed layers are cut otherwise; break ties by position, and iterate over no set of names",
    )


def _check_scale(
    partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem, found: Partition | Infeasible
) -> None:
    twice = _attempt_restated(partitioner, scaled(problem, 2), "scale matters: twice the seconds are refused")
    if isinstance(found, Infeasible) or isinstance(twice, Infeasible):
        _require(type(twice) is type(found), "scale matters: feasible only when seconds are, or are not, doubled")
        return
    before, after = found.certificate.objective, twice.certificate.objective
    _require(abs(after - 2 * before) <= _ROUNDING * after, f"all seconds doubled, but {before} s became {after} s")


def _check_one_more_device(
    partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem, found: Partition, exact: bool
) -> None:
    larger = with_one_more_device(problem)
    try:
        more = _attempt(partitioner, larger)
    except PlanError:  # more devices than it takes
        return
    before = found.certificate.objective
    if isinstance(more, Infeasible):
        _require(not exact, f"one more device hurts: {before} s before, and then Infeasible ({more})")
        return
    check_partition(more, larger)
    bound, after = more.certificate.lower_bound, more.certificate.objective
    _require(
        bound <= before * (1 + _ROUNDING),
        f"not a bound: {bound} s is said to be the least with one more device, but {before} s is possible without it",
    )
    _require(
        not exact or after <= before * (1 + _ROUNDING),
        f"one more device hurts: {before} s before, and {after} s then",
    )


def _attempt_restated(
    partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem, story: str
) -> Partition | Infeasible:
    try:
        return _attempt(partitioner, problem)
    except PlanError as error:
        raise AssertionError(f"{story} ({error})") from error


def _shape(found: Partition | Infeasible, problem: PartitionProblem) -> object:
    """A partition without the names of its layers."""
    if isinstance(found, Infeasible):
        return None
    position = problem.costs.position_by_layer
    stages = [([position[name] for name in s.layers], s.devices, s.variants) for s in found.stages]
    return stages, found.certificate


def _require(holds: bool, story: str) -> None:
    if not holds:
        raise AssertionError(story)
