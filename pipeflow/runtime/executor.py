"""Runs one rank's program. Follows it; decides nothing.

The program is bound once. A step then plans nothing, asks for no shape and formats no text:
it calls one bound action after another. Once a rank has computed all, it shares its losses, and
takes its optimizer steps while they travel; no rank ends a step before all have computed theirs,
so a failure anywhere is known everywhere before the step returns. What is left is to say, when
an action raises, where.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeflow.errors import LayerFailure, NonFiniteError
from pipeflow.program import Action, Compute, Kind, Receive, Send, Step
from pipeflow.runtime.binding import Binder
from pipeflow.runtime.call import Call
from pipeflow.runtime.failures import failed_backward, odd_output
from pipeflow.runtime.gradients import GradientPolicy, apply, decide, gradient_norms
from pipeflow.runtime.loss_scale import unscale
from pipeflow.runtime.losses import loss_table, read_losses, same_call
from pipeflow.runtime.microbatch import MicroBatches
from pipeflow.runtime.rank_state import RankState
from pipeflow.runtime.transport import Aborted, Transport

Bound = tuple[Action | None, Callable[[], None]]


class Executor:
    """One rank's bound program.

    Args:
        actions: the rank's part of the program.
        binder: what to bind them to.
        policy: what to do with gradients before the optimizer's step; None in inference.
        owned: the parameters of the stages whose first replica is here, by name.
        names: of all parameters of the model; all ranks judge them in this order.
        measure: record when each action starts and ends, in `spans`.
        arrived: for each receive among the actions, how many messages to its peer have then arrived.

    Attributes:
        losses: each loss over the last batch; the same on every rank.
        interrupted_at: what the rank was at when Ctrl-C or an exit ended its run; None else.
        spans: (action, start, end) of the last run, in seconds of a monotonic clock.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        binder: Binder,
        *,
        policy: GradientPolicy | None = None,
        owned: Mapping[str, nn.Parameter] | None = None,
        names: Sequence[str] = (),
        measure: bool = False,
        arrived: Sequence[int] = (),
    ) -> None:
        self._arrived = tuple(arrived)
        self.state: RankState = binder.state
        self.transport: Transport = binder.transport
        self.losses: Mapping[str, float] = {}
        self.interrupted_at: LayerFailure | None = None
        self.spans: list[tuple[Action, float, float]] = []
        self._rank = binder.rank
        self._policy = policy or GradientPolicy()
        self._owned = owned or {}
        self._names = tuple(names)
        self._step = 0
        self._tag = 0
        self._loss_scale = 1.0
        self._wait_share: Callable[[], Tensor] | None = None
        bound = [(action, closure) for action in actions if (closure := binder.bind(action)) is not None]
        self._bound = self._with_agreement(bound)
        self._closures = [
            closure if action is None or not measure else self._timed(action, closure)
            for action, closure in self._bound
        ]
        self._receives = [
            action._replace(route=action.route._replace(payload=binder.messages.sent(action.route, action.microbatch)))
            for action, _ in bound
            if isinstance(action, Receive)
        ]

    def _with_agreement(self, bound: list[tuple[Action, Callable[[], None]]]) -> list[Bound]:
        """Adds the sharing of losses: started after the last compute, awaited at the end.

        Where the ranks have to agree about gradients first, both happen before the first step.
        """
        steps = [i for i, (action, _) in enumerate(bound) if isinstance(action, Step)]
        first_step = steps[0] if steps else len(bound)
        if self._policy.needs_norms:
            agreement: list[Bound] = [(None, self._wait_reductions)]
            if self._policy.loss_scaled:
                agreement.append((None, self._unscale))
            agreement += [(None, self._start_share), (None, self._finish_share), (None, self._judge)]
            return [*bound[:first_step], *agreement, *bound[first_step:]]
        clip: list[Bound] = [(None, self._wait_reductions), (None, self._judge)] if self._policy.clip_value else []
        computes = [i for i, (action, _) in enumerate(bound) if isinstance(action, Compute | Send)]
        start = computes[-1] + 1 if computes else 0
        return [
            *bound[:start],
            (None, self._start_share),
            *bound[start:first_step],
            *clip,
            *bound[first_step:],
            (None, self._finish_share),
        ]

    def _wait_reductions(self) -> None:
        for stage in self.state.stages.values():
            stage.wait_reduce()

    def _unscale(self) -> None:
        for stage in self.state.stages.values():
            unscale(stage.replica.parameters.values(), self._loss_scale)

    def _wait_statistics(self) -> None:
        for stage in self.state.stages.values():
            stage.wait_statistics()

    def _start_share(self) -> None:
        state = self.state
        table = loss_table(state.graph, state.losses, state.factors, state.num_microbatches, self._tag)
        if self._policy.needs_norms:
            norms = torch.tensor(gradient_norms(self._owned, self._names), dtype=torch.float64)
            table = torch.cat([table, norms])
        self._wait_share = self.transport.start_share(table)

    def _finish_share(self) -> None:
        assert self._wait_share is not None
        table, graph = self._wait_share(), self.state.graph
        self._wait_share = None
        self.losses = read_losses(graph, table, self.state.num_microbatches)
        if not same_call(table, len(graph.losses) * self.state.num_microbatches, self._tag):
            self.transport.disagree()
        if self._policy.needs_norms:
            norms = table[len(table) - len(self._names) :].tolist()
            self.state.verdict = decide(self._policy, norms, self._names, self.losses, self._step)

    def _judge(self) -> None:
        for stage in self.state.stages.values():
            apply(self._policy, self.state.verdict, stage.replica.parameters.values())

    def run(
        self, batch: MicroBatches, *, call: Call, share: float = 1.0, draw: int = 0, loss_scale: float = 1.0
    ) -> None:
        """Runs the program on one batch.

        Args:
            call: that this is, of this batch.
            share: what the batch's gradients count among those of several batches.
            draw: which call this is, for random layers.
            loss_scale: what losses are multiplied by before backward, and gradients divided by after.

        Raises:
            LayerFailure: an action of this rank raised; the original is its cause.
            Aborted: another rank failed, or was asked for something else.
            NonFiniteError: the policy stops this step, on every rank.
        """
        self._step, self._tag = call.step, call.tag
        self._loss_scale = loss_scale
        self.spans = []
        position = -1
        try:
            self.state.begin(batch, share=share * loss_scale, draw=draw)
            self.transport.begin(self._receives, call, self._arrived, may_lack=self.state.graph.may_lack_gradients)
            for position, closure in enumerate(self._closures):  # noqa: B007 (read by the handler below)
                closure()
            self._wait_statistics()
            self.transport.end()
        except Aborted:
            self.state.clear()
            raise
        except NonFiniteError as error:
            if position < 0 or self._bound[position][0] is not None:  # a layer's own: no other rank raises it
                failure = self._located(error, position)
                self.state.clear()
                raise failure from error
            for stage in self.state.stages.values():
                stage.replica.drop_gradients()
            self._wait_statistics()
            self.transport.end()
            raise
        except Exception as error:
            failure = self._located(error, position)
            self.state.clear()
            raise failure from error
        except BaseException as error:
            self.interrupted_at = self._located(error, position)
            self.state.clear()
            raise

    def _timed(self, action: Action, closure: Callable[[], None]) -> Callable[[], None]:
        """The action with its span recorded; on a GPU it also waits for its kernels."""
        device, clock = self.state.device, time.perf_counter

        def timed() -> None:
            start = clock()
            closure()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.spans.append((action, start, clock()))

        return timed

    def _located(self, error: BaseException, position: int) -> LayerFailure:
        """The error with what this rank was at."""
        action = self._bound[position][0] if 0 <= position < len(self._bound) else None
        stage = microbatch = layer = None
        phase, odd = "transport", ""
        if isinstance(action, Compute):
            stage, microbatch = action.stage, action.microbatch
            state = self.state.stages[stage]
            if action.kind is Kind.FORWARD:
                phase, layer = "forward", state.compiled.failed_layer(state.live[microbatch] or [], error)
                odd = odd_output(state, microbatch)
            else:
                phase = "backward"
                if isinstance(error, Exception):  # looking for the layer takes time, which Ctrl-C gives none
                    layer = failed_backward(self.state, stage, microbatch, error)
        elif isinstance(action, Step):
            stage, phase = action.stage, "optimizer"
        return LayerFailure(
            rank=self._rank,
            stage=stage,
            layer=layer,
            microbatch=microbatch,
            step=self._step,
            phase=phase,
            original=f"{type(error).__name__}: {error}{odd}".removesuffix(": "),
            trace="".join(traceback.format_exception(error)),
        )
