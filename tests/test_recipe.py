"""Recipes: their keys and errors, the paper's tables, and every shipped recipe taking real steps."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.checkpoint import save_model
from robustq.data import Dataset, TensorSplit, to_float, usual_augment
from robustq.errors import RecipeError, UsageError
from robustq.hardening.methods.odgq import OdgqSettings
from robustq.hardening.methods.registry import SETTINGS
from robustq.hardening.state import restore
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import format_epsilon, load_recipe, parse_epsilon, recipe_names
from robustq.recipe.paper import PAPER_TABLES, by_table
from robustq.recipe.schema import Vocabulary
from robustq.workflow.training_run import prepare


def test_epsilon() -> None:
    texts = {"8/255": 8 / 255, "0.03": 0.03, 0.5: 0.5, "1": 1.0, "0": 0.0, " 4 / 255 ": 4 / 255}
    assert {text: parse_epsilon(text) for text in texts} == texts  # type: ignore[arg-type]
    assert [format_epsilon(value) for value in (8 / 255, 0.0, 0.03)] == ["8/255", "0/255", "0.03"]
    for bad in ("-1/255", "8", "nan", "inf", "8/0", "x", "", "1/2/3", math.nan, True):
        with pytest.raises(UsageError, match="epsilon"):
            parse_epsilon(bad)


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('method = "odgq"\nepoch = 3\nbatch_size = 1\nlr = "high"\nschedule = "linear"\n[natural]\nx = 1\n')
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(bad), vocabulary=Vocabulary(SETTINGS))
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
    ("override", "message"),
    [
        ("epochs=-1", "epochs = -1 must be at least 1"),
        ("epochs=1.5", "epochs = 1.5 is not an integer"),
        ("lr=nan", "lr = nan must be at least 0"),
        ("flip=1", "flip = 1 is not true or false"),
        ("crop_padding=5000", "crop_padding = 5000 must be at most 4096"),
        ("epsilon=true", "epsilon = True is not a number or a word"),
        ("precision=float16", "precision = 'float16' is unknown; known: float32, tf32, bfloat16 (nearest: bfloat16)"),
        ("milestones=[0]", "milestones = [0] must be positive integers (epochs)"),
        ("cuda_graphs=true", "cuda_graphs needs compile = true"),
        ("domains=2", "unknown key 'domains' (nearest: odgq.domains)"),
        ("odgq.domans=2", "unknown key 'odgq.domans' (nearest: odgq.domains)"),
        ("odgq.domains=x", "odgq.domains = 'x' is not a number"),
        ("method=odqg", "method = 'odqg' is unknown; known: odgq (nearest: odgq)"),
        ("method=3", "method = 3 is not a word"),
        ("weight_bits=5", "weight_bits = 5 is unknown; known: 4, 32"),
        ("architecture=resnet81", "architecture = 'resnet81' is unknown; known: resnet18 (nearest: resnet18)"),
        ("=3", "write --set key=value"),
        ("odgq=3", "unknown key 'odgq'"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(override: str, message: str) -> None:
    vocabulary = Vocabulary({"odgq": OdgqSettings}, ["resnet18"], [4, 32])
    with pytest.raises(RecipeError) as raised:
        load_recipe("odgq", (override,), vocabulary=vocabulary)
    assert message in str(raised.value)


def test_methods_without_training_or_labels_refuse_their_keys() -> None:
    with pytest.raises(RecipeError, match=r"lr has no meaning for method 'ptq', which does not train"):
        load_recipe("ptq", ("lr=0.1",), vocabulary=Vocabulary(SETTINGS))
    with pytest.raises(RecipeError, match=r"label_smoothing has no meaning for method 'rslad'"):
        load_recipe("rslad", ("label_smoothing=0.1",), vocabulary=Vocabulary(SETTINGS))
    assert not {"lr", "flip", "compile"} & load_recipe("ptq").to_dict().keys()


@pytest.mark.parametrize(("table", "data"), [("I", "cifar10"), ("II", "mnist")])
def test_tables_1_and_2_are_the_papers_rows(table: str, data: str) -> None:
    def row(kind: str, epochs: int, milestones: tuple[int, ...], method: str, **keys: Any) -> dict[str, Any]:
        return {
            "name": f"{data}/resnet20-w4a4-{kind}",
            "epochs": epochs,
            "milestones": milestones,
            "method": method,
        } | {"settings": keys}

    long, short = (300, (100, 200)), (150, (50, 100))
    ours: dict[str, Any] = {"mmd_weight": 3.0, "natural_gradient": True}
    assert_rows(
        table,
        {"data": data, "architecture": "resnet20", "weight_bits": 4, "act_bits": 4, "epsilon": 8 / 255}
        | {"batch_size": 512, "lr": 0.1, "schedule": "steps", "warmup_epochs": 0.0},
        [
            row("natural", *long, "natural"),
            row("pgd5", *long, "pgd", steps=5),
            row("bim5", *long, "pgd", steps=5, random_start=False),
            row("pgd7", *long, "pgd", steps=7),
            row("free4", 75, (25, 50), "free", repeats=4),
            row("free6", 50, (16, 33), "free", repeats=6),
            row("dq", *long, "dq"),
            row("odgq-nk1", *short, "odgq", domains=1, **ours),
            row("odgq-nk2", *short, "odgq", domains=2, **ours),
            row("odgq", *short, "odgq", domains=4, **ours),
            row("odgq-nk6", *short, "odgq", domains=6, **ours),
        ],
    )


def test_table_3_is_the_papers_rows() -> None:
    rows = []
    for bits, weight in ((4, 3.0), (1, 0.003)):
        base = {"weight_bits": bits, "act_bits": bits}
        name = f"imagenet/resnet18-w{bits}a{bits}"
        rows.append({"name": f"{name}-natural", "method": "natural", "epochs": 90, "milestones": (30, 60), **base})
        for domains, end in ((1, "-nk1"), (2, "-nk2"), (4, ""), (6, "-nk6")):
            settings = {"domains": domains, "mmd_weight": weight}
            rows.append({"name": f"{name}-odgq{end}", "method": "odgq", "settings": settings, **base})
            rows[-1] |= {"epochs": 45, "milestones": (15, 30)}
    assert_rows(
        "III",
        {"data": "imagenet", "architecture": "resnet18", "epsilon": 2 / 255, "batch_size": 256, "lr": 0.1}
        | {"schedule": "steps", "image_size": 224, "flip": True},
        rows,
    )


def test_table_4_changes_one_thing_at_a_time() -> None:
    base = load_recipe("cifar10/resnet20-w4a4-odgq")
    changes: list[dict[str, Any]] = [
        {},
        {"global_perturbation": "none"},
        {"mmd_weight": 0.0},
        {"mmd_weight": 0.3},
        {"global_perturbation": "noise"},
    ]
    common = {key: value for key, value in base.to_dict().items() if key not in ("name", "summary", "settings")}
    assert_rows(
        "IV",
        {**common, "milestones": base.milestones},
        [{"settings": {**base.settings, **change}} for change in changes],
    )


def test_table_5_changes_the_widths() -> None:
    rows: list[dict[str, Any]] = []
    for bits in (32, 8, 4, 3, 2, 1):
        weight = 0.003 if bits == 1 else 3.0
        widths = {"weight_bits": bits, "act_bits": bits}
        rows.append({"method": "natural", "epochs": 300, "settings": {}, **widths})
        settings = {"domains": 4, "mmd_weight": weight, "natural_gradient": True}
        rows.append({"method": "odgq", "epochs": 150, "settings": settings, **widths})
    assert_rows("V", {"data": "cifar10", "architecture": "resnet20", "epsilon": 8 / 255, "batch_size": 512}, rows)


def assert_rows(table: str, common: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The recipes of a table hold these values, row by row, and there are no others."""
    names = by_table([load_recipe(name) for name in recipe_names()])[table]
    assert len(names) == len(rows) == PAPER_TABLES[table][1]
    for place, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        recipe = load_recipe(name)
        assert recipe.paper_rows[table] == place, name
        for key, value in (common | row).items():
            assert getattr(recipe, key) == value, (name, key)


SHAPES = {"cifar10": (32, 32, 3), "mnist": (28, 28), "digits": (8, 8), "imagenet": (32, 32, 3), None: (16, 16)}


TRAINED = [name for name in recipe_names() if load_recipe(name).method != "ptq"]
SLOW = re.compile("imagenet/.*-nk|mnist/(?!.*odgq$)|cifar10/.*(-nk|mmd0|bim5|pgd7|free6)")


def stand_in(data: str | None) -> Dataset:
    """Seven random images in the data's shape, in three classes."""
    *sides, channels = (*SHAPES[data], 1)[:3]
    pixels = torch.randint(0, 256, (7, channels, *sides), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = TensorSplit(pixels, torch.arange(7) % 3)
    return Dataset("stand-in", ("a", "b", "c"), channels, sides[0], split, split, split)


@functools.cache
def network(architecture: str, bits: int, act_bits: int, data: str | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A calibrated network and its weights to put back: building Brevitas' layers takes longer than training them."""
    images = stand_in(data)
    torch.manual_seed(0)
    model = build_model(spec_of(architecture, bits, act_bits, data))
    calibrate(model, to_float(images.train.take(7)[0]), from_scratch=True)
    return model, {name: value.clone() for name, value in model.state_dict().items()}


def spec_of(architecture: str, bits: int, act_bits: int, data: str | None, epsilon: float | None = None) -> ModelSpec:
    images = stand_in(data)
    shape = (images.classes, images.channels, images.image_size)
    return ModelSpec(architecture, bits, act_bits, *shape, images.name, epsilon, images.class_names)


@pytest.mark.parametrize(
    "name",
    # Slow: rows that differ from one beside them in a number or in the data alone.
    [pytest.param(name, marks=pytest.mark.slow if SLOW.match(name) else ()) for name in TRAINED],
)
def test_every_recipe_takes_two_steps(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.summary
    net = (recipe.architecture or "resnet8", recipe.weight_bits or 4, recipe.act_bits or 4, recipe.data)
    (model, before), spec, data = network(*net), spec_of(*net, recipe.epsilon), stand_in(recipe.data)
    restore(model, before)
    recipe = replace(recipe, batch_size=4, lr=0.001)  # two batches, the second one short
    if recipe.method == "rslad":
        save_model(tmp_path / "teacher.pt", model, spec)
        recipe = replace(recipe, settings={**recipe.settings, "teacher": str(tmp_path / "teacher.pt")})
    training = prepare(
        model,
        spec,
        data,
        recipe,
        augment=usual_augment(data.name, data.image_size),
        seed=0,
        device=torch.device("cpu"),
    )
    losses = [training.take_step(batch) for batch in training.epoch_batches()]
    assert len(losses) == training.state.step == 2
    assert torch.stack(losses).isfinite().all()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    # At 1 bit a layer may pass no gradient on (signs clip at 1); everywhere else all weights move.
    assert spec.weight_bits == 1 or not [name for name in still if name.endswith("weight")]
    assert not torch.equal(model.get_parameter("fc.weight"), before["fc.weight"])
