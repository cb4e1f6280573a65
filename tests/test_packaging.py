"""What is shipped: one package, with real files, that works where the checkout is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("wheel")  # built once for all of them
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "pipeflow", "graphs", "partitioners")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is written into the checkout."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources / name)
    # An archive of the sources first and the wheel from that: what an upload would hold.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(sources / "dist"), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (sources / "dist").glob("*.whl")
    return built


def test_a_wheel_holds_one_package_with_every_module(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pipeflow"}
    modules = {
        str(path.relative_to(ROOT / "pipeflow" if folder == "pipeflow" else ROOT))
        for folder in ("pipeflow", "graphs", "partitioners")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {f"pipeflow/{module}" for module in modules} == {name for name in names if name.endswith(".py")}
    assert {"pipeflow/py.typed", "pipeflow/graphs/costs.py", "pipeflow/partitioners/cluster.py"} <= set(names)


PROGRAM = """
import sys
import pipeflow as pf
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts

assert pf.__file__.startswith(sys.argv[1]), pf.__file__
layers = tuple(
    LayerCosts(
        name=f"l{i}",
        inputs=("x" if i == 0 else f"l{i - 1}",),
        outputs=(TensorCosts(name=f"l{i}", bytes=64, gradient_bytes=64),),
        forward_seconds=1.0,
        backward_input_seconds=1.0,
        backward_weight_seconds=1.0,
    )
    for i in range(6)
)
costs = GraphCosts(name="chain", inputs=(TensorCosts(name="x", bytes=64),), layers=layers)
plan = pf.plan(None, costs, pf.Cluster.uniform(3), batch_size=8, num_stages=3, num_microbatches=8)
pf.verify(plan)
assert pf.simulate(plan).makespan > 0
assert "torch" not in sys.modules
print(len(plan.stages), "stages")
"""


def test_a_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    # -P and a path that starts with the target: neither the working folder nor the editable install is used.
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(target)],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 stages\n"
