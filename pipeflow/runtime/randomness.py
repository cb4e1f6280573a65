"""The random numbers of a layer, keyed so that no layout changes them.

A layer that draws random numbers draws them from generators seeded by (seed, step, layer,
first sample): never by rank, stage or micro-batch count of other layers. The global generators are
left as they were. They are shared by all threads of the process, hence the lock.

torch's checkpoint is the one that uses them in backward: it puts them as they were in forward, runs
that again, and restores them. Ranks that are threads of one process take turns in that too.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, Protocol

import torch

_LOCK = threading.RLock()
_MASK = (1 << 64) - 1


def layer_key(seed: int, layer: str) -> int:
    """A 64-bit key of a layer, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}".encode()).digest()[:8], "little")


def draw_key(key: int, step: int, first_sample: int) -> int:
    """Mixes step and sample into a layer's key (splitmix64's finalizer)."""
    z = (key + 0x9E3779B97F4A7C15 * (step + 1) + 0xD1B54A32D192ED03 * (first_sample + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) & (_MASK >> 1)


@contextmanager
def keyed(key: int, device: torch.device) -> Iterator[None]:
    """Seeds the generators of the CPU and of `device` by `key`, and restores them after."""
    with _LOCK:
        generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generators.append(torch.cuda.default_generators[index])
        turn = _Turn(generators)
        _turns.held.append(turn)
        try:
            for g in generators:
                g.manual_seed(key)
            yield
        finally:
            _turns.held.pop()
            turn.swap()


class _Turn:
    """The generators that a thread uses, and in which state they are to be for others."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._states = [g.get_state() for g in generators]

    def swap(self) -> None:
        """Puts the generators in the other state, and keeps the one that they were in."""
        current = [g.get_state() for g in self._generators]
        for g, state in zip(self._generators, self._states, strict=True):
            g.set_state(state)
        self._states = current


class _Turns(threading.local):
    """The turns that this thread has, one within another."""

    def __init__(self) -> None:
        self.held: list[_Turn] = []


_turns = _Turns()


@contextmanager
def letting_others() -> Iterator[None]:
    """Gives the generators to others meanwhile, where this thread has them: for waiting for who may need them."""
    held = list(_turns.held)
    for turn in reversed(held):
        turn.swap()
        _LOCK.release()
    try:
        yield
    finally:
        for turn in held:
            _LOCK.acquire()
            turn.swap()


@cache
def take_turns_in_backward() -> None:
    """From now on, what forks the generators within a backward does so while it holds the lock.

    It is the checkpoint's own backward that does, of which nothing else could be wrapped: the lock is held
    for no longer than the generators are not as others left them, by the thread that changes them.
    """
    fork = torch.random.fork_rng

    @wraps(fork)
    @contextmanager
    def fork_in_turn(devices: Any = None, enabled: bool = True, *args: Any, **kwargs: Any) -> Iterator[None]:
        in_backward = torch._C._current_graph_task_id() >= 0
        turn: AbstractContextManager[object] = _LOCK if enabled and in_backward else nullcontext()
        with turn, fork(devices, enabled, *args, **kwargs):
            yield

    torch.random.fork_rng = fork_in_turn


class Keyed(Protocol):
    """A layer that is told, before each forward, which call and which samples it works on."""

    step: int
    first_sample: int


Callables = tuple[Mapping[str, Callable[..., Any]], Sequence[Keyed]]
"""What to call for each layer by name, and those of the callables that are keyed."""


class RandomLayer:
    """A random layer, called with the numbers of the step and sample at hand.

    `step` and `first_sample` are set by who runs it, before each call.
    """

    def __init__(self, function: Callable[..., Any], *, key: int, device: torch.device) -> None:
        self._function = function
        self._key = key
        self._device = device
        self.step = 0
        self.first_sample = 0

    def around(self, function: Callable[..., Any]) -> RandomLayer:
        """Another function with the random numbers of this one."""
        return RandomLayer(function, key=self._key, device=self._device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with keyed(draw_key(self._key, self.step, self.first_sample), self._device):
            return self._function(*args, **kwargs)
