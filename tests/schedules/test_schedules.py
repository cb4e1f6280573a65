from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.errors import PlanError
from pipeflow.partitioners.problem import Position
from pipeflow.program import Compute, Kind, Placement, rank_of
from pipeflow.schedules import SCHEDULES, ComputeOrder, Schedule, forward_order, resolve_schedule

THREE: Placement = ((0,), (1,), (2,))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Up to 6 stages of 1 to 3 replicas on up to 6 ranks, several stages on a rank included."""
    num_ranks = draw(st.integers(1, 6))
    return tuple(
        tuple(draw(st.permutations(range(num_ranks)))[: draw(st.integers(1, min(3, num_ranks)))])
        for _ in range(draw(st.integers(1, 6)))
    )


def drawing(name: str) -> list[list[str]]:
    """The timeline that the file of the schedule draws: a row per stage, a cell per tick."""
    order = forward_order if name == "forward" else SCHEDULES[name].order
    text = sys.modules[order.__module__].__doc__ or ""
    return [line.partition("|")[2].split() for line in text.splitlines() if "|" in line]


def play(order: ComputeOrder, placement: Placement) -> tuple[list[list[str]], int]:
    """Runs the order with one tick per compute, every stage needing its neighbour.

    Returns the cells of each rank, and the number of computes that could not run.
    """
    last = len(placement) - 1
    done: set[Compute] = set()
    rows: list[list[str]] = [[] for _ in order]
    position = [0] * len(order)

    def can_run(c: Compute) -> bool:
        if c.kind is Kind.FORWARD:
            return c.stage == 0 or c._replace(stage=c.stage - 1) in done
        return c._replace(stage=c.stage + 1) in done if c.stage < last else c._replace(kind=Kind.FORWARD) in done

    while True:
        tick = [
            (rank, order[rank][p])
            for rank, p in enumerate(position)
            if p < len(order[rank]) and can_run(order[rank][p])
        ]
        if not tick:
            return rows, sum(map(len, order)) - len(done)
        for row in rows:
            row.append("..")
        for rank, compute in tick:
            rows[rank][-1] = f"{compute.kind.value}{compute.microbatch}"
            position[rank] += 1
            done.add(compute)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_drawing_is_what_the_schedule_does(name: str) -> None:
    rows, _ = play(SCHEDULES[name].order(THREE, 4), THREE)
    assert rows == drawing(name)


def test_the_drawing_of_forward_only() -> None:
    rows, _ = play(forward_order(THREE, 4), THREE)
    assert rows == drawing("forward")


@pytest.mark.parametrize("name", SCHEDULES)
@given(placement=placements(), num_microbatches=st.integers(1, 13))
@settings(max_examples=200)
def test_every_compute_once_on_its_rank_in_ascending_order_without_a_cyclic_wait(
    name: str, placement: Placement, num_microbatches: int
) -> None:
    order = SCHEDULES[name].order(placement, num_microbatches)
    assert len(order) == 1 + max(rank for ranks in placement for rank in ranks)
    counts = Counter(compute for computes in order for compute in computes)
    everything = {
        Compute(kind, stage, m)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
        for stage in range(len(placement))
        for m in range(num_microbatches)
    }
    assert counts == dict.fromkeys(everything, 1)
    for rank, computes in enumerate(order):
        assert all(rank_of(placement, c.stage, c.microbatch) == rank for c in computes)
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            for stage in range(len(placement)):
                own = [c.microbatch for c in computes if (c.kind, c.stage) == (kind, stage)]
                assert own == sorted(own)
    _, stuck = play(order, placement)
    assert not stuck


@pytest.mark.parametrize("name", SCHEDULES)
@given(placement=placements(), num_microbatches=st.integers(1, 13))
def test_never_more_in_flight_than_the_row_says(name: str, placement: Placement, num_microbatches: int) -> None:
    row = SCHEDULES[name]
    order = row.order(placement, num_microbatches)
    for stage, ranks in enumerate(placement):
        position = Position(len(ranks), sum(map(len, placement[stage:])), num_microbatches)
        limit = row.in_flight(position)
        reached = 0
        for computes in order:
            held = 0
            for compute in computes:
                if compute.stage == stage:
                    held += 1 if compute.kind is Kind.FORWARD else -1
                    reached = max(reached, held)
        # The limit is met, not only kept: partitioners count on no less.
        assert reached == limit


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 7])
def test_the_one_forward_one_backward_of_the_literature(num_stages: int, num_microbatches: int) -> None:
    order = SCHEDULES["1f1b"].order(tuple((s,) for s in range(num_stages)), num_microbatches)
    for stage, computes in enumerate(order):
        text = "".join(c.kind.value for c in computes)
        warm_up = min(num_microbatches, num_stages - stage)
        assert text == "F" * warm_up + "BF" * (num_microbatches - warm_up) + "B" * warm_up


def test_a_heavy_first_stage_on_three_devices() -> None:
    order = SCHEDULES["1f1b"].order(((0, 1, 2), (3,)), 6)
    assert [" ".join(map(str, computes)) for computes in order] == [
        "0F0 0F3 0B0 0B3",
        "0F1 0F4 0B1 0B4",
        "0F2 0F5 0B2 0B5",
        "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3 1F4 1B4 1F5 1B5",
    ]


def test_a_rank_with_two_stages_takes_backwards_first_then_the_deepest_stage() -> None:
    order = SCHEDULES["gpipe"].order(((0,), (0,), (1,)), 2)
    assert " ".join(map(str, order[0])) == "0F0 1F0 0F1 1F1 1B0 1B1 0B0 0B1"


def test_names_are_resolved() -> None:
    assert resolve_schedule("gpipe") is SCHEDULES["gpipe"]
    assert resolve_schedule(SCHEDULES["1f1b"]) is SCHEDULES["1f1b"]
    by_path = resolve_schedule("pipeflow.schedules.gpipe:order")
    assert by_path.order is SCHEDULES["gpipe"].order
    assert resolve_schedule("pipeflow.schedules.gpipe:GPIPE") is SCHEDULES["gpipe"]
    own = resolve_schedule(SCHEDULES["gpipe"].order)
    assert own.name == "pipeflow.schedules.gpipe:order"
    assert own.in_flight(Position(2, 3, 7)) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpip", "known are 'gpipe', '1f1b'"),
        (":order", "known are 'gpipe', '1f1b'"),
        ("pipeflow.schedules:nothing", "names nothing"),
        ("pipeflow.schedules:__all__", "not a function"),
        ("pipeflow.schedules.gpipe:merge.__globals__", "names nothing"),
        ("os:system", "names a builtin_function_or_method of posix"),
        ("shutil:rmtree", "names a function of shutil"),
        ("pipeflow.schedules:importlib", "not a function"),
    ],
)
def test_what_cannot_be_resolved_is_refused(name: str, message: str) -> None:
    for allow in ((), None):
        with pytest.raises(PlanError, match=message):
            resolve_schedule(name, allow=allow)


def test_nothing_is_imported_because_a_plan_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orders_of_mine.py").write_text("def order(placement, count):\n    return ()\n")
    (tmp_path / "orders_that_fail.py").write_text("raise ZeroDivisionError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PlanError, match="import orders_of_mine before, or load the plan with allow="):
        resolve_schedule("orders_of_mine:order")
    with pytest.raises(PlanError, match="import orders_of_mine before"):
        resolve_schedule("orders_of_mine:order", allow=("orders_of", "other"))
    assert "orders_of_mine" not in sys.modules
    for allow in (("orders_of_mine",), None, ()):  # the last finds what the others imported
        assert resolve_schedule("orders_of_mine:order", allow=allow).name == "orders_of_mine:order"
    with pytest.raises(PlanError, match="cannot be imported .ZeroDivisionError: imported"):
        resolve_schedule("orders_that_fail:order", allow=None)
    with pytest.raises(PlanError, match="cannot be imported"):
        resolve_schedule("nowhere.at.all:order", allow=None)


def test_the_table_is_read_only_and_its_rows_know_their_names() -> None:
    with pytest.raises(TypeError):
        SCHEDULES["mine"] = SCHEDULES["gpipe"]  # type: ignore[index]
    assert all(isinstance(row, Schedule) and row.name == name for name, row in SCHEDULES.items())
