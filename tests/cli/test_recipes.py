"""The list of recipes by the paper's tables, and a recipe whose data are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustq.recipe import load_recipe, recipe_names
from robustq.recipe.paper import PAPER_TABLES, by_table
from robustq.report.info import list_lines
from tests.cli.conftest import Run


def test_the_list_follows_the_papers_tables(run: Run) -> None:
    found = run("recipes", "--json").json
    assert found["tables"] == by_table([load_recipe(name) for name in recipe_names()])
    assert {recipe["name"] for recipe in found["recipes"]} == set(recipe_names())
    assert found["tables"]["V"][5] == found["tables"]["IV"][0] == "cifar10/resnet20-w4a4-odgq"
    lines = run("recipes").out.splitlines()
    assert lines == list_lines(**found)
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert heads == [f"Table {table} of arXiv:2210.08701: {PAPER_TABLES[table][0]}" for table in PAPER_TABLES] + [
        "Others"
    ]
    place = lines.index(heads[4])
    for offset, name in enumerate(found["tables"]["V"], start=1):
        assert lines[place + offset].split()[0] == name
    others = [line.split()[0] for line in lines[lines.index("Others") + 1 :]]
    assert others == [recipe["name"] for recipe in found["recipes"] if not recipe["paper_rows"]]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", [("train",), ("harden", "model")])
def test_a_recipe_for_absent_data_is_one_clear_line(
    run: Run, command: tuple[str, ...], digits_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTQ_DATA", str(tmp_path / "nothing"))
    words = [digits_float if word == "model" else word for word in command]
    outcome = run(*words, "--recipe", "imagenet/resnet18-w4a4-odgq", "--device", "cpu")
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("robustq: imagenet is not in ") and "--data FOLDER" in outcome.err
    assert not list(Path.cwd().rglob("runs"))
