"""Recipes: parsing, faults told all at once, and every shipped recipe taking real steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import robustq
from robustq.errors import RecipeError, UsageError
from robustq.recipe import format_epsilon, load_recipe, parse_epsilon, recipe_names
from robustq.recipe_faults import check_settings


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), (0.5, 0.5), ("1", 1.0), ("0", 0.0), (" 4 / 255 ", 4 / 255)]
)
def test_epsilon_is_read(text: str | float, value: float) -> None:
    assert parse_epsilon(text) == value


@pytest.mark.parametrize("bad", ["-1/255", "8", "nan", "inf", "8/0", "x", "", "1/2/3", math.nan, True])
def test_epsilon_that_makes_no_sense_is_named(bad: str | float) -> None:
    with pytest.raises(UsageError, match="epsilon"):
        parse_epsilon(bad)


def test_epsilon_is_shown_in_grey_levels_where_it_is_whole() -> None:
    assert [format_epsilon(value) for value in (8 / 255, 0.0, 0.03)] == ["8/255", "0/255", "0.03"]


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('method = "odgq"\nepoch = 3\nbatch_size = 1\nlr = "high"\nschedule = "linear"\n[natural]\nx = 1\n')
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(bad))
    message = str(raised.value)
    for part in ("unknown key 'epoch' (nearest: epochs)", "batch_size = 1", "lr = 'high'", "epochs is missing"):
        assert part in message
    assert "schedule = 'linear'" in message
    assert "[natural] is not the table of method 'odgq'" in message
    assert "\n" not in message


def test_overrides_lie_over_the_recipe() -> None:
    recipe = load_recipe("odgq", ("epochs=3", "lr=0.5", "schedule=steps", "milestones=[1, 2]", "odgq.domains=2"))
    assert (recipe.epochs, recipe.lr, recipe.schedule, recipe.milestones) == (3, 0.5, "steps", (1, 2))
    assert recipe.settings == {"domains": 2, "mmd_weight": 3.0}
    assert load_recipe("odgq").epochs == 40  # untouched


@pytest.mark.parametrize(
    "override",
    ["epochs=-1", "epochs=1.5", "epochs=true", "lr=nan", "lr=inf", "flip=1", "milestones=[0]", "=3", "odgq=3"],
)
def test_overrides_are_checked_like_the_recipe(override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("odgq", (override,))


@dataclass(frozen=True)
class _Settings:
    number: float = 1.0
    word: str = "a"
    switch: bool = False


@pytest.mark.parametrize(("key", "value"), [("number", "x"), ("number", True), ("switch", 1), ("wrod", "a")])
def test_a_methods_own_table_is_checked(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"table.{key}"):
        check_settings({key: value}, _Settings, table="table")


def test_the_papers_recipes_hold_its_schedule() -> None:
    """Appendix of arXiv:2210.08701, its two decay steps put in the order of its epochs."""
    for data in ("cifar10", "mnist"):
        odgq, natural = (load_recipe(f"{data}/resnet20-w4a4-{method}") for method in ("odgq", "natural"))
        assert (odgq.epochs, odgq.milestones) == (150, (50, 100))
        assert (natural.epochs, natural.milestones) == (300, (100, 200))
        assert odgq.settings == {"domains": 4, "mmd_weight": 3.0}
        for recipe in (odgq, natural):
            assert (recipe.batch_size, recipe.lr, recipe.data) == (512, 0.1, data)
            assert (recipe.architecture, recipe.weight_bits, recipe.act_bits) == ("resnet20", 4, 4)
            assert recipe.epsilon == 8 / 255


SHAPES = {"cifar10": (32, 32, 3), "mnist": (28, 28), "digits": (8, 8), None: (16, 16)}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """A few random images in the shape of each data set, three classes."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("stand-ins")
    made = {}
    for name, shape in SHAPES.items():
        made[name] = folder / f"{name}.npz"
        arrays: dict[str, Any] = {}
        for part, count in (("train", 24), ("test", 6)):
            arrays[f"x_{part}"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
            arrays[f"y_{part}"] = np.arange(count) % 3
        np.savez(made[name], **arrays)
    return made


TRAINED = [name for name in recipe_names() if load_recipe(name).method != "ptq"]


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_takes_two_steps(name: str, stand_ins: dict[str | None, Path], tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.summary
    # 24 images less the 3 held out, in batches of 11: two steps, the second one short.
    result = robustq.train_model(
        name,
        overrides=("epochs=1", "batch_size=11", "monitor_images=3", "calibration_images=8", "lr=0.001"),
        data=str(stand_ins[recipe.data]),
        architecture=recipe.architecture or "resnet8",
        bits=recipe.weight_bits or 4,
        device="cpu",
        out=tmp_path / "run",
    )
    assert Path(result["checkpoint"]).is_file()
    assert result["epochs"] == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - set(TRAINED)))
def test_every_recipe_without_training_quantizes(name: str, digits_float: Path, tmp_path: Path) -> None:
    result = robustq.harden_model(
        digits_float, bits=load_recipe(name).weight_bits or 4, recipe=name, device="cpu", out=tmp_path / "run"
    )
    assert Path(result["checkpoint"]).is_file()
    assert (result["epochs"], result["bits"]) == (0, 4)
