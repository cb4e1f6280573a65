"""The engine: a graph, a plan and weights, and what one does with them.

It builds each rank's stages, has the plan proved, and hands batches to the executors. Where
ranks are threads of this process it holds all of them; under `torchrun` it holds one, and every
rank makes the same calls with the same batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Literal, NamedTuple, Self, overload

import torch
from torch import Tensor

from pipeflow.arrivals import known_arrivals
from pipeflow.errors import BatchError, EngineError, LayerFailure, NonFiniteError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.program import Mode, Send, Step
from pipeflow.runtime import checkpoint
from pipeflow.runtime.binding import Binder
from pipeflow.runtime.checkpoint import Progress
from pipeflow.runtime.copies import find_copies
from pipeflow.runtime.decoding import DecodeSession, check_decoding, decoding_callables
from pipeflow.runtime.distributed import DistributedTransport, connect, is_launched
from pipeflow.runtime.executor import Executor
from pipeflow.runtime.gradients import GradientPolicy, NonFinite
from pipeflow.runtime.loss_scale import LossScaler
from pipeflow.runtime.measurement import Measurement, Recorder
from pipeflow.runtime.microbatch import Batch, BatchReader, MicroBatches
from pipeflow.runtime.optimizers import follows_loss
from pipeflow.runtime.parameter_groups import ParameterGroups, check_groups
from pipeflow.runtime.peak_bytes import PeakBytes
from pipeflow.runtime.phases import OpenPhase, for_each_phase
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.predictions import check_outputs, gather_outputs
from pipeflow.runtime.prepared import in_types, prepare
from pipeflow.runtime.rank_state import RankState, StageState
from pipeflow.runtime.recompute import fuse_runs
from pipeflow.runtime.replica import OptimizerFactory, SchedulerFactory, StageReplica
from pipeflow.runtime.result import StepResult
from pipeflow.runtime.running_statistics import BatchNormChoice, check_choice
from pipeflow.runtime.stage import compile_stage
from pipeflow.runtime.state import copy_into, needed_layers
from pipeflow.runtime.threads import Exchange, ThreadTransport
from pipeflow.runtime.transport import Aborted, Transport
from pipeflow.runtime.workers import Workers

TransportKind = Literal["auto", "threads", "distributed"]
Work = Literal["step", "measured", "accumulate", "infer"]
"""A "measured" step has its bytes counted, and is slower for it."""


class _Job(NamedTuple):
    """What is run: programs are bound once for each.

    Attributes:
        phase: of the graph; None for all of it.
        outputs: the tensors to keep of a prediction; None for no prediction.
        session: of decoding, with states of its own.
    """

    work: Work
    phase: str | None = None
    outputs: tuple[str, ...] | None = None
    session: DecodeSession | None = None


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
            `{"*.bias": {"weight_decay": 0.0}}`; the first pattern that fits `<layer>.<name>` holds.
        clip_norm: scale gradients so that their norm over the whole model is at most this.
        clip_value: cut every element of the gradients to this absolute value, after `clip_norm`.
        nonfinite: where a loss or gradient is infinite or no number, "ignore" it as torch does,
            "raise" NonFiniteError on every rank, or "skip" the step on every rank.
        batch_norm: when running statistics of torch's norms move: after each "microbatch", as they do
            on one device; or "deferred", once a batch, by the statistics of all of it. What norms
            divide by is a micro-batch's own either way.
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
        PlanMismatch: the ranks hold different plans.
        EngineError: a device is not there, or the job has another number of ranks than the plan.
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
        self._prepared = prepare(graph, plan)
        self.graph = graph
        self.plan = plan
        self._copies = find_copies(graph, plan)
        self._measure = measure
        self._step = 0
        self._loads = 0
        self._calls = 0  # of `accumulate` and `step`: random layers draw anew in each
        self._failed: str | None = None
        self._optimizers = for_each_phase(graph, optimizer, "optimizer")
        self._schedulers = for_each_phase(graph, lr_scheduler, "lr_scheduler")
        self._open = OpenPhase(graph)
        self._precision = precision or Precision()
        self._batch_norm = check_choice(batch_norm)
        scale = self._precision.loss_scale
        self._scaler = None if scale is None else LossScaler(scale)
        self._policy = GradientPolicy(
            clip_norm=clip_norm, clip_value=clip_value, nonfinite=nonfinite, loss_scaled=scale is not None
        )
        groups = check_groups(parameter_groups, graph.parameters)
        self._distributed = transport == "distributed" or (transport == "auto" and is_launched())
        self._devices = _resolve_devices(plan, devices, distributed=self._distributed)
        self._numerics = self._precision.numerics_on(self._devices)
        self._prepared = in_types(self._prepared, self._numerics)
        self._exchange = Exchange(plan.num_ranks, plan.placement)
        self._remote: DistributedTransport | None = None
        ranks = tuple(range(plan.num_ranks))
        if self._distributed:
            self._remote = self._join(seed)
            ranks = (self._remote.rank,)
        self._workers = Workers(ranks, num_threads=num_threads)
        self._replicas = {rank: self._build_rank(rank, groups, seed) for rank in ranks}
        every = [replica for held in self._replicas.values() for replica in held.values()]
        self._has_followers = any(follows_loss(t.scheduler) for r in every for t in r.training_by_phase.values())
        self._executors: dict[_Job, dict[int, Executor]] = {}
        self._readers: dict[_Job, BatchReader] = {}
        self._recorder = Recorder(plan, self._prepared[None].peak_bytes_by_rank)
        self._peaks = {rank: PeakBytes(self._devices[rank]) for rank in ranks}
        if self._remote is not None:
            self._agree_on_weights(self._remote)

    # --- setting up -----------------------------------------------------------------------

    def _join(self, seed: int) -> DistributedTransport:
        connect()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if world_size != self.plan.num_ranks:
            raise EngineError(
                f"the job has {world_size} ranks and the plan {self.plan.num_ranks}; start with "
                f"--nproc-per-node {self.plan.num_ranks}, or plan for {world_size} devices"
            )
        channels = sorted(
            {
                (source, action.peer)
                for prepared in self._prepared.values()
                for program in prepared.programs.values()
                for source, actions in enumerate(program.actions_by_rank)
                for action in actions
                if isinstance(action, Send)
            }
        )
        settings = json.dumps(
            [
                self.plan.digest,
                self.graph.digest,
                seed,
                bool(self._optimizers),
                self._precision.digest,
                self._batch_norm,
            ]
        )
        return DistributedTransport(
            self.plan.placement,
            channels,
            dict(self._prepared[None].graph.specs),
            sharing=self._copies.ranks_by_stages(self.plan.placement),
            digest=hashlib.sha256(settings.encode()).hexdigest(),
            device=self._devices[rank],
        )

    def _build_rank(self, rank: int, groups: ParameterGroups, seed: int) -> dict[int, StageReplica]:
        replicas = {}
        for index, stage in enumerate(self.plan.stages):
            if rank in stage.devices:
                replicas[index] = StageReplica(
                    self.graph, stage.layers, device=self._devices[rank], seed=seed, precision=self._precision
                )
                self._copies.mark(replicas[index], index)
                replicas[index].record_statistics(self.graph, self._batch_norm, num_replicas=stage.num_replicas)
                for phase, optimizer in self._optimizers.items():
                    replicas[index].make_optimizer(optimizer, self._schedulers.get(phase), groups, phase)
        return replicas

    def _agree_on_weights(self, remote: DistributedTransport) -> None:
        """Every replica starts from the weights of its stage's first, as each rank built its own."""
        for index, stage in enumerate(self.plan.stages):
            if stage.num_replicas > 1 and remote.rank in stage.devices:
                replica = self._replicas[remote.rank][index]
                for tensor in replica.tensors().values():
                    remote.broadcast_in_stage(tensor, index)
                replica.written()
        self._copies.agree(self.graph, self.plan.placement, self._replicas[remote.rank], remote, self._precision)

    def _executor(self, job: _Job) -> dict[int, Executor]:
        """The bound programs of the local ranks; for predictions, cut down to what they need."""
        if job not in self._executors:
            executors = self._executors[job] = {rank: self._bind(job, rank) for rank in self._workers.ranks}
            required = frozenset().union(*(executor.state.required_inputs for executor in executors.values()))
            self._readers[job] = BatchReader(self.graph, self._layers(job), required, self.plan.num_microbatches)
        return self._executors[job]

    def _layers(self, job: _Job) -> frozenset[str]:
        """What runs, on any rank."""
        graph = self._prepared[job.phase].graph
        return frozenset(graph.layers) if job.outputs is None else needed_layers(graph, job.outputs)

    def _bind(self, job: _Job, rank: int) -> Executor:
        work, phase, outputs, session = job
        train, prepared = work != "infer", self._prepared[phase]
        graph, program = prepared.graph, prepared.programs[Mode.TRAIN if train else Mode.INFER]
        layers = self._layers(job)
        stages = {}
        for index, replica in self._replicas[rank].items():
            names = [layer for layer in replica.layers if layer in layers]
            callables, keyed = replica.callables if session is None else decoding_callables(graph, replica)
            functions = {name: self._numerics.wrapped(function) for name, function in callables.items()}
            compiled = compile_stage(graph, index, names, prepared.flows, functions, train=train)
            stages[index] = StageState(compiled, replica, keyed_layers=keyed)
        for index, stage in stages.items() if train else ():
            fuse_runs(stage.compiled, self.plan.stages[index].recompute, prepared.flows, stage.replica.modules)
        device = self._devices[rank]
        transport: Transport = self._remote or ThreadTransport(self._exchange, rank, device, copies=work == "measured")
        binder = Binder(
            rank=rank,
            state=RankState(graph, stages, self.plan.num_microbatches, device),
            transport=transport,
            placement=self.plan.placement,
            flow_by_tensor=prepared.flows,
            carried=frozenset((t, self.plan.stage_by_layer[n]) for n in layers for t in graph.layers[n].inputs),
            keep=outputs or (),
            train=train,
            reduces=work != "accumulate",
            shared=self._copies.names_by_stages,
        )
        actions = program.actions_by_rank[rank] if rank < program.num_ranks else ()
        if work == "accumulate":
            actions = tuple(action for action in actions if not isinstance(action, Step))
        owned = {
            name: parameter
            for index, replica in self._replicas[rank].items()
            if self.plan.stages[index].devices[0] == rank
            for name, parameter in replica.parameters.items()
            if name not in replica.borrowed
        }
        policy = self._policy if work in ("step", "measured") else None
        return Executor(
            actions,
            binder,
            policy=policy,
            owned=owned,
            names=tuple(self.graph.parameters),
            measure=self._measure and work == "step",
            arrived=known_arrivals(program, lambda a: bool(binder.messages.sent(a.route, a.microbatch)))[rank]
            if actions
            else (),
        )

    # --- running --------------------------------------------------------------------------

    def accumulate(self, batch: Batch, *, share: float = 1.0, phase: str | None = None) -> StepResult:
        """Adds a batch's gradients to those of the next `step`: forward and backward alone.

        Gradients are summed over replicas once, in that step. Arguments, result and errors as
        `step`; for the mean over K batches, give each call and the step a share of 1 / K.
        """
        self._check_trainable(share, phase)
        result = self._run(_Job("accumulate", phase), batch, share=share)[0]
        self._open.accumulated(phase)
        self._calls += 1
        return result

    def _check_trainable(self, share: float, phase: str | None) -> None:
        if not self._optimizers:
            raise EngineError("this engine has no optimizer and cannot train; pass optimizer=")
        if not 0 < share < float("inf"):
            raise EngineError(f"share={share}; it is what a batch's gradients count, a number above 0")
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
        self._check_trainable(share, phase)
        job = _Job(self._step_work(batch, phase), phase)
        start = time.perf_counter()
        try:
            result = self._run(job, batch, share=share)[0]
        except NonFiniteError:
            self._open.stepped()  # its gradients are let go of
            raise
        self._open.stepped()
        if job.work == "measured":
            self._recorder.record_peaks({rank: peak.bytes for rank, peak in self._peaks.items()})
        elif self._measure:
            spans = {rank: executor.spans for rank, executor in self._executor(job).items()}
            self._recorder.record(spans, time.perf_counter() - start)
        self._step += 1
        self._calls += 1
        return result

    def _step_work(self, batch: Batch, phase: str | None) -> Work:
        """How to step: with bytes counted, if that is wanted and the batch is the one that is planned for."""
        if not self._measure or phase is not None or not self._recorder.wants_peaks:
            return "step"
        job = _Job("step", phase)
        self._executor(job)
        cut = self._check_batch(job, batch).cut
        return "measured" if cut.even and cut.num_samples == self.plan.batch_size else "step"

    def evaluate(self, batch: Batch, *, phase: str | None = None) -> StepResult:
        """The losses of a batch with the layers in evaluation mode; nothing is trained.

        Args:
            batch: as for `step`.
            phase: of this phase's losses alone; by default all.

        Errors as `step`.
        """
        if phase is not None:
            self._open.check_name(phase)
        return self._run(_Job("infer", phase), batch)[0]

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
        names = tuple(self.graph.outputs if outputs is None else outputs)
        check_outputs(self.graph, names, whole=isinstance(batch, Mapping))
        return self._predict(_Job("infer", outputs=names), batch)

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
        names = tuple(self.graph.outputs if outputs is None else outputs)
        check_outputs(self.graph, names, whole=True)
        check_decoding(self.graph, names, batch_size)
        weights = self._weights

        def run(session: DecodeSession, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if self._weights != weights:
                raise EngineError(
                    "the weights have changed since this decode session was opened, and what it remembers is of those "
                    "before; open another"
                )
            return self._predict(_Job("infer", outputs=names, session=session), batch)  # type: ignore[return-value]

        def end(session: DecodeSession) -> None:
            job = _Job("infer", outputs=names, session=session)
            self._executors.pop(job, None)
            self._readers.pop(job, None)

        return DecodeSession(batch_size, run, end)

    @property
    def _weights(self) -> tuple[int, int]:
        """Changes when weights may have."""
        return self._calls, self._loads

    def _predict(self, job: _Job, batch: Batch) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        microbatches = self._run(job, batch)[1]
        states = {rank: executor.state for rank, executor in self._executor(job).items()}
        return gather_outputs(self.graph, self.plan, job.outputs or (), microbatches, states, self._remote)

    def _run(self, job: _Job, batch: Batch, *, share: float = 1.0) -> tuple[StepResult, MicroBatches]:
        if self._failed:
            raise EngineError(f"this engine cannot run any more: {self._failed}; make a new one")
        self._precision.check_surroundings()
        executors = self._executor(job)
        microbatches = self._check_batch(job, batch)
        draw = self._calls + (job.session.num_steps if job.session is not None else 0)
        train, graph = job.work != "infer", self._prepared[job.phase].graph
        loss_scale = self.loss_scale or 1.0

        def task(rank: int) -> None:
            for replica in self._replicas[rank].values():
                replica.train(train)
                if train:
                    replica.enter(job.phase)
            try:
                with torch.set_grad_enabled(train), self._watched(job, rank, batch):
                    executors[rank].run(microbatches, step=self._step, share=share, draw=draw, loss_scale=loss_scale)
            except NonFiniteError:
                raise  # every rank raises it by itself
            except BaseException as error:
                self._spread(error)
                raise

        _, errors = self._workers.run(task)
        if errors:
            self._raise(errors)
        first = executors[self._workers.ranks[0]]
        weights = {name: graph.layers[name].weight for name in graph.losses}
        verdict = first.state.verdict
        num_samples = microbatches.cut.num_samples
        scale = self.loss_scale if train else None
        result = StepResult(num_samples, dict(first.losses), weights, verdict.norm, verdict.skip, scale)
        if job.work in ("step", "measured"):
            self._end_step(result, overflow=verdict.overflow)
        return result, microbatches

    def _end_step(self, result: StepResult, *, overflow: bool) -> None:
        """What follows from a step for the next."""
        if self._scaler is not None:
            self._scaler.update(overflow=overflow)
        if self._has_followers and not result.skipped:
            for replicas in self._replicas.values():
                for replica in replicas.values():
                    replica.follow_loss(result.loss)

    def _watched(self, job: _Job, rank: int, batch: Batch) -> AbstractContextManager[None]:
        if job.work != "measured":
            return nullcontext()
        read = self._executor(job)[rank].state.read_inputs
        return self._peaks[rank].watched(self._replicas[rank].values(), batch, read)

    def _check_batch(self, job: _Job, batch: Batch) -> MicroBatches:
        try:
            microbatches = self._readers[job].read(batch)
            if job.session is not None:
                job.session.check_rows(microbatches)
            return microbatches
        except BatchError as error:
            if self._remote is not None:
                self._spread(_batch_failure(error, self._remote.rank, self._step))
                self._failed = f"a batch was refused: {error}"
            raise

    def _spread(self, error: BaseException) -> None:
        """Lets every other rank know, so that none waits for this one."""
        if self._remote is None:
            self._exchange.abort()
        elif isinstance(error, LayerFailure):
            self._remote.report(error)
        else:
            self._remote.abort()

    def _raise(self, errors: list[BaseException]) -> None:
        """Raises what went wrong first, rather than what followed from it."""
        own = [e for e in errors if not isinstance(e, Aborted)]
        error = own[0] if own else errors[0]
        if isinstance(error, NonFiniteError):
            raise error
        self._failed = str(error)
        if isinstance(error, Aborted):
            reported = None if self._remote is None else self._remote.failure()
            rank = -1 if self._remote is None else self._remote.rank
            raise reported or LayerFailure(
                rank=rank,
                stage=None,
                layer=None,
                microbatch=None,
                step=self._step,
                phase="transport",
                original=f"a peer is gone or sent something else than planned: {error}",
            ) from None
        raise error

    # --- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters and persistent buffers, gathered from all stages, on every rank.

        Returns:
            CPU tensors by `<layer>.<name>`; a shared parameter stands once, under its first name.
        """
        result = {}
        for name, spec in {**self.graph.parameters, **self.graph.buffers}.items():
            stage = self.plan.stage_by_layer[self.graph.owner(name)]
            owner = self.plan.stages[stage].devices[0]
            own = self._replicas[owner][stage].tensors()[name] if owner in self._replicas else None
            if self._remote is None:
                assert own is not None
                result[name] = own.detach().to("cpu", copy=True)
            else:
                result[name] = self._remote.give_shaped(
                    own, spec.shape_at(1), self._precision.stored(spec), owner
                ).cpu()
        return result

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes parameters and buffers, by the names that `state_dict` gives; on every rank.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape or dtype differs.
        """
        names = (*self.graph.parameters, *self.graph.buffers)
        self._loads += 1
        for replicas in self._replicas.values():
            for replica in replicas.values():
                copy_into(replica.tensors(), state, names)
                replica.written()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, optimizer and scheduler state and the step count to a folder.

        Any plan for the same graph can load it. Gradients that wait for a step are not in it.
        Collective under `torchrun`: every rank calls it, with a path that all reach.
        """
        scale = None if self._scaler is None else self._scaler.state_dict()
        checkpoint.save(path, self.graph, self._owned(), Progress(self._step, self._calls, scale))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save` wrote, under this or any other plan.

        Raises:
            CheckpointError: files are missing or altered, or the checkpoint is another model's.
        """
        self._loads += 1
        replicas = [replica for held in self._replicas.values() for replica in held.values()]
        progress = checkpoint.load(path, self.graph, replicas)
        self._step, self._calls = progress.step, progress.calls
        if self._scaler is not None and progress.loss_scale is not None:
            self._scaler.load_state_dict(progress.loss_scale)

    def _owned(self) -> list[StageReplica]:
        """The stages whose first replica is here: those that this process saves."""
        return [
            replica
            for rank, replicas in self._replicas.items()
            for index, replica in replicas.items()
            if self.plan.stages[index].devices[0] == rank
        ]

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
        return self._recorder.summary(self._remote)

    def close(self) -> None:
        """Ends the ranks' threads and lets go of process groups. The engine is of no use after."""
        self._failed = self._failed or "it is closed"
        self._workers.close()
        if self._remote is not None:
            self._remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _resolve_devices(
    plan: Plan, devices: Sequence[torch.device | str] | None, *, distributed: bool
) -> tuple[torch.device, ...]:
    """A torch device for each rank. One process per GPU under `torchrun`, else as the cluster names them."""
    if devices is not None:
        if len(devices) != plan.num_ranks:
            raise EngineError(f"{len(devices)} devices for {plan.num_ranks} ranks; give one for each")
        return tuple(torch.device(d) for d in devices)
    resolved = []
    for rank in range(plan.num_ranks):
        if plan.cluster.devices[rank].kind != "cuda":
            resolved.append(torch.device("cpu"))
            continue
        count = torch.cuda.device_count()
        if not count or (rank >= count and not distributed):
            raise EngineError(
                f"rank {rank} is on {plan.cluster.devices[rank].name!r} and this machine has {count} CUDA devices; "
                "plan for the devices there are, or pass devices="
            )
        local = int(os.environ.get("LOCAL_RANK", rank)) if distributed else rank
        resolved.append(torch.device("cuda", local % count))
    return tuple(resolved)


def _batch_failure(error: BatchError, rank: int, step: int) -> LayerFailure:
    return LayerFailure(
        rank=rank,
        stage=None,
        layer=None,
        microbatch=None,
        step=step,
        phase="batch",
        original=f"BatchError: {error}",
    )
