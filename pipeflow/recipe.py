"""A recipe: a model with its data and its optimizer, as one value that a file can hold.

A recipe module defines a function `recipe()` that returns a `Recipe`; `pipeflow train` runs it
under any plan. Decides nothing of how it runs: its layout fields are defaults that a caller
may override. Knows torch by name only.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeflow.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from pipeflow.graphs import LayerGraph

    Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model, its data and how to train it.

    Every rank calls the factories for itself, so they must give the same each time they are
    called with the same arguments.

    Attributes:
        name: for people.
        graph: makes the layer graph.
        train_batches: (epoch, seed) -> the batches of an epoch, counted from 0, as dicts of tensors
            by input name, the samples first. The last may be smaller.
        test_batches: the batches of the test set, the same ones each time.
        optimizer: makes the optimizer from a stage's parameters; one for each phase of the graph by
            name, where it has phases. Every batch is then a step of each, in their order.
        batch_size: samples of a training batch.
        lr_scheduler: makes the learning-rate scheduler, stepped once per training step.
        num_epochs: how often to go through the training data.
        metric: (predictions by tensor name, batch) -> the mean over the batch's samples.
        metric_name: for people.
        metric_goal: what `metric` reaches on the test set after `num_epochs`, for people; None for no promise.
        num_devices, num_stages, replicas, num_microbatches, partitioner, schedule: defaults for the
            layout; None leaves it to the planner.
    """

    name: str
    graph: Callable[[], LayerGraph]
    train_batches: Callable[[int, int], Iterable[Batch]]
    test_batches: Callable[[], Iterable[Batch]]
    optimizer: Callable[[Any], Optimizer] | Mapping[str, Callable[[Any], Optimizer]]
    batch_size: int
    lr_scheduler: Callable[[Optimizer], LRScheduler] | Mapping[str, Callable[[Optimizer], LRScheduler]] | None = None
    num_epochs: int = 1
    metric: Callable[[Mapping[str, Tensor], Batch], float] | None = None
    metric_name: str = "metric"
    metric_goal: float | None = None
    num_devices: int | None = None
    num_stages: int | None = None
    replicas: tuple[int, ...] | None = None
    num_microbatches: int | None = None
    partitioner: str = "auto"
    schedule: str = "auto"


def load_recipe(source: str) -> Recipe:
    """Imports a recipe module and calls its `recipe()`. This runs the module's code.

    Args:
        source: the path of a Python file, or the dotted name of a module.

    Raises:
        FormatError: there is no such module, or it has no function `recipe` that returns a `Recipe`.
    """
    module = _import_file(Path(source)) if source.endswith(".py") else _import_name(source)
    factory = getattr(module, "recipe", None)
    if not callable(factory):
        raise FormatError(f"{source} defines no function recipe(); write one that returns a pipeflow.Recipe")
    recipe = factory()
    if not isinstance(recipe, Recipe):
        raise FormatError(f"recipe() of {source} returned a {type(recipe).__name__}; it must return a pipeflow.Recipe")
    return recipe


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise FormatError(f"{path} is not a file; give the path of a recipe's Python file")
    name = f"pipeflow_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, as an import does: dataclasses and pickles look modules up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import_name(name: str) -> object:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the name asked for is the caller's mistake; what the module itself lacks is its own.
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise FormatError(f"there is no module {name!r}; give a dotted name, or a path that ends in .py") from error
        raise
    except (TypeError, ValueError) as error:
        raise FormatError(f"{name!r} is no module name; give a dotted name, or a path that ends in .py") from error
