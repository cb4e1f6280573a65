"""Runs a function on every local rank at once: a thread per rank, or the caller alone for one.

Under `torchrun` a process has one local rank. In one process it has them all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch

from pipeflow.runtime.handover import quick_handover

_PATIENCE = 2.0  # seconds for threads to end; they are daemons, so none keeps the process

Task = Callable[[int], Any]


class Workers:
    """Threads that live as long as an engine.

    Args:
        ranks: the local ranks.
        num_threads: threads that torch may use inside each rank; None leaves a single rank's alone,
            and shares the process's between several.
        stop: lets ranks that wait for each other end, once the caller is interrupted.
    """

    def __init__(
        self, ranks: Sequence[int], *, num_threads: int | None, stop: Callable[[], None] = lambda: None
    ) -> None:
        self._stop = stop
        self.ranks = tuple(ranks)
        self._num_threads = num_threads
        if num_threads is None and len(self.ranks) > 1:
            self._num_threads = max(1, torch.get_num_threads() // len(self.ranks))
        self._tasks: list[SimpleQueue[Task | None]] = []
        self._results: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        if len(self.ranks) > 1:
            for rank in self.ranks:
                tasks: SimpleQueue[Task | None] = SimpleQueue()
                thread = threading.Thread(target=self._work, args=(rank, tasks), name=f"pipeflow-{rank}", daemon=True)
                self._tasks.append(tasks)
                self._threads.append(thread)
                thread.start()

    def _work(self, rank: int, tasks: SimpleQueue[Task | None]) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)  # holds for this thread alone
        while (task := tasks.get()) is not None:
            try:
                self._results.put((rank, task(rank), None))
            except BaseException as error:  # delivered to the caller, whatever it is
                self._results.put((rank, None, error))
            del task

    def run(self, task: Task) -> tuple[list[Any], list[BaseException]]:
        """Runs `task(rank)` on every rank and waits for all.

        Returns:
            Results in the order of the ranks (None where one failed), and the exceptions.

        Raises:
            KeyboardInterrupt: Ctrl-C, where the ranks are threads; they have been told to stop.
        """
        if not self._threads:
            if self._num_threads is None:
                return self._run_here(task)
            before = torch.get_num_threads()
            torch.set_num_threads(self._num_threads)
            try:
                return self._run_here(task)
            finally:
                torch.set_num_threads(before)
        by_rank: dict[int, Any] = {}
        errors = []
        with quick_handover():
            for tasks in self._tasks:
                tasks.put(task)
            try:
                for _ in self.ranks:
                    rank, result, error = self._results.get()
                    by_rank[rank] = result
                    if error is not None:
                        errors.append(error)
            except BaseException:  # Ctrl-C comes to the thread that waits here
                self._stop()
                self._settle(len(self.ranks) - len(by_rank))
                raise
        return [by_rank[rank] for rank in self.ranks], errors

    def _settle(self, num_running: int) -> None:
        """Waits for ranks that were told to stop; one that is inside of a layer may take longer than this does."""
        deadline = time.monotonic() + _PATIENCE
        with suppress(Empty):
            for _ in range(num_running):
                self._results.get(timeout=max(0.0, deadline - time.monotonic()))

    def _run_here(self, task: Task) -> tuple[list[Any], list[BaseException]]:
        results, errors = [], []
        for rank in self.ranks:
            try:
                results.append(task(rank))
            except BaseException as error:
                results.append(None)
                errors.append(error)
        return results, errors

    def close(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        deadline = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._threads, self._tasks = [], []
