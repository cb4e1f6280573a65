"""What every layer costs, measured on a device.

The graph runs once on the given micro-batch, so that each layer is timed on the tensors that
it really gets; then every layer runs by itself, forward and backward, in training mode. A
second, smaller or larger, run tells which share of the time does not depend on the samples.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pipeflow.errors import CostError
from pipeflow.graphs import profile_cache
from pipeflow.graphs.code_digest import code_digest
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.layer_bench import GraphRun, Tensors, TimedLayer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.phase import phase_costs
from pipeflow.graphs.stopwatch import calibrate, describe_device, sample, threads


def profile(
    graph: LayerGraph,
    batch: Tensors,
    device: str | torch.device = "cpu",
    *,
    num_repeats: int = 7,
    warmup: int = 2,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    num_threads: int | None = 1,
) -> GraphCosts:
    """Measures every layer of the graph on one micro-batch.

    Seconds are medians over `num_repeats` samples, each of as many calls as fill a millisecond.
    The two halves of backward are timed apart and scaled so that they add up to backward as a
    whole, gradient accumulation included and the fixed cost of starting autograd taken off,
    since a stage starts it once for all its layers. Saved bytes are those that autograd keeps; a
    tensor that several layers save counts for the first of them, parameters and buffers not at all.

    Args:
        graph: checked as by `LayerGraph.check`.
        batch: one micro-batch, real data: a tensor for each input.
        device: where to measure.
        num_repeats: samples of each time.
        warmup: calls before the first sample.
        cache: a file that keeps costs; what was measured for the same graph, code of its layers,
            samples, device, torch and options is read from it.
        seed: for the weights of layers built by `pf.lazy`.
        num_threads: that torch uses for one operation on the CPU, as each rank of an in-process
            run does; None leaves it alone.

    Raises:
        GraphError: the graph cannot be a model.
        BatchError: the batch does not fit the graph's inputs.
        CostError: fewer than 1 repeat, or 0 threads, a device that this machine lacks, or a layer
            that raises.
        FormatError: `cache` is no such file.
    """
    graph.check()
    samples = graph.check_batch(batch)
    lengths = graph.measure_batch(batch).lengths
    if num_repeats < 1 or warmup < 0 or (num_threads is not None and num_threads < 1):
        raise CostError(
            f"{num_repeats} repeats, {warmup} warm-up calls and {num_threads} threads: at least 1, 0 and 1 are needed"
        )
    where = _usable(device)
    key = {
        "graph": graph.digest,
        "code": code_digest({name: layer.source for name, layer in graph.layers.items()}),
        "device": describe_device(where),
        "amounts": 2,  # what is measured: more than the first version did
        "samples": samples,
        **({"lengths": dict(lengths)} if lengths else {}),
        "torch": str(torch.__version__),
        "matmul": torch.get_float32_matmul_precision(),
        "num_threads": num_threads or torch.get_num_threads(),
        "num_repeats": num_repeats,
        "warmup": warmup,
        "seed": seed,
    }
    if cache is not None and (known := profile_cache.read(cache, key)) is not None:
        return known
    generators = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(generators, device_type="cuda"), torch.enable_grad(), threads(num_threads):
        torch.default_generator.manual_seed(seed)
        costs = _profile(graph, batch, samples, lengths, where, _Effort(num_repeats, warmup), seed)
    if cache is not None:
        profile_cache.write(cache, key, costs)
    return costs


def _usable(device: str | torch.device) -> torch.device:
    """The device, if this machine has it."""
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise CostError(f"{device!r} is no device of torch; give for example 'cpu' or 'cuda:0'") from error
    count = torch.cuda.device_count() if where.type == "cuda" else 0
    if where.type not in ("cpu", "cuda") or (where.type == "cuda" and (where.index or 0) >= count):
        raise CostError(
            f"device {str(where)!r} is asked for, and this machine has the CPU and {count} CUDA devices that can be "
            "measured on; give one of them, or profile where there is one"
        )
    return where


@dataclass(frozen=True, slots=True)
class _Effort:
    num_repeats: int
    warmup: int


def _profile(
    graph: LayerGraph,
    batch: Tensors,
    samples: int,
    lengths: Mapping[str, int],
    device: torch.device,
    effort: _Effort,
    seed: int,
) -> GraphCosts:
    functions = graph.build(seed=seed)
    for function in functions.values():
        if isinstance(function, nn.Module):
            function.to(device)
    local = {name: batch[name].detach().to(device) for name in graph.inputs}
    other = samples // 2 if samples >= 4 else 2 * samples  # half of one sample would be none
    if not all(spec.shape[:1] == ("B",) for spec in graph.inputs.values()):
        other = samples  # such a batch cannot be cut: all of its time is taken to follow its samples
    other_local = {n: t[:other] if other < samples else torch.cat([t] * (other // samples)) for n, t in local.items()}
    runs = GraphRun(graph, functions, local), GraphRun(graph, functions, other_local)
    overhead = _autograd_overhead(device, effort)
    memories = {name: [run.observe(layer, device) for run in runs] for name, layer in graph.layers.items()}
    benches = {name: [TimedLayer(run.bench(layer)) for run in runs] for name, layer in graph.layers.items()}
    # Round by round over all layers, so that a disturbance of the machine hits no layer alone.
    for _ in range(effort.num_repeats):
        for pair in benches.values():
            for bench in pair:
                bench.measure(device, effort.warmup)
    layers = []
    for name, layer in graph.layers.items():
        times, other_times = (bench.times(overhead) for bench in benches[name])
        memory, other_memory = memories[name]
        working, share = memory.backward_bytes, other / samples
        layers.append(
            LayerCosts(
                name=name,
                kind=layer.kind,
                inputs=layer.inputs,
                outputs=tuple(
                    _tensor(graph, t, samples, lengths, memory.shared_with.get(t, "")) for t in layer.outputs
                ),
                forward_seconds=times.forward,
                backward_input_seconds=times.backward_input,
                backward_weight_seconds=times.backward_weight,
                fixed_fraction=_fixed_fraction(times.total, other_times.total, other / samples),
                parameter_bytes=graph.parameter_bytes[name],
                saved_bytes=runs[0].saved_bytes[name],
                internal_bytes=memory.internal_bytes,
                fixed_in_place_bytes=memory.fixed_in_place_bytes,
                kept_tensors=memory.kept_tensors,
                forward_working_bytes=memory.forward_bytes,
                bare_working_bytes=memory.bare_bytes,
                backward_working_bytes=working,
                backward_fixed_bytes=round(working * _fixed_fraction(working, other_memory.backward_bytes, share)),
                has_backward=layer.has_backward,
                replicable=layer.is_replicable,
                statistics_bytes=graph.statistics_bytes[name],
                spread=times.spread,
            )
        )
    return GraphCosts(
        name=graph.name,
        samples=samples,
        device=describe_device(device),
        inputs=tuple(_tensor(graph, name, samples, lengths) for name in graph.inputs),
        layers=tuple(layers),
        colocated=graph.colocated,
        phases=phase_costs(graph),
        shared=graph.shared,
    )


def _tensor(
    graph: LayerGraph, name: str, samples: int, lengths: Mapping[str, int], shared_with: str = ""
) -> TensorCosts:
    spec = graph.specs[name]
    size = spec.bytes_at(samples, lengths)
    gradient = size if name in graph.differentiable else 0
    return TensorCosts(name=name, bytes=size, gradient_bytes=gradient, scales=spec.scales, shared_with=shared_with)


def _fixed_fraction(seconds: float, other_seconds: float, fraction: float) -> float:
    """The share of `seconds` that stays at any number of samples, from the time at `fraction` of them."""
    if seconds <= 0 or fraction == 1:
        return 0.0
    fixed = (other_seconds - fraction * seconds) / (1 - fraction)
    return min(1.0, max(0.0, fixed / seconds))


def _autograd_overhead(device: torch.device, effort: _Effort) -> float:
    """Seconds to start autograd: backward through a view of one number."""
    leaf = torch.zeros(1, device=device, requires_grad=True)
    root, grad = leaf.view(1), torch.ones(1, device=device)

    def call() -> object:
        return torch.autograd.grad(root, leaf, grad, retain_graph=True)

    num_calls = calibrate(call, device, effort.warmup)
    return statistics.median(sample(call, num_calls, device) for _ in range(effort.num_repeats))
