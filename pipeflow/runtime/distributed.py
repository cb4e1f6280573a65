"""The transport over `torch.distributed`: gloo on CPUs, NCCL on GPUs, launched by `torchrun`.

One rank is one process. Data, gradient sums and agreement between ranks travel in process
groups of their own, so that none waits behind another. Object collectives are not used: they
unpickle what arrives.

Over gloo, what goes to higher ranks and what goes to lower ones use two groups [3]: a connection
has a lock, and gloo's thread spins on it when data arrives while the rank's own thread, which posts
a send, holds it and is not running. On two cores that took half of a step of small layers.

Messages are tagged with the call that they belong to (`pipeflow.runtime.call`), so that ranks which
are asked for different things never take each other's data but wait; a watch on each rank, which
costs a step nothing, then compares what they are asked for and breaks the groups [2].

When a rank fails it writes what happened to the store and breaks its groups; its peers' waits
then raise within milliseconds, they read the record, and break theirs in turn. gloo has no call
to break a group, but a receive that times out closes all connections of its group [1].
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from pipeflow.errors import EngineError, LayerFailure
from pipeflow.execution_plan import Plan
from pipeflow.graphs.tensor_spec import TensorSpec
from pipeflow.program import Direction, Placement, Receive, Route
from pipeflow.runtime.board import Board
from pipeflow.runtime.call import Call
from pipeflow.runtime.channels import Channel, Posted, Sent, wait_for
from pipeflow.runtime.cut import LengthPairs, even_cut
from pipeflow.runtime.meeting import Meeting
from pipeflow.runtime.transport import Aborted, Payload
from pipeflow.runtime.watch import Watch

_POSTED_AHEAD = 4  # receives posted per channel; gloo moves no data before the receiver has posted
_ABORT_TAG = (1 << 31) - 1
_SHARE_TAG = 1 << 29  # added to a call's, which are below
_EXCHANGE_TAG = 1 << 30
_DIRECT_RANKS = 8  # up to so many ranks share losses directly, more by an all-reduce
_REMEMBERED = 1 << 16  # shapes that are kept; then all are worked out anew
_RECORD_WAIT = 2.0  # seconds to look for the record of a peer's failure


def is_launched() -> bool:
    """Whether this process is one rank of several, started by `torchrun` or with a process group."""
    return dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1)


def connect(backend: str | None = None) -> None:
    """Joins the process group that `torchrun` describes in the environment, once.

    On one machine, sockets stay on the loopback interface. Keys in the store are prefixed by
    the restart count, so that a restarted job never reads what the one before it left.

    Args:
        backend: "gloo" or "nccl"; by default NCCL where CUDA is available.

    Raises:
        EngineError: the environment does not describe a group.
    """
    if dist.is_initialized():
        return
    missing = [v for v in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise EngineError(f"{missing[0]} is not set, so there is no process group to join; start with torchrun")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    agent_holds_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agent_holds_store,
    )
    store = PrefixStore(f"pipeflow/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    name = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(name, store=store, rank=rank, world_size=world_size)


def share_text(text: str | None, *, source: int = 0) -> str:
    """Gives every rank the text that rank `source` has, as uint8 tensors."""
    payload = torch.tensor(list((text or "").encode()), dtype=torch.uint8)
    size = torch.tensor([payload.numel()])
    group = dist.new_group(backend="gloo")
    dist.broadcast(size, source, group=group)
    if dist.get_rank() != source:
        payload = torch.empty(int(size), dtype=torch.uint8)
    if int(size):
        dist.broadcast(payload, source, group=group)
    dist.destroy_process_group(group)
    return bytes(payload.tolist()).decode()


def share_plan(plan: Plan | None, *, source: int = 0) -> Plan:
    """Gives every rank the plan of rank `source`; the others pass None.

    Costs measured on each rank differ, so plans made on each rank would too. A schedule of one's own
    must be imported on every rank: none imports what another's plan names.
    """
    if dist.get_rank() == source and plan is None:
        raise EngineError(f"rank {source} shares its plan and has None; plan there before")
    return Plan.model_validate_json(share_text(plan.model_dump_json() if plan else None, source=source))


class DistributedTransport:
    """This process's end. Making one is collective: every rank does, with the same arguments.

    Args:
        placement: ranks of each stage's replicas.
        channels: (source, target) of every directed pair of ranks that talk, sorted.
        specs: of every tensor of the graph.
        sharing: by stages that hold copies of parameters, the ranks of all their replicas.
        meeting: of all ranks, which hold the same settings.
        device: where this rank computes.
    """

    def __init__(
        self,
        placement: Placement,
        channels: Sequence[tuple[int, int]],
        specs: dict[str, TensorSpec],
        *,
        sharing: Mapping[tuple[int, ...], tuple[int, ...]],
        meeting: Meeting,
        device: torch.device,
    ) -> None:
        self.rank = dist.get_rank()
        self._placement = placement
        self._specs = specs
        self._device = device
        self.meeting = meeting
        self._control = meeting.group
        store = PrefixStore("engines", dist.distributed_c10d._get_default_store())
        # An engine that follows a failed one must not read its record.
        own = PrefixStore(str(store.add(f"engines of rank {self.rank}", 1)), store)
        self.board = Board(own, self.rank, meeting.num_ranks)
        self._up, self._down = (dist.new_group(backend="gloo") for _ in range(2))  # [3]
        self._data: dict[tuple[int, int], Any] = {}
        backend = "nccl" if device.type == "cuda" else "gloo"
        for source, target in channels:
            # NCCL runs a communicator's calls one after another: each channel needs its own.
            nccl = dist.new_group(sorted((source, target)), backend=backend) if backend == "nccl" else None
            self._data[source, target] = nccl or self._towards(source, target)
        self._reduce = {s: dist.new_group(sorted(r), backend=backend) for s, r in enumerate(placement) if len(r) > 1}
        self._shared = {
            stages: dist.new_group(ranks, backend=backend) for stages, ranks in sharing.items() if len(ranks) > 1
        }
        self._world = dist.new_group(backend=backend) if backend == "nccl" else self._up
        self._channels: dict[int, Channel] = {}
        self._cut = even_cut(0, 1)
        self._may_lack = False
        self._tag = 0
        self._lock = threading.Lock()  # the watch may break groups while the rank's own thread closes them
        self._is_closed = False
        self.watch = Watch(self.board, self.rank, self.report)  # [2]
        self._layouts: dict[tuple[str, int, LengthPairs], tuple[tuple[int, ...], torch.dtype]] = {}
        self._sent: dict[int, deque[Sent]] = {}

    def _towards(self, source: int, target: int) -> Any:
        return self._up if source < target else self._down

    # --- payloads -------------------------------------------------------------------------

    def _layout(self, name: str, microbatch: int) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of a payload entry for a micro-batch of the step."""
        size, lengths = self._cut.sizes[microbatch], self._cut.lengths[microbatch]
        key = (name, size, lengths)
        if key not in self._layouts:
            if len(self._layouts) >= _REMEMBERED:
                self._layouts.clear()
            spec = self._specs[name.partition("#")[0]]
            self._layouts[key] = (spec.shape_at(size, dict(lengths)), getattr(torch, spec.dtype))
        return self._layouts[key]

    def _zeros(self, name: str, microbatch: int) -> Tensor:
        shape, dtype = self._layout(name, microbatch)
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def begin(self, receives: Sequence[Receive], call: Call, arrived: Sequence[int], *, may_lack: bool = False) -> None:
        assert call.cut is not None
        self._may_lack = may_lack
        self._cut = call.cut
        self._tag = call.tag
        self._channels = {}
        for receive, count in zip(receives, arrived or [0] * len(receives), strict=True):
            channel = self._channels.setdefault(receive.peer, Channel())
            channel.waiting.append(receive)
            channel.arrived.append(count)
        for channel in self._channels.values():
            for _ in range(_POSTED_AHEAD):
                self._post(channel)

    def _post(self, channel: Channel) -> None:
        if not channel.waiting:
            return
        receive = channel.waiting.popleft()
        group = self._data[receive.peer, self.rank]
        peer = dist.get_group_rank(group, receive.peer)
        if not self._cut.sizes[receive.microbatch]:
            empty = torch.empty(1, device=self._device)
            channel.posted.append(Posted([group.recv([empty], peer, self._tag)], None))
            return
        tensors = []
        for name in receive.route.payload:
            shape, dtype = self._layout(name, receive.microbatch)
            tensors.append(torch.empty(shape, dtype=dtype, device=self._device))
        works = [group.recv([t], peer, self._tag) for t in tensors]
        present = None
        if self._may_lack and receive.route.direction is Direction.BACKWARD:
            present = torch.empty(len(tensors), dtype=torch.uint8)
            works.append(self._towards(receive.peer, self.rank).recv([present], receive.peer, self._tag))
        channel.posted.append(Posted(works, tensors, present))

    def receiver(self, route: Route, peer: int) -> Callable[[int], Payload]:
        sent = self._sent.setdefault(peer, deque())

        def receive(microbatch: int) -> Payload:
            channel = self._channels[peer]
            posted = channel.posted.popleft()
            try:
                for work in posted.works:
                    work.wait()
                self._post(channel)
                arrived = channel.arrived.popleft()
                while channel.num_released < arrived:
                    wait_for(sent.popleft())
                    channel.num_released += 1
            except RuntimeError as error:
                raise Aborted(str(error)) from error
            return posted.payload()

        return receive

    def sender(self, route: Route, peer: int) -> Callable[[int, Payload], None]:
        group = self._data[self.rank, peer]
        target = dist.get_group_rank(group, peer)
        sent = self._sent.setdefault(peer, deque())

        def send(microbatch: int, payload: Payload) -> None:
            if payload is None:
                tensors = [torch.empty(1, device=self._device)]
            else:
                for name, tensor in zip(route.payload, payload, strict=True):
                    shape, dtype = self._layout(name, microbatch)
                    if tensor is None:
                        continue
                    if tensor.shape != shape or tensor.dtype != dtype:
                        raise EngineError(
                            f"tensor {name!r} is {tensor.dtype} of {tuple(tensor.shape)}, but {dtype} of {shape} by "
                            "the graph; a layer must give the same for real data as for inference"
                        )
                tensors = [
                    self._zeros(name, microbatch) if t is None else t.contiguous()
                    for name, t in zip(route.payload, payload, strict=True)
                ]
            try:
                works = [group.send([t], target, self._tag) for t in tensors]
                if self._may_lack and payload is not None and route.direction is Direction.BACKWARD:
                    tensors.append(torch.tensor([t is not None for t in payload], dtype=torch.uint8))
                    works.append(self._towards(self.rank, peer).send([tensors[-1]], peer, self._tag))
                sent.append(Sent(route, microbatch, works, tensors))
            except RuntimeError as error:
                raise Aborted(str(error)) from error

        return send

    def end(self) -> None:
        try:
            for sent in self._sent.values():
                while sent:
                    wait_for(sent.popleft())
        except RuntimeError as error:
            raise Aborted(str(error)) from error

    # --- sums and agreement ---------------------------------------------------------------

    def start_reduce(self, stage: int, tensor: Tensor) -> Callable[[], Tensor]:
        return self._start_sum(tensor, self._reduce[stage])

    def start_shared(self, stages: tuple[int, ...], ranks: tuple[int, ...], tensor: Tensor) -> Callable[[], Tensor]:
        return self._start_sum(tensor, self._shared[stages]) if len(ranks) > 1 else lambda: tensor

    def start_share(self, values: Tensor) -> Callable[[], Tensor]:
        num_ranks = dist.get_world_size()
        if num_ranks > _DIRECT_RANKS:
            return self._start_sum(values, self._control)
        # Few ranks tell each other: the last to compute, for whom all wait, then waits for nobody.
        others = [rank for rank in range(num_ranks) if rank != self.rank]
        wait = self._start_exchange(others, values, _SHARE_TAG + self._tag)

        def total() -> Tensor:
            theirs = wait()
            return torch.stack([*theirs[: self.rank], values, *theirs[self.rank :]]).sum(0)

        return total

    def exchange(self, peers: Sequence[int], values: Tensor) -> list[Tensor]:
        return self._start_exchange(peers, values, _EXCHANGE_TAG + self._tag)()

    def _start_exchange(self, peers: Sequence[int], values: Tensor, tag: int) -> Callable[[], list[Tensor]]:
        """Gives a small CPU tensor to the peers; the result waits and gives theirs."""
        received = [torch.empty_like(values) for _ in peers]
        try:
            works = [
                self._towards(peer, self.rank).recv([part], peer, tag)
                for peer, part in zip(peers, received, strict=True)
            ]
            works += [self._towards(self.rank, peer).send([values], peer, tag) for peer in peers]
        except RuntimeError as error:
            raise Aborted(str(error)) from error

        def wait() -> list[Tensor]:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                raise Aborted(str(error)) from error
            return received

        return wait

    def _start_sum(self, tensor: Tensor, group: Any) -> Callable[[], Tensor]:
        try:
            work = dist.all_reduce(tensor, group=group, async_op=True)
        except RuntimeError as error:
            raise Aborted(str(error)) from error

        def wait() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise Aborted(str(error)) from error
            return tensor

        return wait

    def broadcast_in_stage(self, tensor: Tensor, stage: int) -> None:
        """Gives all replicas of a stage the tensor of its first, in place."""
        self._broadcast(tensor.detach(), self._placement[stage][0], self._reduce[stage])

    def give(self, tensor: Tensor | None, name: str, microbatch: int, owner: int) -> Tensor:
        """Gives every rank a tensor of the graph that rank `owner` has, of a micro-batch of the last step."""
        shape, dtype = self._layout(name, microbatch)
        return self.give_shaped(tensor, shape, dtype, owner)

    def give_shaped(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, owner: int) -> Tensor:
        """A copy of the tensor that rank `owner` has, on every rank."""
        if self.rank == owner:
            assert tensor is not None
            copy = tensor.detach().contiguous().clone()
        else:
            copy = torch.empty(shape, dtype=dtype, device=self._device)
        self._broadcast(copy, owner, self._world)
        return copy

    def _broadcast(self, tensor: Tensor, owner: int, group: Any) -> None:
        try:
            dist.broadcast(_as_bytes(tensor), owner, group=group)
        except RuntimeError as error:
            raise Aborted(str(error)) from error

    # --- failure --------------------------------------------------------------------------

    def disagree(self) -> NoReturn:
        """The ranks turned out to have been asked for different things: ends the call on all."""
        call = self.watch.call
        with suppress(RuntimeError):
            if call is not None:
                self.board.post(call)
                if (found := self.board.disagreement(call)) is not None:
                    self.board.report(found)
        self.abort()
        raise Aborted("the ranks were asked for different things")

    def report(self, failure: LayerFailure) -> None:
        """Writes what happened where peers look for it, and breaks the groups. The first wins."""
        self.board.report(failure)
        self.abort()

    def abandon(self, error: BaseException) -> None:
        """This rank cannot be made: the others, which wait for its weights, stop and find out why."""
        if isinstance(error, Aborted):
            self.abort()
            return
        text = f"{type(error).__name__}: {error}"
        self.report(LayerFailure(rank=self.rank, step=0, phase="construction", original=text))

    def failure(self, call: Call) -> LayerFailure | None:
        """Why this rank waits in vain in a call, if any says so within two seconds."""
        deadline = time.monotonic() + _RECORD_WAIT
        while time.monotonic() < deadline:
            with suppress(RuntimeError):
                if (failure := self.board.failure()) is not None:
                    return failure
                self.board.post(call)
                if (failure := self.board.disagreement(call)) is not None:
                    self.board.report(failure)
                    return failure
            time.sleep(0.02)
        return None

    def abort(self) -> None:
        """Breaks all groups of this rank: whoever waits for it, or it for whom, stops waiting."""
        with self._lock:
            self._abort()

    def _abort(self) -> None:
        for group in () if self._is_closed else self._groups:
            ranks = dist.get_process_group_ranks(group)
            if dist.get_backend(group) == "nccl":
                with suppress(RuntimeError):
                    group.abort()
                continue
            for peer in range(len(ranks)):
                if ranks[peer] != self.rank:
                    with suppress(RuntimeError):  # [1]: the time-out is the point
                        group.recv([torch.empty(1)], peer, _ABORT_TAG).wait(timedelta(milliseconds=1))

    @property
    def _groups(self) -> list[Any]:
        """All groups that this rank is in."""
        data = (self._up, self._down, *self._data.values())
        groups = {id(g): g for g in (self._control, self._world, *data, *self._reduce.values(), *self._shared.values())}
        return [g for g in groups.values() if self._is_in(g)]

    def _is_in(self, group: Any) -> bool:
        try:
            return self.rank in dist.get_process_group_ranks(group)
        except KeyError:  # destroyed with the group of the whole job
            return False

    def close(self) -> None:
        """Ends the watch and lets go of the groups."""
        self.watch.close()
        with self._lock:
            for group in () if self._is_closed else self._groups:
                with suppress(RuntimeError, ValueError, AssertionError):
                    dist.destroy_process_group(group)
            self._is_closed = True


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory for a broadcast: gloo knows fewer dtypes than torch (int16 and float8 are not among them)."""
    return tensor.view(-1).view(torch.uint8) if tensor.is_contiguous() else tensor
