"""Recipe files: extending one by another, and their metadata."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robustq.errors import RecipeError
from robustq.recipe import load_recipe
from robustq.report.recipes import toml_lines

BASE = """summary = "the base"
method = "odgq"
epochs = 3
batch_size = 8
lr = 0.1
milestones = [1, 2]
paper_rows = { I = 1 }

[odgq]
domains = 2
mmd_weight = 0.5

[evidence]
command = "robustq train --recipe base.toml"
seed = 0
hardware = "one CPU core"
figures = { clean = 0.5 }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somewhere else than where the command runs: names are relative to the file that names them."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipes" / "base.toml").write_text(BASE)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "recipes"


def child(folder: Path, text: str, name: str = "child.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_keys_lie_over_and_tables_are_merged(folder: Path) -> None:
    recipe = load_recipe(child(folder, 'extends = "base.toml"\nepochs = 5\nmilestones = [4]\n[odgq]\ndomains = 6\n'))
    assert (recipe.method, recipe.epochs, recipe.batch_size, recipe.milestones) == ("odgq", 5, 8, (4,))
    assert recipe.settings == {"domains": 6, "mmd_weight": 0.5}
    # Metadata are not inherited.
    assert (recipe.summary, recipe.paper_rows, recipe.evidence) == ("", {}, {})
    base = load_recipe(str(folder / "base.toml"))
    assert (base.epochs, base.settings) == (3, {"domains": 2, "mmd_weight": 0.5})
    assert (base.summary, base.paper_rows, base.evidence["figures"]) == ("the base", {"I": 1}, {"clean": 0.5})


def test_a_chain_ends_with_a_recipe_of_ours(folder: Path) -> None:
    (folder / "below").mkdir()
    child(folder, 'extends = "natural"\nlr = 0.2\n', "middle.toml")
    recipe = load_recipe(child(folder / "below", 'extends = "../middle.toml"\nepochs = 7\n'), ("lr=0.3",))
    natural = load_recipe("natural")
    assert (recipe.epochs, recipe.lr, recipe.batch_size) == (7, 0.3, natural.batch_size)


def test_another_method_leaves_the_others_table_behind(folder: Path) -> None:
    text = 'extends = "base.toml"\nmethod = "natural"\n'
    assert load_recipe(child(folder, text)).settings == {}
    with pytest.raises(RecipeError, match=re.escape("[odgq] is not the table of method 'natural'")):
        load_recipe(child(folder, text + "[odgq]\ndomains = 3\n"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('extends = "odqg"', "child.toml extends 'odqg': unknown recipe 'odqg' (nearest: odgq)"),
        ('extends = "none.toml"', "none.toml: no such recipe file"),
        ("extends = 3", "extends = '3' is not a word"),
        ('extends = "broken.toml"', "broken.toml: is not valid TOML"),
        ('extends = "child.toml"', "extend one another in a circle"),
        ('extends = "back.toml"', "extend one another in a circle"),
    ],
)
def test_what_cannot_be_extended_is_one_clear_line(folder: Path, text: str, told: str) -> None:
    child(folder, "=", "broken.toml")
    child(folder, 'extends = "child.toml"', "back.toml")
    with pytest.raises(RecipeError) as raised:
        load_recipe(child(folder, text))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_of_files_cannot_be_set() -> None:
    for key in ("extends=natural", "paper_rows.I=1", "evidence.seed=1"):
        with pytest.raises(RecipeError, match="is allowed in a recipe file only"):
            load_recipe("natural", (key,))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{ I = 1 }", "{ VI = 1 }", "paper_rows' table = 'VI' is unknown; known: I, II, III, IV, V"),
        ("{ I = 1 }", "{ I = 12 }", "paper_rows.I = 12 is no row from 1 to 11"),
        ("{ I = 1 }", "3", "paper_rows = 3 is not a table"),
        ("seed = 0\n", "", "evidence.seed is missing (its seed"),
        ("seed = 0", "seed = [1, true]", "evidence.seed = [1, True] is not a seed"),
        ("hardware =", "machine =", "evidence's key = 'machine' is unknown"),
        ('"one CPU core"', '" "', "evidence.hardware = ' ' is not a text"),
        ("{ clean = 0.5 }", "{}", "evidence.figures = {} is not a table of at least one number"),
        ("clean = 0.5", 'clean = "high"', "evidence.figures.clean = 'high' is not a finite number"),
    ],
)
def test_metadata_are_checked(folder: Path, old: str, new: str, told: str) -> None:
    assert old in BASE
    with pytest.raises(RecipeError) as raised:
        load_recipe(child(folder, BASE.replace(old, new)))
    assert told in str(raised.value)


def test_metadata_are_no_part_of_a_run_and_printed_as_comments(folder: Path) -> None:
    recipe = load_recipe(str(folder / "base.toml"))
    assert not {"paper_rows", "evidence"} & recipe.to_dict().keys()
    assert recipe.metadata()["evidence"]["command"] == "robustq train --recipe base.toml"
    lines = toml_lines({**recipe.to_dict(), **recipe.metadata()})
    assert lines[1:4] == [
        "# row 1 of Table I of arXiv:2210.08701",
        "# evidence: clean 0.5 (seed 0, one CPU core)",
        "#   robustq train --recipe base.toml",
    ]
    # A copy of it is another recipe, of which nothing is known yet.
    again = load_recipe(child(folder, "\n".join(lines)))
    assert again.metadata() == {"paper_rows": {}, "evidence": {}}
    assert {**again.to_dict(), "name": ""} == {**recipe.to_dict(), "name": ""}
