"""ModelSpec: written and read, and every invalid value."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from robustq.errors import ModelFileError, UsageError
from robustq.models.spec import ModelSpec, build_model, check_architecture
from tests.models.small_nets import small_spec

FULL = ModelSpec(
    "resnet20", 4, 8, 3, 3, 32, "cifar10", 8 / 255, ("cat", "dog", "ant"), ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
)


@pytest.mark.parametrize("spec", [FULL, small_spec(32)])
def test_there_and_back(spec: ModelSpec) -> None:
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_unknown_keys_of_a_newer_version_and_an_absent_normalisation_do_no_harm() -> None:
    stored = small_spec(4).to_dict()
    del stored["normalisation"]
    assert ModelSpec.from_dict({**stored, "later": 1}) == small_spec(4)


@pytest.mark.parametrize("stored", [None, "resnet8"])
def test_what_is_no_table_is_refused(stored: Any) -> None:
    with pytest.raises(ModelFileError, match=rf"^spec is {type(stored).__name__}, not a table"):
        ModelSpec.from_dict(stored)


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(ModelSpec) if field.default is dataclasses.MISSING]
)
def test_a_missing_key_is_named(name: str) -> None:
    stored = small_spec(4).to_dict()
    del stored[name]
    with pytest.raises(ModelFileError, match=f"^spec lacks {name};"):
        ModelSpec.from_dict(stored)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("classes", value) for value in (0, -1, 4.0, "4", True, None)),
        *((name, 0) for name in ("weight_bits", "act_bits", "channels", "image_size")),
        ("architecture", 3),
        ("data", None),
        ("epsilon", "8/255"),
        ("epsilon", 1.5),
        ("epsilon", float("nan")),
        ("class_names", "0123456789"),
        ("class_names", [0, 1]),
        ("normalisation", 0.5),
        ("normalisation", ([0.5], [0.2, 0.2])),
        ("feature_layer", 3),
        ("shared_sum_scale", "yes"),
        *(("layer_bits", value) for value in (4, ["conv1"], {"conv1": "8"}, {"conv1": True}, {3: 4})),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ModelFileError, match=f"^spec says {name} = ") as caught:
        ModelSpec.from_dict({**small_spec(4).to_dict(), name: value})
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet21", "resnet20"), ("resnet-8", "resnet8"), ("Resnet20", "resnet20"), ("", "")]
)
def test_an_unknown_architecture_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown architecture '{name}'; known: resnet8, resnet20") as caught:
        check_architecture(name)
    assert f"(nearest: {nearest}" in str(caught.value)
    with pytest.raises(UsageError, match="unknown architecture"):
        build_model(dataclasses.replace(small_spec(4), architecture=name))
    with pytest.raises(UsageError, match="unknown architecture 'resnet50'; torchvision's is torchvision:resnet50"):
        check_architecture("resnet50")
