"""The engine: a graph, a plan and weights, and what one does with them.

It builds each rank's stages, has the plan proved, and hands batches to the executors. Where
ranks are threads of this process it holds all of them; under `torchrun` it holds one, and every
rank makes the same calls with the same batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from numbers import Real
from types import TracebackType
from typing import Self, overload

import torch
from torch import Tensor

from pipeflow.errors import CheckpointError, EngineError, NonFiniteError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime import checkpoint
from pipeflow.runtime.calls import Calls, OneCall
from pipeflow.runtime.checkpoint import Progress
from pipeflow.runtime.decoding import DecodeSession, check_decoding
from pipeflow.runtime.distributed import DistributedTransport, connect, is_launched
from pipeflow.runtime.gradients import NonFinite
from pipeflow.runtime.job import Job
from pipeflow.runtime.local_ranks import LocalRanks
from pipeflow.runtime.loss_scale import LossScaler
from pipeflow.runtime.measurement import Measurement, Recorder
from pipeflow.runtime.meeting import Meeting, together
from pipeflow.runtime.microbatch import Batch, MicroBatches
from pipeflow.runtime.optimizers import follows_loss
from pipeflow.runtime.options import TransportKind, check_num_threads, check_transport
from pipeflow.runtime.parameter_groups import ParameterGroups
from pipeflow.runtime.peak_bytes import PeakBytes
from pipeflow.runtime.phases import OpenPhase
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.predictions import check_outputs, gather_outputs
from pipeflow.runtime.replica import OptimizerFactory, SchedulerFactory
from pipeflow.runtime.result import StepResult
from pipeflow.runtime.running_statistics import BatchNormChoice
from pipeflow.runtime.setup import Setup, join, make_setup
from pipeflow.runtime.state import check_state, copy_into
from pipeflow.runtime.threads import Exchange
from pipeflow.runtime.transport import Aborted
from pipeflow.runtime.whole_state import gather_state
from pipeflow.runtime.workers import Workers


class Engine(AbstractContextManager["Engine"]):
    """Trains and runs a layer graph by a plan.

    >>> with pf.Engine(graph, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)) as engine:
    ...     loss = engine.step(batch).loss                                    # doctest: +SKIP

    Args:
        graph: the layer graph. Its modules give the initial weights and are not changed.
        plan: for this graph. It is verified before anything runs.
        optimizer: makes an optimizer for a list of parameters; called once per stage replica.
            None for inference alone. For a graph with phases, one for each by name, or one for all.
        lr_scheduler: makes a scheduler from an optimizer; stepped after each step; one that takes
            a metric (`ReduceLROnPlateau`) is given the step's loss. By phase as well.
        parameter_groups: options of the optimizer for parameters by name pattern, for example
            `{"*.bias": {"weight_decay": 0.0}}`; the first pattern that fits `<layer>.<name>` holds. A
            shared parameter goes by each of its names.
        clip_norm: scale gradients so that their norm over the whole model is at most this.
        clip_value: cut every element of the gradients to this absolute value, after `clip_norm`.
        nonfinite: where a loss or gradient is infinite or no number, "ignore" it as torch does,
            "raise" NonFiniteError on every rank, or "skip" the step on every rank.
        batch_norm: when running statistics of torch's norms move: after each "microbatch", as they do
            on one device; or "deferred", once a batch, by the statistics of all of it. What norms
            divide by is a micro-batch's own either way. "synchronised": batch-norms divide by the
            statistics of all micro-batches that the replicas of their stage run at the same time, as
            torch's SyncBatchNorm does, and move by these; replicas then wait for each other.
        precision: the types to train in: autocast, scaled losses, float32 masters, the type of
            sums over replicas; by default those that the graph declares.
        seed: for lazily built layers and random ones. The same seed gives the same training
            under any plan.
        transport: "threads" runs all ranks in this process, "distributed" is one rank of a
            `torchrun` job; "auto" is distributed where there is such a job.
        devices: a torch device for each rank; by default those that the plan's cluster names.
        num_threads: threads torch may use in each rank; by default the process's, shared out.
        measure: record how long each stage takes, and of one early step the bytes that each rank
            holds at most (`measured`).

    Raises:
        PlanError: the plan is for another graph, or asks for what this version does not run.
        VerificationError: the plan would not run to its end.
        PlanMismatch: the ranks hold different plans or settings; names them.
        EngineError: an option is none or contradicts another, a device is not there, the job has another
            number of ranks than the plan, or the engine could not be made on another rank.
    """

    def __init__(
        self,
        graph: LayerGraph,
        plan: Plan,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        *,
        lr_scheduler: SchedulerFactory | Mapping[str, SchedulerFactory] | None = None,
        parameter_groups: ParameterGroups | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: NonFinite = "ignore",
        precision: Precision | None = None,
        batch_norm: BatchNormChoice = "microbatch",
        seed: int = 0,
        transport: TransportKind = "auto",
        devices: Sequence[torch.device | str] | None = None,
        num_threads: int | None = None,
        measure: bool = False,
    ) -> None:
        # A transport that is none is refused with the rest, where the other ranks hear of it.
        distributed = transport == "distributed" or (transport != "threads" and is_launched())
        if distributed:
            connect()
        meeting = Meeting() if distributed else None

        def set_up() -> Setup:
            check_transport(transport)
            check_num_threads(num_threads)
            return make_setup(
                graph,
                plan,
                optimizer,
                lr_scheduler=lr_scheduler,
                parameter_groups=parameter_groups,
                clip_norm=clip_norm,
                clip_value=clip_value,
                nonfinite=nonfinite,
                precision=precision,
                batch_norm=batch_norm,
                seed=seed,
                devices=devices,
                measure=measure,
                num_ranks=None if meeting is None else meeting.num_ranks,
            )

        self._remote: DistributedTransport | None = None
        try:
            self._setup = setup = together(meeting, "make the engine", set_up)
            self._exchange = Exchange(plan.num_ranks, plan.placement)
            self._remote = None if meeting is None else join(setup, meeting)
            ranks = tuple(range(plan.num_ranks)) if meeting is None else (meeting.rank,)
            self._ranks = LocalRanks(setup, ranks, self._exchange, self._remote)
        except BaseException as error:
            told = None
            if self._remote is not None:
                with suppress(RuntimeError):  # of a store that is gone
                    told = self._remote.board.failure()
                self._remote.close()
            elif meeting is not None:
                meeting.close()
            if isinstance(error, Aborted):
                if told is not None:
                    raise EngineError(f"cannot make the engine: {told}") from error
                raise EngineError(
                    f"cannot make the engine: a rank has ended or is gone ({error}); start all of them again"
                ) from error
            raise
        self._meeting = meeting
        self.graph = graph
        self.plan = plan
        self._step = 0
        self._loads = 0
        self._num_sessions = 0
        self._draws = 0  # calls of `accumulate` and `step`: random layers draw anew in each
        self._calls = Calls(self._remote, self._exchange.abort)
        self._open = OpenPhase(graph)
        self._precision = setup.precision
        scale = setup.precision.loss_scale
        self._scaler = None if scale is None else LossScaler(scale)
        self._workers = Workers(ranks, num_threads=num_threads, stop=self._exchange.abort)
        self._has_followers = any(
            follows_loss(t.scheduler) for r in self._ranks.every_replica for t in r.training_by_phase.values()
        )
        self._recorder = Recorder(plan, setup.prepared[None].peak_bytes_by_rank)
        self._peaks = {rank: PeakBytes(setup.devices[rank]) for rank in ranks}

    # --- running --------------------------------------------------------------------------

    def accumulate(self, batch: Batch, *, share: float = 1.0, phase: str | None = None) -> StepResult:
        """Adds a batch's gradients to those of the next `step`: forward and backward alone.

        Gradients are summed over replicas once, in that step. Arguments, result and errors as
        `step`; for the mean over K batches, give each call and the step a share of 1 / K.
        """
        with self._calls.one("accumulate", self._step, trains=True) as call:
            self._check_trainable(share, phase)
            job = Job("accumulate", phase)
            microbatches = self._read(job, batch)
            call.begin(microbatches.cut, share=float(share) if share != 1.0 else None, phase=phase)
            result = self._run(call, job, microbatches, share=share)
            self._open.accumulated(phase)
            self._draws += 1
            return result

    def _check_trainable(self, share: float, phase: str | None) -> None:
        if not self._setup.optimizers:
            raise EngineError("this engine has no optimizer and cannot train; pass optimizer=")
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < float("inf"):
            raise EngineError(f"share={share!r}; it is what a batch's gradients count, a number above 0")
        self._open.check(phase)

    def step(self, batch: Batch, *, share: float = 1.0, phase: str | None = None) -> StepResult:
        """Trains on one batch: forward, backward, one optimizer step.

        Args:
            batch: a tensor for every input that this process's stages read (in one process: for
                every input), the batch dimension first; any number of samples from 1. Or a list of
                such batches, each a micro-batch with a size and lengths of its own, at most as many as the
                plan has; losses are means over all of them. What it gives must tell this process the
                samples and all lengths; inputs that it does not read may be on the meta device.
            share: what its gradients count beside those of `accumulate`d batches.
            phase: which of the graph's phases, where it has any: its losses alone are computed, and
                only what it trains learns.

        Returns:
            The losses, the same on every rank.

        Raises:
            BatchError: the batch does not fit the graph; nothing was sent.
            LayerFailure: a layer raised, here or on another rank. The engine is of no use after.
            NonFiniteError: something was not finite and `nonfinite="raise"`; the engine goes on.
            EngineError: no optimizer was given, the graph has not this phase or another's gradients
                wait, or the engine has failed or is closed.
        """
        with self._calls.one("step", self._step, trains=True) as call:
            self._check_trainable(share, phase)
            job, microbatches = self._step_job(batch, phase)
            start = time.perf_counter()
            call.begin(microbatches.cut, share=float(share) if share != 1.0 else None, phase=phase)
            try:
                result = self._run(call, job, microbatches, share=share)
            except NonFiniteError:
                self._open.stepped()  # its gradients are let go of
                raise
            self._open.stepped()
            if job.work == "measured":
                self._recorder.record_peaks({rank: peak.bytes for rank, peak in self._peaks.items()})
            elif self._setup.measure:
                spans = {rank: executor.spans for rank, executor in self._ranks.executors(job).items()}
                self._recorder.record(spans, time.perf_counter() - start)
            self._step += 1
            self._draws += 1
            return result

    def _step_job(self, batch: Batch, phase: str | None) -> tuple[Job, MicroBatches]:
        """How to step: with bytes counted, if that is wanted and the batch is the one that is planned for."""
        job = Job("step", phase)
        microbatches = self._read(job, batch)
        if not self._setup.measure or phase is not None or not self._recorder.wants_peaks:
            return job, microbatches
        if not microbatches.cut.even or microbatches.cut.num_samples != self.plan.batch_size:
            return job, microbatches
        measured = Job("measured", phase)
        return measured, self._read(measured, batch)

    def evaluate(self, batch: Batch, *, phase: str | None = None) -> StepResult:
        """The losses of a batch with the layers in evaluation mode; nothing is trained.

        Args:
            batch: as for `step`.
            phase: of this phase's losses alone; by default all.

        Errors as `step`.
        """
        with self._calls.one("evaluate", self._step) as call:
            if phase is not None:
                self._open.check_name(phase)
            job = Job("infer", phase)
            microbatches = self._read(job, batch)
            call.begin(microbatches.cut, phase=phase)
            return self._run(call, job, microbatches)

    @overload
    def predict(self, batch: Mapping[str, Tensor], outputs: Iterable[str] | None = None) -> dict[str, Tensor]: ...

    @overload
    def predict(
        self, batch: Sequence[Mapping[str, Tensor]], outputs: Iterable[str] | None = None
    ) -> list[dict[str, Tensor]]: ...

    def predict(
        self, batch: Batch, outputs: Iterable[str] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Output tensors for a batch, on every rank, with the layers in evaluation mode.

        Args:
            batch: tensors for the inputs that the outputs depend on; or a list of micro-batches.
            outputs: names of tensors that layers compute; by default `graph.outputs`.

        Returns:
            By name, the samples in the order of the batch; for a list of micro-batches, that for each.

        Raises:
            EngineError: a batch was given whole, and an output does not have the batch as its first
                dimension. Else as `step`.
        """
        with self._calls.one("predict", self._step) as call:
            names = check_outputs(self.graph, outputs, whole=isinstance(batch, Mapping))
            return self._predict(call, Job("infer", outputs=names), batch)

    def decode(self, batch_size: int, outputs: Iterable[str] | None = None) -> DecodeSession:
        """Opens a session that runs sequences a few steps at a time, and remembers what came before.

        Layers that look back have a method `decode(state, *inputs)` that gives (result, new state); the
        state is None at first, stays where the layer is, one for each micro-batch, and may grow. Other
        layers are called as ever. Under `torchrun` every rank opens the session and takes its steps.

        >>> with engine.decode(batch_size=4) as session:                          # doctest: +SKIP
        ...     logits = session.step({"tokens": prompts})["logits"]
        ...     for _ in range(20):
        ...         token = logits[:, -1:].argmax(-1)
        ...         logits = session.step({"tokens": token})["logits"]

        Args:
            batch_size: sequences, the same in every step.
            outputs: as for `predict`.

        Raises:
            EngineError: no layer looks back, or one is known to and has no `decode`.
        """
        names = check_outputs(self.graph, outputs, whole=True)
        check_decoding(self.graph, names, batch_size)
        weights, number = self._weights, self._num_sessions
        self._num_sessions += 1

        def run(session: DecodeSession, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with self._calls.one("decode", self._step) as call:  # others hear of what is refused in it
                session.check_open()
                if self._weights != weights:
                    raise EngineError(
                        "the weights have changed since this decode session was opened, and what it remembers is of "
                        "those before; open another"
                    )
                job = Job("infer", outputs=names, session=session)
                sequence = f"{session.num_steps} of session {number}"
                return self._predict(call, job, batch, sequence)  # type: ignore[return-value]

        def end(session: DecodeSession) -> None:
            job = Job("infer", outputs=names, session=session)
            self._ranks.forget(job)

        return DecodeSession(batch_size, run, end)

    @property
    def _weights(self) -> tuple[int, int]:
        """Changes when weights may have."""
        return self._draws, self._loads

    def _predict(
        self, call: OneCall, job: Job, batch: Batch, step: str | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        microbatches = self._read(job, batch)
        call.begin(microbatches.cut, outputs=job.outputs, step=step)
        self._run(call, job, microbatches)
        states = {rank: executor.state for rank, executor in self._ranks.executors(job).items()}
        return gather_outputs(self.graph, self.plan, job.outputs or (), microbatches, states, self._remote)

    def _read(self, job: Job, batch: Batch) -> MicroBatches:
        """The batch as the job takes it. Nothing is sent."""
        self._precision.check_surroundings()
        microbatches = self._ranks.reader(job).read(batch)
        if job.session is not None:
            job.session.check_rows(microbatches)
        return microbatches

    def _run(self, call: OneCall, job: Job, microbatches: MicroBatches, *, share: float = 1.0) -> StepResult:
        executors = self._ranks.executors(job)
        draw = self._draws + (job.session.num_steps if job.session is not None else 0)
        train, graph = job.work != "infer", self._setup.prepared[job.phase].graph
        loss_scale = self.loss_scale or 1.0

        def task(rank: int) -> None:
            executor = executors[rank]
            try:
                for replica in self._ranks.replicas[rank].values():
                    replica.train(train)
                    if train:
                        replica.enter(job.phase)
                with torch.set_grad_enabled(train), self._watched(job, rank, microbatches.given):
                    executor.run(microbatches, call=call.call, share=share, draw=draw, loss_scale=loss_scale)
            except NonFiniteError:
                raise  # every rank raises it by itself
            except BaseException as error:
                call.spread(executor.interrupted_at or error, rank)
                raise

        _, errors = self._workers.run(task)
        if errors:
            # What went wrong first, rather than what followed from it.
            raise next((error for error in errors if not isinstance(error, Aborted)), errors[0])
        first = executors[self._workers.ranks[0]]
        weights = {name: graph.layers[name].weight for name in graph.losses}
        verdict = first.state.verdict
        num_samples = microbatches.cut.num_samples
        scale = self.loss_scale if train else None
        result = StepResult(num_samples, dict(first.losses), weights, verdict.norm, verdict.skip, scale)
        if job.work in ("step", "measured"):
            self._end_step(result, overflow=verdict.overflow)
        return result

    def _end_step(self, result: StepResult, *, overflow: bool) -> None:
        """What follows from a step for the next."""
        if self._scaler is not None:
            self._scaler.update(overflow=overflow)
        if self._has_followers and not result.skipped:
            for replica in self._ranks.every_replica:
                replica.follow_loss(result.loss)

    def _watched(self, job: Job, rank: int, batch: Batch) -> AbstractContextManager[None]:
        if job.work != "measured":
            return nullcontext()
        read = self._ranks.executors(job)[rank].state.read_inputs
        return self._peaks[rank].watched(self._ranks.replicas[rank].values(), batch, read)

    # --- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters and persistent buffers, gathered from all stages, on every rank.

        Returns:
            CPU tensors by `<layer>.<name>`; a shared parameter stands once, under its first name.
        """
        with self._calls.one("state_dict", self._step, weights_alone=True) as call:
            call.meet()
            return gather_state(self.graph, self.plan, self._precision, self._ranks.replicas, self._remote)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes parameters and buffers, by the names that `state_dict` gives; on every rank.

        Optimizers keep their state. Gradients that wait for a step are of other weights, and let go of.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape or dtype differs, here or on another
                rank; nothing has changed on any.
        """
        with self._calls.one("load_state_dict", self._step, trains=True) as call:
            call.meet()
            together(
                self._meeting,
                "load the state",
                lambda: check_state(self.graph, state, self._precision.stored),
                CheckpointError,
            )
            for replica in self._ranks.every_replica:
                copy_into(replica.tensors(), state)
                replica.written()
            self._ranks.agree_on_weights()
            self._weights_loaded()

    def _weights_loaded(self) -> None:
        """Nothing that was made of the weights before is of use: gradients, decode sessions."""
        self._loads += 1
        self._open.stepped()
        for replica in self._ranks.every_replica:
            replica.drop_gradients()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, optimizer and scheduler state and the step count to a folder.

        Any plan for the same graph can load it. Gradients that wait for a step are not in it.
        Collective under `torchrun`: every rank calls it, with a path that all reach.
        """
        with self._calls.one("save", self._step, weights_alone=True) as call:
            call.meet()
            scale = None if self._scaler is None else self._scaler.state_dict()
            progress = Progress(self._step, self._draws, scale)
            checkpoint.save(path, self.graph, self._ranks.owned, progress, self._meeting)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save` wrote, under this or any other plan.

        Gradients that wait for a step are let go of. An engine without an optimizer takes the weights
        of any checkpoint; one with an optimizer takes those of the same optimizer and scheduler.
        Collective under `torchrun`.

        Raises:
            CheckpointError: files are missing or altered, or the checkpoint is another model's,
                optimizer's or scheduler's, or of other `parameter_groups`; nothing has changed.
        """
        with self._calls.one("load", self._step, trains=True) as call:
            call.meet()
            progress = checkpoint.load(path, self.graph, self._ranks.every_replica, self._meeting)
            self._weights_loaded()
            self._step, self._draws = progress.step, progress.calls
            if self._scaler is not None and progress.loss_scale is not None:
                self._scaler.load_state_dict(progress.loss_scale)

    @property
    def num_steps(self) -> int:
        """Training steps taken, those before a loaded checkpoint included."""
        return self._step

    @property
    def loss_scale(self) -> float | None:
        """What losses of the next step are multiplied by before backward; None without loss scaling."""
        return None if self._scaler is None else self._scaler.scale

    def measured(self) -> Measurement:
        """Median seconds of each stage and of an iteration over the steps so far.

        Collective under `torchrun`. Raises EngineError without `measure=True` or a step.
        """
        with self._calls.one("measured", self._step, weights_alone=True) as call:
            self._recorder.check()
            call.meet()
            return self._recorder.summary(self._remote)

    def close(self) -> None:
        """Ends the ranks' threads and lets go of process groups. The engine is of no use after."""
        self._close(None)

    def _close(self, because: BaseException | None) -> None:
        self._calls.close(because)
        self._workers.close()
        if self._remote is not None:
            self._remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)
