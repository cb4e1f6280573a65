"""Real ranks: one process each, joined over gloo on the loopback interface.

For tests of what only happens between processes. Processes are forked from a server that has
loaded torch once, so starting them takes a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True, slots=True)
class RankResult:
    """How one rank ended.

    Attributes:
        value: what its function returned; None where it raised.
        error: the exception, or None. Its traceback is in `trace`.
        trace: the traceback as text.
        seconds: when it ended, in seconds after the start of the function on this rank.
    """

    value: Any
    error: BaseException | None
    trace: str
    seconds: float


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120.0) -> list[RankResult]:
    """Runs `function(rank, *args)` in a process per rank, with a gloo process group up.

    Args:
        function: importable by name, and its arguments and result picklable.
        num_ranks: how many.
        timeout: seconds until all are killed.

    Returns:
        The results by rank.

    Raises:
        TimeoutError: a rank did not end; the message says which.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pipeflow.engine"])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        processes = [
            context.Process(
                target=_rank_main,
                args=(function, rank, num_ranks, os.path.join(folder, "store"), pipes[rank][1], args),
                daemon=True,
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for _, end in pipes:
            end.close()
        try:
            return _collect([receive for receive, _ in pipes], time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(timeout=0.2)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: Sequence[Connection], deadline: float) -> list[RankResult]:
    results: dict[int, RankResult] = {}
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"rank {rank} of {len(pipes)} did not end in time; {sorted(results)} had")
        try:
            results[rank] = pickle.loads(pipe.recv_bytes())
        except EOFError:
            results[rank] = RankResult(None, ConnectionError(f"rank {rank} died"), "", float("nan"))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    function: Callable[..., Any], rank: int, num_ranks: int, store: str, pipe: Connection, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # A file instead of a port: nothing listens but gloo's own loopback sockets.
    dist.init_process_group("gloo", store=FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    start = time.monotonic()
    try:
        result = RankResult(function(rank, *args), None, "", 0.0)
    except BaseException as error:
        error.__cause__ = error.__context__ = None  # the chain may not pickle; its text is kept
        result = RankResult(None, error, traceback.format_exc(), 0.0)
    seconds = time.monotonic() - start
    # Plain bytes: torch would send tensors as files that end with this process.
    pipe.send_bytes(pickle.dumps(RankResult(result.value, result.error, result.trace, seconds)))
    pipe.close()
    os._exit(0)  # without waiting for peers' connections
