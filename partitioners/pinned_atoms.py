"""Pins as searches see them: of atoms instead of layers.

What must be together is one atom already; here is the rest. Whether a set of atoms may be a stage
is `allows`, whether the stages may follow each other as they do is `places`. Nothing here searches.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from pipeflow.partitioners.atoms import Atoms, Cut, Ints
from pipeflow.partitioners.pins import Pins


@dataclass(frozen=True)
class PinnedAtoms:
    """What pins say of atoms.

    Attributes:
        sizes: layers of each atom.
        max_layers: at most so many on a stage; None for any number.
        apart: pairs (a, b) of atoms, a <= b, that may not share a stage; a == b where pins contradict
            each other.
        stages: for each pinned atom, the indices of stages that it must be on; all of them.
        devices: for each pinned atom, the devices that its stage must be on.
    """

    sizes: Ints
    max_layers: int | None
    apart: tuple[tuple[int, int], ...]
    stages: dict[int, tuple[int, ...]]
    devices: dict[int, tuple[int, ...]]

    @cached_property
    def is_free(self) -> bool:
        """Whether any set of atoms may be any stage."""
        return not (self.apart or self.stages or self.devices or self.max_layers)

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Atoms that some pin names."""
        return frozenset({*self.stages, *self.devices, *(atom for pair in self.apart for atom in pair)})

    @cached_property
    def counts_from_start(self) -> bool:
        """Whether some stage is named by its index from the first."""
        return any(index >= 0 for indices in self.stages.values() for index in indices)

    def allows(self, atoms: Collection[int], devices: Collection[int] | None = None, num_replicas: int = 1) -> bool:
        """Whether the atoms may share a stage on these devices, or on as many alike ones."""
        inside = set(atoms)
        if self.max_layers is not None and sum(int(self.sizes[a]) for a in inside) > self.max_layers:
            return False
        if any(a in inside and b in inside for a, b in self.apart):
            return False
        wanted = self.devices_of(inside)
        return wanted <= set(devices) if devices is not None else len(wanted) <= num_replicas

    def devices_of(self, atoms: Collection[int]) -> set[int]:
        """The devices that a stage of these atoms must be on."""
        return {device for atom in atoms for device in self.devices.get(atom, ())}

    def places(self, cut: Sequence[Collection[int]]) -> bool:
        """Whether every atom that is pinned to a stage is there, given the atoms of all stages."""
        return all(
            index in (place, place - len(cut))
            for place, atoms in enumerate(cut)
            for atom in atoms
            for index in self.stages.get(atom, ())
        )

    def on_pinned_devices(self, cut: Cut, num_devices: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The cut with its devices exchanged, all being alike, so that pinned ones are where they must be.

        A stage that must be on more devices than it has replicas gets the first of them.
        """
        if not self.devices:
            return tuple((tuple(atoms), tuple(devices)) for atoms, devices in cut)
        wanted = [sorted(self.devices_of(atoms))[: len(devices)] for atoms, devices in cut]
        taken = {device for group in wanted for device in group}
        free = iter(device for device in range(num_devices) if device not in taken)
        return tuple(
            (tuple(atoms), tuple(sorted([*group, *(next(free) for _ in range(len(devices) - len(group)))])))
            for (atoms, devices), group in zip(cut, wanted, strict=True)
        )


def pinned_atoms(pins: Pins, atoms: Atoms, *, one_replica: bool) -> PinnedAtoms:
    """The pins of a problem, for its atoms.

    Args:
        one_replica: whether no stage has more; then layers on different devices are apart.
    """
    atom_of = {name: atom for atom, names in enumerate(atoms.members) for name in names}
    stages: dict[int, dict[int, None]] = {}
    devices: dict[int, dict[int, None]] = {}
    for pin in pins.on:
        if pin.stage is not None:
            stages.setdefault(atom_of[pin.layer], {})[pin.stage] = None
        if pin.device is not None:
            devices.setdefault(atom_of[pin.layer], {})[pin.device] = None
    pairs = [(atom_of[a], atom_of[b]) for group in pins.apart for a, b in combinations(group, 2)]
    if one_replica:
        pairs += [(a, a) for a, group in devices.items() if len(group) > 1]
        pairs += combinations(devices, 2)
    return PinnedAtoms(
        sizes=np.array([len(names) for names in atoms.members], dtype=np.int64),
        max_layers=pins.max_layers,
        apart=tuple(sorted({(min(pair), max(pair)) for pair in pairs})),
        stages={atom: tuple(group) for atom, group in stages.items()},
        devices={atom: tuple(group) for atom, group in devices.items()},
    )
