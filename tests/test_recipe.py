from __future__ import annotations

from pathlib import Path

import pytest

from pipeflow.errors import FormatError
from pipeflow.recipe import Recipe, load_recipe

SOURCE = """
import pipeflow as pf

def recipe():
    return pf.Recipe(
        name="nothing",
        graph=lambda: None,
        train_batches=lambda epoch, seed: [],
        test_batches=list,
        optimizer=lambda parameters: None,
        batch_size=4,
    )
"""


def test_a_recipe_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    assert recipe.name == "nothing"
    assert recipe.batch_size == 4


def test_a_recipe_is_loaded_by_name_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe_by_name_7431.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    assert load_recipe("recipe_by_name_7431").name == "nothing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no function recipe"),
        ("def recipe():\n    return 3\n", "returned a int"),
    ],
)
def test_a_module_without_a_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize("source", ["nowhere.py", "no_such_module_7431", "no_such_7431.module", "not a name", "..up"])
def test_a_source_that_is_not_there_is_refused(source: str) -> None:
    with pytest.raises(FormatError):
        load_recipe(source)


def test_what_a_recipe_itself_lacks_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking_7431.py").write_text("import no_such_module_7431\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_7431"):
        load_recipe("lacking_7431")
