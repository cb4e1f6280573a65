"""Sequences run a few steps at a time, through a pipeline that remembers what came before.

Each stage replica keeps the states of its layers, one for each micro-batch that it runs; they
never travel, and may grow. A session cuts every batch alike, so that the rows of a sequence come
to the replica that has their states.

    step 1   embed ─► attention (keys, values of 5 steps) ─► head        a prompt of 5 tokens
    step 2   embed ─► attention (of 6) ─► head                           a token
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from pipeflow.errors import BatchError, EngineError
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.microbatch import MicroBatches
from pipeflow.runtime.randomness import Callables, Keyed, RandomLayer
from pipeflow.runtime.replica import StageReplica
from pipeflow.runtime.state import needed_layers


class StatefulLayer:
    """A layer called by its `decode`, with the state of the micro-batch at hand.

    `first_sample`, set by who runs it, tells which that is: a session cuts every batch alike.
    """

    def __init__(self, decode: Callable[..., Any]) -> None:
        self._decode = decode
        self.states: dict[int, Any] = {}
        self.step = 0
        self.first_sample = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._decode(self.states.get(self.first_sample), *args, **kwargs)
        if not isinstance(given, tuple) or len(given) != 2:
            raise ValueError(f"decode gave a {type(given).__name__}; it must give a pair (result, new state)")
        result, self.states[self.first_sample] = given
        return _contiguous(result)


def _contiguous(result: Any) -> Any:
    """Tensors as forward gives them to other layers; a view of what is kept would be none."""
    if isinstance(result, Tensor):
        return result.contiguous()
    return tuple(map(_contiguous, result)) if type(result) is tuple else result


def decoding_callables(graph: LayerGraph, replica: StageReplica) -> Callables:
    """What a session calls for each layer of a replica, states empty, and those to be told what they work on."""
    functions = dict(replica.functions)
    keyed: list[Keyed] = list(replica.random_layers)
    for name in replica.layers:
        if graph.layers[name].decoding.keeps_state:
            decode: Callable[..., Any] = replica.modules[name].decode  # type: ignore[assignment]  # as declared
            numerics = replica.precision.numerics(replica.device.type)
            stateful, plain = StatefulLayer(numerics.decoding(replica.modules[name], decode)), functions[name]
            functions[name] = stateful
            keyed.append(stateful)
            if isinstance(plain, RandomLayer):
                functions[name] = random = plain.around(stateful)
                keyed.append(random)
    return functions, keyed


def check_decoding(graph: LayerGraph, outputs: Iterable[str], batch_size: int) -> None:
    """Refuses what would not give the outputs of whole sequences.

    Every rank tries all the layers, so that all come to the same verdict and none waits for another.

    Raises:
        EngineError: no layer keeps a state; one looks at other steps and keeps none; or there is no row.
    """
    if batch_size < 1:
        raise EngineError(f"batch_size={batch_size}; a session decodes at least 1 sequence")
    layers = [graph.layers[name] for name in graph.layers if name in needed_layers(graph, outputs)]
    steps = _length_of_steps(graph, layers)
    for layer in layers:
        lengths = frozenset().union(*(graph.specs[tensor].lengths for tensor in layer.inputs))
        obstacle = graph.obstacle(layer.name, steps) if steps in lengths else layer.decoding.obstacle
        if obstacle and lengths:
            raise EngineError(
                f"layer {layer.name!r} ({layer.kind}) cannot decode step by step: {obstacle}; give the layer a method "
                "decode(state, *inputs) that returns (result, new state), with state None at first"
            )
    if not any(layer.decoding.keeps_state for layer in layers):
        raise EngineError(
            f"no layer of graph {graph.name!r} that the outputs depend on has a method decode(state, *inputs), so "
            "nothing would be remembered between steps; use predict, or give one to the layers that look back"
        )


def _length_of_steps(graph: LayerGraph, layers: Iterable[Layer]) -> str:
    """The length that all layers that keep a state read; "" where that is none or several, and nobody can tell."""
    stateful = [layer for layer in layers if layer.decoding.keeps_state]
    read = [frozenset().union(*(graph.specs[t].lengths for t in layer.inputs)) for layer in stateful]
    common = frozenset.intersection(*read) & graph.lengths.keys() if read else frozenset[str]()
    return next(iter(common)) if len(common) == 1 else ""


class DecodeSession(AbstractContextManager["DecodeSession"]):
    """Sequences that grow step by step; `Engine.decode` opens one.

    Args:
        batch_size: the sequences, in every step.
        run: runs a batch on the layers and states of the session.
        end: lets go of them.

    Attributes:
        num_steps: steps taken.
    """

    def __init__(
        self,
        batch_size: int,
        run: Callable[[DecodeSession, Mapping[str, Tensor]], dict[str, Tensor]],
        end: Callable[[DecodeSession], None],
    ) -> None:
        self.batch_size = batch_size
        self.num_steps = 0
        self._run = run
        self._end: Callable[[DecodeSession], None] | None = end

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for the next step, or several, of every sequence; on every rank.

        Args:
            batch: as for `Engine.predict`: one or more steps, the same rows each time.

        Raises:
            BatchError: it has another number of sequences than the session, or does not fit the graph.
            EngineError: the session is closed, or weights have changed since it was opened.
            LayerFailure: a layer raised. The engine is of no use after.
        """
        outputs = self._run(self, batch)
        self.num_steps += 1
        return outputs

    def check_open(self) -> None:
        """Raises EngineError once the session is closed."""
        if self._end is None:
            raise EngineError("this decode session is closed; open another with engine.decode(batch_size)")

    def check_rows(self, microbatches: MicroBatches) -> None:
        """Refuses a batch whose rows are not those of the session.

        Raises:
            BatchError: it has another number of rows, or comes in micro-batches.
        """
        if not isinstance(microbatches.given, Mapping):
            raise BatchError("a decode session cuts its batches itself, so that rows stay together; give a mapping")
        if microbatches.cut.num_samples != self.batch_size:
            raise BatchError(
                f"the batch has {microbatches.cut.num_samples} samples, and this session decodes {self.batch_size} "
                "sequences; give as many in every step, or open another session"
            )

    def close(self) -> None:
        """Lets go of all states, on all stages."""
        if self._end is not None:
            self._end(self)
            self._end = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
