"""Random numbers that depend on what asks for them, and leave everybody else's alone."""

from __future__ import annotations

import hashlib
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOCK = threading.RLock()
"""Held while the process-wide generators stand in for a layer's own: they are not per thread."""


def seed_of(seed: int, name: str) -> int:
    """A seed for the layer `name`, the same in every process: 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seeds torch (CPU), `random` and numpy for the body, and puts their states back.

    CUDA's generators are not touched: layers are built on the CPU.
    """
    numpy = sys.modules.get("numpy")
    with LOCK:
        torch_state, python_state = torch.default_generator.get_state(), random.getstate()
        numpy_state = numpy.random.get_state() if numpy else None
        try:
            # torch.manual_seed would seed CUDA as well.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
            yield
        finally:
            torch.default_generator.set_state(torch_state)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
