"""What one stage holds of one micro-batch while it goes forward and backward, layer by layer.

Works on costs alone, for one micro-batch; who runs when is the program's (`pipeflow.memory`). Where
the costs say what each layer keeps (`LayerCosts.internal_bytes`), it follows what the runtime does:

    forward     a layer's outputs and what it keeps inside are there from then on; when the stage is
                done, outputs that no backward needs are let go of once they are sent
    backward    from the last layer to the first: gradients of its outputs are there; those of its
                inputs come, and what it kept goes. What came from other stages, activations and
                gradients, and what goes there stays until the stage is done
    recomputed  a run of layers keeps what enters it; backward first computes all of it again
    offloaded   what a layer keeps inside, and tensors of the stage that only such layers need, may
                be away in between; what came from other stages or is an input of the graph stays

and each layer needs more meanwhile. Where the costs do not say so, all that the layers save is there
from the end of forward to the end of backward, and gradients for other stages beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeflow.graphs.costs import GraphCosts, LayerCosts
from pipeflow.partitioners.activations import recomputed_runs, stage_activations
from pipeflow.partitioners.partition import Stage
from pipeflow.program import Kind


@dataclass(frozen=True, slots=True)
class StageBytes:
    """One micro-batch on one stage. What is received counts before, and is not in here.

    Attributes:
        forward_peak: at most meanwhile, over what was held before.
        forward_end: when it is done, and what is only there to be sent is gone.
        backward_peak: at most meanwhile, over what was held before.
        first_backward_peak: the same where it also makes the gradients of the parameters.
        backward_end: when it is done, gradients of parameters apart; may be below zero.
        released: of what backward lets go of, what forward kept.
        kept: tensors that stay for backward, so that another stage of the rank gets them for free.
        offloaded: what may be on the host between forward and backward.
        away: the tensors in that, which are not among `kept`.
    """

    forward_peak: int
    forward_end: int
    backward_peak: int
    first_backward_peak: int
    backward_end: int
    released: int
    kept: frozenset[str]
    offloaded: int = 0
    away: frozenset[str] = frozenset()

    def peak(self, kind: Kind, *, first: bool) -> int:
        """At most meanwhile. Where backward is split, its first half has the peak of the whole."""
        if kind is Kind.FORWARD:
            return self.forward_peak
        if kind is Kind.BACKWARD_WEIGHT:
            return 0
        return self.first_backward_peak if first and kind is Kind.BACKWARD else self.backward_peak

    def end(self, kind: Kind) -> int:
        """When it is done. Where backward is split, what forward kept goes with its second half."""
        if kind is Kind.FORWARD:
            return self.forward_end
        if kind is Kind.BACKWARD:
            return self.backward_end
        return self.backward_end + self.released if kind is Kind.BACKWARD_INPUT else -self.released


def stage_bytes(
    costs: GraphCosts,
    stage: Stage,
    *,
    gradients_in: int,
    gradients_out: int,
    gradients_summed: int,
    train: bool,
    offload: frozenset[str] = frozenset(),
) -> StageBytes:
    """What a stage holds.

    Args:
        gradients_in, gradients_out: bytes of gradients from and for other stages.
        gradients_summed: bytes of those that come in several parts, once each.
        train: whether the stage has a backward.
        offload: layers that keep what backward needs on the host.
    """
    layers = [costs.layer_by_name[name] for name in stage.layers]
    given = [t for layer in layers for t in layer.outputs]
    if not train:
        outputs = sum(t.bytes for t in given if not t.shared_with)
        peak = outputs + max(layer.bare_working_bytes for layer in layers)
        return StageBytes(peak, outputs, 0, 0, 0, 0, frozenset())
    if any(layer.internal_bytes is None for layer in layers):
        kept, transient = stage_activations(costs, stage)
        peak = gradients_out + transient
        learned = sum(layer.parameter_bytes for layer in layers if layer.has_backward)
        away = sum(layer.saved_bytes for layer in layers if layer.name in offload)
        return StageBytes(kept, kept, peak, learned + peak, gradients_out, 0, frozenset(t.name for t in given), away)
    return _Walk(costs, stage, layers).result(gradients_in, gradients_out, gradients_summed, offload)


class _Walk:
    """One stage, forward and back."""

    def __init__(self, costs: GraphCosts, stage: Stage, layers: Sequence[LayerCosts]) -> None:
        self.costs, self.layers = costs, layers
        self.here = {t.name for layer in layers for t in layer.outputs}
        self.run_by_layer = {name: run for run in recomputed_runs(stage) for name in run}
        # A tensor of the stage that backward needs, and the first layer that does: it lets go of it last.
        self.keeper: dict[str, str] = {}
        self.keepers: dict[str, set[str]] = {}
        for layer in layers:
            run = self.run_by_layer.get(layer.name, ())
            names = layer.kept_tensors if not run else _entering(costs, run)
            for name in names:
                owner = self.owner(name)
                if owner in self.here:
                    self.keeper.setdefault(owner, layer.name)
                    self.keepers.setdefault(owner, set()).add(layer.name)

    def owner(self, tensor: str) -> str:
        """The tensor whose memory it is, as far as this stage knows."""
        by_name = self.costs.tensor_by_name
        while tensor in self.here and by_name[tensor].shared_with:
            tensor = by_name[tensor].shared_with
        return tensor

    def bytes_of(self, tensors: Iterable[str]) -> int:
        return sum(self.costs.tensor_by_name[name].bytes for name in tensors)

    def result(
        self, gradients_in: int, gradients_out: int, gradients_summed: int, offload: frozenset[str]
    ) -> StageBytes:
        away = {t for t, keepers in self.keepers.items() if keepers <= offload}  # no other layer keeps them
        kept = self.bytes_of(self.keeper) + sum(
            layer.internal_bytes or 0 for layer in self.layers if layer.name not in self.run_by_layer
        )
        return StageBytes(
            forward_peak=self._forward_peak(),
            forward_end=kept,
            backward_peak=gradients_summed + self._backward_peak(first=False),
            first_backward_peak=gradients_summed + self._backward_peak(first=True),
            backward_end=gradients_out - gradients_in - kept,
            released=kept,
            kept=frozenset(self.keeper) - away,
            away=frozenset(away),
            offloaded=sum(layer.movable_bytes for layer in self.layers if layer.name in offload) + self.bytes_of(away),
        )

    def _forward_peak(self) -> int:
        total = peak = 0
        for layer in self.layers:
            new = self.bytes_of(t.name for t in layer.outputs if not t.shared_with)
            run = self.run_by_layer.get(layer.name)
            inside = layer.forward_working_bytes + (layer.internal_bytes or 0)
            peak = max(peak, total + new + (inside if run is None else layer.bare_working_bytes))
            total += new
            if run is None:
                total += layer.internal_bytes or 0
            else:
                total -= self.bytes_of(self._dropped_after(layer, run))
        return peak

    def _dropped_after(self, layer: LayerCosts, run: Sequence[str]) -> set[str]:
        """What the run lets go of once the layer has read it: nobody after it does, nor outside the run."""
        readers = self.costs.consumers_by_tensor
        given = {t.name for name in run for t in self.costs.layer_by_name[name].outputs if not t.shared_with}
        mine = given.intersection(layer.inputs)
        return {
            t for t in mine if set(run).issuperset(readers[t]) and readers[t][-1] == layer.name and t not in self.keeper
        }

    def _backward_peak(self, *, first: bool) -> int:
        """The most over what was held before backward."""
        total = peak = 0
        gradients: set[str] = set()
        again: dict[str, int] = {}  # what a run was computed again for, by the layer that lets go of it
        for layer in reversed(self.layers):
            run = self.run_by_layer.get(layer.name)
            if run is not None and layer.name == run[-1]:
                meanwhile, again = self._recomputed(run)
                peak = max(peak, total + meanwhile)
                total += sum(again.values())
            if not layer.has_backward:
                total -= again.pop(layer.name, 0)
                continue
            peak = max(peak, total + layer.backward_working_bytes)
            new = self._gradients(layer).difference(gradients)
            gradients |= new
            total += self.bytes_of(new)
            total -= self.bytes_of(self._own_gradients(layer).intersection(gradients))
            total -= again.pop(layer.name, 0) if run is not None else layer.internal_bytes or 0
            total -= self.bytes_of(name for name, keeper in self.keeper.items() if keeper == layer.name)
            if first:
                total += layer.parameter_bytes
            peak = max(peak, total)
        return peak

    def _recomputed(self, run: Sequence[str]) -> tuple[int, dict[str, int]]:
        """(bytes while a run is computed again, what is there then by the layer that lets go of it)."""
        by_name = self.costs.layer_by_name
        again: dict[str, int] = {}
        held: set[str] = set(self.keeper)
        total = peak = 0
        for name in run:
            layer = by_name[name]
            amount = layer.internal_bytes or 0
            for tensor in layer.kept_tensors:
                owner = self.owner(tensor)
                if owner in self.here and owner not in held:
                    held.add(owner)
                    amount += self.costs.tensor_by_name[owner].bytes
            new = self.bytes_of(t.name for t in layer.outputs if not t.shared_with)
            if name != run[-1]:  # of the last nothing is computed once all is there that it keeps
                peak = max(peak, total + (layer.internal_bytes or 0) + new + layer.forward_working_bytes)
            again[name] = amount
            total += amount
        return max(peak, total), again

    def _gradients(self, layer: LayerCosts) -> set[str]:
        """Tensors of which the layer's backward gives a gradient."""
        by_name, inputs = self.costs.tensor_by_name, self.costs.producer_by_tensor
        return {t for t in layer.inputs if t in inputs and by_name[t].gradient_bytes}

    def _own_gradients(self, layer: LayerCosts) -> set[str]:
        return {t.name for t in layer.outputs if t.gradient_bytes}


def _entering(costs: GraphCosts, run: Sequence[str]) -> Mapping[str, None]:
    """Tensors that a run reads and does not give."""
    layers = [costs.layer_by_name[name] for name in run]
    given = {t.name for layer in layers for t in layer.outputs}
    return dict.fromkeys(t for layer in layers for t in layer.inputs if t not in given)
