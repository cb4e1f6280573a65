"""How long a call takes on a device, also where one call is shorter than the clock can tell.

Knows calls and devices, nothing of layers.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

SAMPLE_SECONDS = 1e-3
"""A sample is made of as many calls as fill this time."""

_MAX_CALLS = 1000

Call = Callable[[], object]


def describe_device(device: torch.device) -> str:
    """The device as text, the same for devices that are equally fast."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({_processor()})"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def synchronise(device: torch.device) -> None:
    """Waits for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Call, num_calls: int, device: torch.device) -> float:
    """Seconds of one call: the mean over `num_calls`, one after another.

    On CUDA the time between two events around them, so that the host's waiting is not in it.
    """
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record(torch.cuda.current_stream(device))
        for _ in range(num_calls):
            call()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / num_calls
    begin = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - begin) / num_calls


def calibrate(call: Call, device: torch.device, warmup: int) -> int:
    """Warms up, and gives the number of calls that fill `SAMPLE_SECONDS`."""
    for _ in range(warmup):
        call()
    synchronise(device)
    num_calls = 1
    while num_calls < _MAX_CALLS:
        seconds = sample(call, num_calls, device)
        if seconds * num_calls >= SAMPLE_SECONDS:
            return num_calls
        wanted = math.ceil(1.2 * SAMPLE_SECONDS / seconds) if seconds > 0 else 2 * num_calls
        num_calls = min(max(wanted, num_calls + 1), _MAX_CALLS)
    return num_calls


def spread(samples: Sequence[float]) -> float:
    """The interquartile range over the median; 0 for fewer than two samples."""
    median = statistics.median(samples)
    if len(samples) < 2 or median <= 0:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / median


@contextmanager
def threads(num_threads: int | None) -> Iterator[None]:
    """Lets torch use that many threads for one operation; puts the number back."""
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
