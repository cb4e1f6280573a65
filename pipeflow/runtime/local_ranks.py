"""The ranks that this process holds: their weights, and their programs bound once for each job.

In one process that is all of them; under `torchrun` one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeflow.arrivals import known_arrivals
from pipeflow.program import Mode, Offload, Step
from pipeflow.runtime.binding import Binder
from pipeflow.runtime.decoding import decoding_callables
from pipeflow.runtime.distributed import DistributedTransport
from pipeflow.runtime.executor import Executor
from pipeflow.runtime.job import Job
from pipeflow.runtime.losses import class_weights
from pipeflow.runtime.meeting import check_same, together
from pipeflow.runtime.microbatch import BatchReader
from pipeflow.runtime.offload import HostStore
from pipeflow.runtime.optimizer_state import training_settings
from pipeflow.runtime.prepared import lockstep_stages
from pipeflow.runtime.randomness import take_turns_in_backward
from pipeflow.runtime.rank_state import RankState, StageState
from pipeflow.runtime.recompute import fuse_runs
from pipeflow.runtime.replica import StageReplica
from pipeflow.runtime.setup import Setup
from pipeflow.runtime.stage import compile_stage
from pipeflow.runtime.state import needed_layers
from pipeflow.runtime.threads import Exchange, ThreadTransport
from pipeflow.runtime.transport import Transport


class LocalRanks:
    """Stage replicas and executors of the local ranks. Collective where there is a remote transport.

    Args:
        setup: the engine's settings.
        ranks: those of this process.
        exchange: between the ranks of one process.
        remote: between processes; None where there is one.

    Attributes:
        replicas: by rank and stage.

    Raises:
        Exception: what an optimizer's or scheduler's factory, or building a layer raised.
        EngineError: that happened on another rank.
        PlanMismatch: the ranks' factories made different optimizers or schedulers.
    """

    def __init__(
        self, setup: Setup, ranks: Sequence[int], exchange: Exchange, remote: DistributedTransport | None
    ) -> None:
        if len(ranks) > 1:
            take_turns_in_backward()
        self.ranks = tuple(ranks)
        self._setup = setup
        self._exchange = exchange
        self._remote = remote
        self._executors: dict[Job, dict[int, Executor]] = {}
        self._readers: dict[Job, BatchReader] = {}
        meeting = None if remote is None else remote.meeting
        self.replicas = together(meeting, "make the engine", lambda: {rank: self._build(rank) for rank in self.ranks})
        if remote is not None:
            check_same(remote.meeting, training_settings(self.every_replica))
            try:
                self.agree_on_weights()
            except BaseException as error:  # others are in the middle of it
                remote.abandon(error)
                raise

    @property
    def every_replica(self) -> list[StageReplica]:
        """Of all local ranks."""
        return [replica for held in self.replicas.values() for replica in held.values()]

    @property
    def owned(self) -> list[StageReplica]:
        """The stages whose first replica is here: those that this process saves."""
        return [
            replica
            for rank, replicas in self.replicas.items()
            for index, replica in replicas.items()
            if self._setup.plan.stages[index].devices[0] == rank
        ]

    def _build(self, rank: int) -> dict[int, StageReplica]:
        setup, replicas = self._setup, {}
        for index, stage in enumerate(setup.plan.stages):
            if rank in stage.devices:
                replicas[index] = StageReplica(
                    setup.graph, stage.layers, device=setup.devices[rank], seed=setup.seed, precision=setup.precision
                )
                setup.copies.mark(replicas[index], index)
                replicas[index].record_statistics(setup.graph, setup.batch_norm, num_replicas=stage.num_replicas)
                for phase, optimizer in setup.optimizers.items():
                    replicas[index].make_optimizer(optimizer, setup.schedulers.get(phase), setup.groups, phase)
        return replicas

    def agree_on_weights(self) -> None:
        """Every replica takes the weights of its stage's first: each rank has built, or was given, its own."""
        remote = self._remote
        if remote is None:
            return
        for index, stage in enumerate(self._setup.plan.stages):
            if stage.num_replicas > 1 and remote.rank in stage.devices:
                replica = self.replicas[remote.rank][index]
                for tensor in replica.tensors().values():
                    remote.broadcast_in_stage(tensor, index)
                replica.written()
        self._setup.copies.agree(
            self._setup.graph, self._setup.plan.placement, self.replicas[remote.rank], remote, self._setup.precision
        )

    def executors(self, job: Job) -> dict[int, Executor]:
        """The bound programs of the local ranks; for predictions, cut down to what they need."""
        if job not in self._executors:
            executors = self._executors[job] = {rank: self._bind(job, rank) for rank in self.ranks}
            required = frozenset().union(*(executor.state.required_inputs for executor in executors.values()))
            modules = {name: m for replica in self.every_replica for name, m in replica.modules.items()}
            self._readers[job] = BatchReader(
                self._setup.graph,
                self._layers(job),
                required,
                self._setup.plan.num_microbatches,
                class_weights(self._setup.graph, modules),
                all_count=job.work != "infer" and self._waits,
            )
        return self._executors[job]

    @property
    def _waits(self) -> bool:
        """Whether replicas wait for each other in backward."""
        setup = self._setup
        return setup.batch_norm == "synchronised" and bool(lockstep_stages(setup.graph, setup.plan))

    def reader(self, job: Job) -> BatchReader:
        """What reads the batches of a job."""
        self.executors(job)
        return self._readers[job]

    def forget(self, job: Job) -> None:
        """Lets go of a job's programs."""
        self._executors.pop(job, None)
        self._readers.pop(job, None)

    def _layers(self, job: Job) -> frozenset[str]:
        """What runs, on any rank."""
        graph = self._setup.prepared[job.phase].graph
        return frozenset(graph.layers) if job.outputs is None else needed_layers(graph, job.outputs)

    def _bind(self, job: Job, rank: int) -> Executor:
        work, phase, outputs, session = job
        setup = self._setup
        train, prepared = work != "infer", setup.prepared[phase]
        graph, program = prepared.graph, prepared.programs[Mode.TRAIN if train else Mode.INFER]
        layers = self._layers(job)
        stages = {}
        for index, replica in self.replicas[rank].items():
            names = [layer for layer in replica.layers if layer in layers]
            callables, keyed = replica.callables if session is None else decoding_callables(graph, replica)
            functions = {name: setup.numerics.wrapped(function) for name, function in callables.items()}
            compiled = compile_stage(graph, index, names, prepared.flows, functions, train=train)
            stages[index] = StageState(compiled, replica, keyed_layers=keyed)
        actions = program.actions_by_rank[rank] if rank < program.num_ranks else ()
        offloaded = frozenset((a.stage, a.microbatch) for a in actions if isinstance(a, Offload))
        for index in {index for index, _ in offloaded}:
            stages[index].store = _offload_calls(stages[index], setup.plan.offload_set)
        for index, stage in stages.items() if train else ():
            fuse_runs(stage.compiled, setup.plan.stages[index].recompute, prepared.flows, stage.replica.modules)
        device = setup.devices[rank]
        transport: Transport = self._remote or ThreadTransport(self._exchange, rank, device, copies=work == "measured")
        binder = Binder(
            rank=rank,
            state=RankState(graph, stages, setup.plan.num_microbatches, device),
            transport=transport,
            placement=setup.plan.placement,
            flow_by_tensor=prepared.flows,
            carried=frozenset((t, setup.plan.stage_by_layer[n]) for n in layers for t in graph.layers[n].inputs),
            keep=outputs or (),
            train=train,
            reduces=work != "accumulate",
            shared=setup.copies.names_by_stages,
            offloaded=offloaded,
        )
        if work == "accumulate":
            actions = tuple(action for action in actions if not isinstance(action, Step))
        owned = {
            name: parameter
            for index, replica in self.replicas[rank].items()
            if setup.plan.stages[index].devices[0] == rank
            for name, parameter in replica.parameters.items()
            if name not in replica.borrowed
        }
        policy = setup.policy if work in ("step", "measured") else None
        return Executor(
            actions,
            binder,
            policy=policy,
            owned=owned,
            names=tuple(setup.graph.parameters),
            measure=setup.measure and work == "step",
            arrived=known_arrivals(program, lambda a: bool(binder.messages.sent(a.route, a.microbatch)))[rank]
            if actions
            else (),
        )


def _offload_calls(stage: StageState, offload: frozenset[str]) -> HostStore:
    """Lets the calls of offloaded layers save in a store, which is returned. Before they are fused to runs."""
    replica, compiled = stage.replica, stage.compiled
    state = [t for module in replica.modules.values() for t in (*module.parameters(), *module.buffers())]
    store = HostStore(replica.device, state)
    compiled.calls = [
        replace(call, run=store.wrapped(call.run)) if call.layer.name in offload else call for call in compiled.calls
    ]
    compiled.work = [call.run for call in compiled.calls]
    return store
