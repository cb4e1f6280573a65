"""The shape of the project: what may import what, and what must never load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own room and from the rooms before. A name stands for the module
# and everything below it.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors", "units", "values"),
    ("graphs",),
    ("partitioners",),
    ("partitioning",),
    ("program", "flows", "schedules"),
    ("execution_plan", "plan_problem", "plan_table", "plan_explanation"),
    ("wiring",),
    ("lowering",),
    ("arrivals", "stage_memory", "memory", "rank_check"),
    ("verifier",),
    ("timeline", "simulator"),
    ("planner", "iteration_search"),
    ("runtime",),
    ("engine",),
    ("recipe",),
    ("report",),
    ("testing",),
    ("cli", "__main__"),
)
POSITION = {name: position for position, names in enumerate(ROOMS) for name in names}

# Arithmetic on costs: starts in milliseconds, and never pays for torch.
PLANNING = {name for name, position in POSITION.items() if position < POSITION["runtime"]} - {"graphs"}
LIGHT = ("", "graphs", "graphs.costs", "graphs.layer_graph", "recipe", "cli", "report")


def module_files() -> dict[str, Path]:
    """Every module of the package, without the leading `pipeflow.`, and its file."""
    files = {}
    for folder in (ROOT / "pipeflow", ROOT / "graphs", ROOT / "partitioners"):
        for path in folder.rglob("*.py"):
            relative = path.relative_to(ROOT / "pipeflow" if folder.name == "pipeflow" else ROOT)
            parts = relative.with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = module_files()


def runtime_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Lines and full names of what a module imports, inside functions too, `if TYPE_CHECKING` apart."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from runtime_imports(ast.Module([other], []), module, is_package)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("pipeflow." + module).split(".")
                package = package[: len(package) - node.level + (1 if is_package else 0)]
                base = ".".join([*package, *([base] if base else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        else:
            yield from runtime_imports(node, module, is_package)


def imports_of(module: str) -> list[tuple[int, str]]:
    path = MODULES[module]
    return list(runtime_imports(ast.parse(path.read_text()), module, path.name == "__init__.py"))


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room() -> None:
    assert {room(m) for m in MODULES if m} <= set(POSITION)


def test_the_modules_are_found() -> None:
    assert {"errors", "graphs.costs", "partitioners.cluster", "execution_plan"} <= set(MODULES)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m))
def test_imports_run_one_way(module: str) -> None:
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports_of(module)
        if name.startswith("pipeflow.")
        and (target := room(name.removeprefix("pipeflow."))) in POSITION
        and POSITION[target] > POSITION[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_testing_knows_nothing_of_the_command_line() -> None:
    reached = {name for m in MODULES if room(m) == "testing" for _, name in imports_of(m)}
    assert not {name for name in reached if name.startswith("pipeflow.cli")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_linked_folders_are_reached_through_the_package(module: str) -> None:
    wrong = [name for _, name in imports_of(module) if name.split(".")[0] in {"graphs", "partitioners"}]
    assert not wrong, f"{MODULES[module]} imports {wrong}; write pipeflow.{wrong[0]}"


@pytest.mark.parametrize("link", ["graphs", "partitioners"])
def test_the_links_are_relative(link: str) -> None:
    path = ROOT / "pipeflow" / link
    assert path.is_symlink()
    assert path.readlink() == Path("..") / link


def test_the_planning_side_never_loads_torch() -> None:
    planning = sorted(m for m in MODULES if room(m) in PLANNING or m in LIGHT)
    script = f"""
import importlib, sys
for name in {planning!r}:
    importlib.import_module(("pipeflow." + name).rstrip("."))
    if "torch" in sys.modules:
        raise SystemExit("importing pipeflow." + name + " loads torch")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_light() -> None:
    script = """
import sys
import pipeflow.cli
heavy = {"torch", "numpy", "networkx", "pydantic", "rich", "sklearn"} & set(sys.modules)
if heavy:
    raise SystemExit(f"importing pipeflow.cli loads {sorted(heavy)}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
