"""Sequences decoded step by step through the pipeline give what predicting the whole would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import BatchError, EngineError, LayerFailure
from pipeflow.runtime.decoding import StatefulLayer
from pipeflow.testing import plans, run_ranks, unit_costs
from tests.runtime.models import Stages, make_plan, sgd


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Kernels may add in another order with more, and the engine's ranks have one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WIDTH = 8
NUM_TOKENS = 7


class Positions(nn.Module):
    """Adds an embedding of each position; its state is how many steps came before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        places: Tensor = self.table(torch.arange(first, first + x.shape[1], device=x.device))
        return x + places

    def decode(self, state: int | None, x: Tensor) -> tuple[Tensor, int]:
        first = state or 0
        return self(x, first), first + x.shape[1]


class Attention(nn.Module):
    """Causal attention with one head and dropout; its state is the keys and values so far, which grow."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(None, x)[0]

    def decode(self, state: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.mix(x).chunk(3, dim=-1)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        steps, all_steps = q.shape[1], k.shape[1]
        seen = torch.ones(steps, all_steps, dtype=torch.bool, device=x.device).tril(all_steps - steps)
        scores = (q @ k.transpose(1, 2) / WIDTH**0.5).masked_fill(~seen, float("-inf"))
        return x + self.drop(scores.softmax(-1) @ v), (k, v)


class Recurrent(nn.Module):
    """An LSTM; its state is torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(None, x)[0]

    def decode(self, state: Any, x: Tensor) -> tuple[tuple[Tensor, Tensor], Any]:
        result, state = self.lstm(x, state)
        return (result, x), state


def decoder() -> pf.LayerGraph:
    """Embedding, positions, attention, a recurrent layer with two outputs, and a skip around all."""
    graph = pf.LayerGraph("decoder")
    tokens = graph.input("tokens", ("B", "time"), dtype="int64")
    label = graph.input("label", ("B", "time"), dtype="int64")
    embed = graph.add("embed", pf.lazy(nn.Embedding, NUM_TOKENS, WIDTH), tokens)
    attended = graph.add("attend", pf.lazy(Attention), graph.add("place", pf.lazy(Positions), embed))
    result, given = graph.add("recur", pf.lazy(Recurrent), attended)
    joined = graph.add("join", torch.add, graph.add("sum", torch.add, result, given), embed)
    logits = graph.add("logits", pf.lazy(nn.Linear, WIDTH, NUM_TOKENS), joined)
    graph.loss("loss", cross_entropy, logits, label)
    return graph


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), label.flatten())


SINGLE: Stages = [(["embed", "place"], (0,)), (["attend", "recur"], (1,)), (["sum", "join", "logits", "loss"], (2,))]
REPLICAS: Stages = [
    (["embed", "place"], (0, 1)),
    (["attend", "recur"], (1, 2, 0)),
    (["sum", "join", "logits", "loss"], (2,)),
]
CHUNKS = (4, 1, 1, 3, 1)


def sequences(num_rows: int, time: int) -> Tensor:
    return torch.randint(0, NUM_TOKENS, (num_rows, time), generator=torch.Generator().manual_seed(num_rows + time))


def decoded(trainer: pf.Engine | pf.Reference, tokens: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """The logits of all steps, a chunk at a time."""
    with trainer.decode(len(tokens)) as session:
        return torch.cat([session.step({"tokens": part})["logits"] for part in torch.split(tokens, list(chunks), 1)], 1)


def train_batch(time: int) -> dict[str, Tensor]:
    return {"tokens": sequences(6, time), "label": sequences(6, time).flip(1)}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [SINGLE, REPLICAS])
def test_decoding_gives_what_predicting_the_whole_sequence_would(stages: Stages, schedule: str) -> None:
    graph = decoder()
    reference = pf.Reference(graph, num_microbatches=4)
    with pf.Engine(graph, make_plan(graph, stages, schedule=schedule)) as engine:
        for num_rows in (1, 3, 10):
            tokens = sequences(num_rows, sum(CHUNKS))
            seen = decoded(engine, tokens, CHUNKS)
            assert torch.equal(seen, decoded(reference, tokens, CHUNKS))
            torch.testing.assert_close(seen, engine.predict({"tokens": tokens})["logits"])


@given(data=st.data())
@settings(max_examples=25)
def test_under_any_plan_and_in_any_pieces(data: st.DataObject) -> None:
    graph = decoder()
    plan = data.draw(plans(unit_costs(graph), max_ranks=4, max_replicas=3, graph_digest=graph.digest))
    chunks = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    tokens = sequences(data.draw(st.integers(1, 9)), sum(chunks))
    reference = pf.Reference(graph, num_microbatches=plan.num_microbatches)
    with pf.Engine(graph, plan) as engine:
        assert torch.equal(decoded(engine, tokens, chunks), decoded(reference, tokens, chunks))


def decoding_ranks(rank: int) -> tuple[list[Tensor], set[int], list[str]]:
    """Decodes in both layouts; the slots whose states this rank keeps; what a wrong batch raises."""
    graph = decoder()
    seen = []
    for stages in (SINGLE, REPLICAS):
        with pf.Engine(graph, make_plan(graph, stages), sgd) as engine:
            engine.step(train_batch(5))
            for num_rows in (3, 10):
                seen.append(decoded(engine, sequences(num_rows, sum(CHUNKS)), CHUNKS))
    errors = []
    with pf.Engine(graph, make_plan(graph, REPLICAS), sgd) as engine:
        with engine.decode(8) as session:
            session.step({"tokens": sequences(8, 3)})
            kept = slots_by_layer(engine)["attend"]
        assert not any(job.session for job in engine._ranks._executors)
        with engine.decode(8) as session:
            try:
                session.step({"tokens": sequences(7 if rank == 1 else 8, 3)})
            except (BatchError, LayerFailure) as error:
                errors.append(str(error))
    return seen, kept, errors


def slots_by_layer(engine: pf.Engine) -> dict[str, set[int]]:
    """The first samples of the micro-batches whose states are kept in this process, by layer."""
    found: dict[str, set[int]] = {}
    for job, executors in engine._ranks._executors.items():
        if job.session is None:
            continue
        for executor in executors.values():
            for stage in executor.state.stages.values():
                names = [name for name in stage.replica.layers if engine.graph.layers[name].decoding.keeps_state]
                stateful = [layer for layer in stage.keyed_layers if isinstance(layer, StatefulLayer)]
                for name, layer in zip(names, stateful, strict=True):
                    found.setdefault(name, set()).update(layer.states)
    return found


def test_states_stay_with_their_stage_and_replica_and_never_travel() -> None:
    graph = decoder()
    expected = []
    for _ in (SINGLE, REPLICAS):
        reference = pf.Reference(graph, sgd, num_microbatches=4)
        reference.step(train_batch(5))
        expected += [decoded(reference, sequences(n, sum(CHUNKS)), CHUNKS) for n in (3, 10)]
    results = run_ranks(decoding_ranks, 3)
    for result in results:
        assert result.error is None, result.trace
        for i, (a, b) in enumerate(zip(result.value[0], expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=0 if i < 2 else 1e-5, atol=0 if i < 2 else 1e-6)
        assert len(result.value[2]) == 1
        assert "decodes 8 sequences" in result.value[2][0]
    # Eight rows in four micro-batches; those of the stage with replicas on ranks 1, 2 and 0.
    assert [result.value[1] for result in results] == [{4}, {0, 6}, {2}]


def test_two_sessions_and_predictions_between_do_not_disturb_each_other() -> None:
    graph, tokens, others = decoder(), sequences(5, 6), sequences(2, 6)
    with pf.Engine(graph, make_plan(graph, REPLICAS)) as engine:
        whole = [engine.predict({"tokens": t})["logits"] for t in (tokens, others)]
        with engine.decode(5) as first, engine.decode(2, ["logits"]) as second:
            for i in range(6):
                a = first.step({"tokens": tokens[:, i : i + 1]})["logits"]
                b = second.step({"tokens": others[:, i : i + 1]})["logits"]
                engine.predict({"tokens": sequences(3, 4)})
                torch.testing.assert_close(a, whole[0][:, i : i + 1])
                torch.testing.assert_close(b, whole[1][:, i : i + 1])
            assert first.num_steps == 6


def test_misuse_is_refused_and_the_session_goes_on() -> None:
    graph, tokens = decoder(), sequences(4, 5)
    with pf.Engine(graph, make_plan(graph, SINGLE), sgd) as engine:
        with engine.decode(4) as session:
            session.step({"tokens": tokens[:, :2]})
            with pytest.raises(BatchError, match="has 3 samples, and this session decodes 4 sequences"):
                session.step({"tokens": tokens[:3, 2:]})
            with pytest.raises(BatchError, match="give a mapping"):
                session.step([{"tokens": tokens}])  # type: ignore[arg-type]
            seen = session.step({"tokens": tokens[:, 2:]})["logits"]
            torch.testing.assert_close(seen, engine.predict({"tokens": tokens})["logits"][:, 2:])
            engine.step(train_batch(5))
            with pytest.raises(EngineError, match="weights have changed since this decode session"):
                session.step({"tokens": tokens})
        with pytest.raises(EngineError, match="session is closed"):
            session.step({"tokens": tokens})
        with engine.decode(4) as session:
            engine.load_state_dict(engine.state_dict())
            with pytest.raises(EngineError, match="weights have changed"):
                session.step({"tokens": tokens})
        with pytest.raises(EngineError, match="batch_size=0"):
            engine.decode(0)


def chain(layer: object) -> pf.LayerGraph:
    graph = pf.LayerGraph("chain")
    x = graph.input("x", ("B", "time", 4))
    graph.loss("loss", mean_square, graph.add("last", nn.Linear(4, 4), graph.add("middle", layer, x)))
    return graph


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean()


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[0]
        return result


class Half(nn.Module):
    """Has `decode`, and gives no state."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def decode(self, state: object, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Tanh(), "nothing would be remembered between steps"),
        (Wrapped(), r"'middle' \(Wrapped\) cannot decode step by step: its part 'inner' \(LSTM\) looks at other steps"),
        (nn.Sequential(Half()), r"its part '0' \(Half\) has a method decode, which the layer as a whole"),
        (nn.TransformerEncoderLayer(4, 1, 4, batch_first=True), "looks at other steps"),
    ],
)
def test_what_would_not_be_the_whole_sequence_is_refused(layer: object, words: str) -> None:
    graph = chain(layer)
    for trainer in (pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))])), pf.Reference(graph)):
        with pytest.raises(EngineError, match=words):
            trainer.decode(2, ["last"])


def test_a_decode_that_gives_no_pair_fails_with_its_layer() -> None:
    graph = chain(Half())
    with pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))])) as engine:
        with (
            engine.decode(2) as session,
            pytest.raises(LayerFailure, match=r"gave a Tensor; it must give a pair") as caught,
        ):
            session.step({"x": torch.zeros(2, 3, 4)})
        assert caught.value.layer == "middle"


# -- layers that look around without saying so -------------------------------------------------


def beside(layer: object) -> pf.LayerGraph:
    """A layer after one that keeps a state, in a sequence of features (B, time, 4)."""
    graph = pf.LayerGraph("beside")
    x = graph.input("x", ("B", "time", 4))
    hidden = graph.add("sum", pf.lazy(Sum), graph.add("first", pf.lazy(nn.Linear, 4, 4), x))
    graph.loss("loss", mean_square, graph.add("last", pf.lazy(nn.Linear, 4, 4), graph.add("middle", layer, hidden)))
    return graph


class Sum(nn.Module):
    """The sum of all steps so far."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(None, x)[0]

    def decode(self, state: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        sums = x.cumsum(1) + (0 if state is None else state)
        return sums, sums[:, -1:]


class Table(nn.Module):
    """Adds a row for each position, all of zeros at first."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(64, 4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows[: x.shape[1]].to(x.dtype)


def attended(x: Tensor) -> Tensor:
    return x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def pooled(x: Tensor) -> Tensor:
    return nn.functional.avg_pool1d(x.transpose(1, 2), 3, stride=1, padding=1).transpose(1, 2)


def delayed(x: Tensor) -> Tensor:
    """Four steps later."""
    return nn.functional.pad(x, (0, 0, 4, 0))[:, : x.shape[1]]


def centred(x: Tensor) -> Tensor:
    return x - x.mean((0, 1), keepdim=True)


LOOK_AROUND: list[Any] = [
    attended,
    pooled,
    delayed,
    centred,
    lambda x: x.cumsum(1),
    lambda x: x.flip(1),
    lambda x: x.softmax(1),
    nn.Softmax(1),
    pf.lazy(Table),
    Table(torch.bfloat16),
    lambda x: x.flatten(0, 1).cumsum(0).unflatten(0, (-1, x.shape[1])),
]
AT_ONE_STEP: list[Any] = [
    nn.LayerNorm(4),
    nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4)),
    lambda x: x.softmax(-1),
    lambda x: x * x.mean(-1, keepdim=True).sigmoid(),
    lambda x: nn.functional.dropout(x, 0.5, training=True),
    lambda x: x.flatten(0, 1).tanh().unflatten(0, (-1, x.shape[1])),
]


@pytest.mark.parametrize("layer", LOOK_AROUND, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_layers_that_look_at_other_steps_are_found_by_trying(layer: object) -> None:
    graph = beside(layer)
    for trainer in (pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))])), pf.Reference(graph)):
        with pytest.raises(
            EngineError, match=r"layer 'middle' .* cannot decode step by step: .*give the layer a method"
        ):
            trainer.decode(2, ["last"])


@pytest.mark.parametrize("layer", AT_ONE_STEP, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_layers_that_look_at_one_step_decode(layer: object) -> None:
    graph = beside(layer)
    with pf.Reference(graph).decode(2, ["last"]) as session:
        session.step({"x": torch.ones(2, 3, 4)})


def test_layers_that_fold_steps_into_the_batch_or_give_several_for_one_decode() -> None:
    graph = pf.LayerGraph("folded")
    x = graph.input("x", ("B", "time", 4))
    rows = graph.add("rows", torch.flatten, graph.add("sum", pf.lazy(Sum), x), start_dim=0, end_dim=1)
    graph.add("head", pf.lazy(nn.Linear, 4, 2), rows)
    graph.add("twice", torch.repeat_interleave, "sum", repeats=2, dim=1)
    graph.add("joined", lambda y: torch.cat([y, y], 1), "sum")
    graph.add("longer", lambda y: nn.functional.pad(y, (0, 0, 1, 0)), "sum")
    graph.loss("loss", mean_square, "head")
    for output in ("head", "twice"):
        assert graph.obstacle("rows", "time") == graph.obstacle("twice", "time") == ""
        pf.Reference(graph).decode(2, [output])
    for output, words in (("joined", "for some steps by themselves"), ("longer", "no number of steps for each step")):
        with pytest.raises(EngineError, match=words):
            pf.Reference(graph).decode(2, [output])


def test_what_reads_a_length_that_is_given_whole_each_time_may_look_around() -> None:
    """Steps are taken along the length that the layers with a state read."""
    graph = pf.LayerGraph("two lengths")
    x, source = graph.input("x", ("B", "time", 4)), graph.input("source", ("B", "others", 4))
    summed = graph.add("sum", pf.lazy(Sum), x)
    seen = graph.add("encode", attended, source)
    graph.add("cross", lambda q, k: nn.functional.scaled_dot_product_attention(q, k, k), summed, seen)
    graph.loss("loss", mean_square, graph.add("last", pf.lazy(nn.Linear, 4, 4), "cross"))
    reference, batch = pf.Reference(graph), {"x": torch.randn(2, 3, 4), "source": torch.randn(2, 5, 4)}
    with reference.decode(2, ["last"]) as session:
        steps = [session.step({**batch, "x": batch["x"][:, i : i + 1]})["last"] for i in range(3)]
    torch.testing.assert_close(torch.cat(steps, 1), reference.predict(batch, ["last"])["last"])


def refusing_ranks(rank: int) -> str:
    graph = beside(attended)
    plan = make_plan(graph, [(["first", "sum"], (0,)), (["middle"], (1,)), (["last", "loss"], (2,))])
    with pf.Engine(graph, plan) as engine:
        try:
            engine.decode(2, ["last"])
        except EngineError as error:
            return str(error)
    return "none"


def test_all_processes_refuse_alike() -> None:
    for result in run_ranks(refusing_ranks, 3):
        assert "layer 'middle' (attended) cannot decode step by step" in result.value, result.trace
