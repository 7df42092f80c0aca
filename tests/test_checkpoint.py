"""model.pt: there and back, whole or not at all, and one line for every way in which a file can be wrong."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pickle
import random
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustq.checkpoint import (
    FORMAT,
    VERSION,
    describe_state_dict,
    load_model,
    load_weights,
    save_atomically,
    save_model,
)
from robustq.data import to_float
from robustq.errors import ModelFileError, UsageError
from robustq.models.spec import build_model
from robustq.models.state_dict import is_bare_state_dict
from robustq.torch_file import read_checkpoint
from tests.models.small_nets import digits, perturbed, small_spec


def refusal(read: Callable[[], Any]) -> str:
    """The one line of the ModelFileError that ``read`` raises."""
    with pytest.raises(ModelFileError) as caught:
        read()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def written(tmp_path: Path, content: Any, name: str = "model.pt") -> Path:
    path = tmp_path / name
    torch.save(content, path)
    return path


def good(**changes: Any) -> dict[str, Any]:
    """What save_model writes for a 4-bit ResNet-8, with keys replaced."""
    spec = small_spec(4)
    state = dict(fresh_state())
    return {"format": FORMAT, "version": VERSION, "spec": spec.to_dict(), "state": state, "info": {}, **changes}


@functools.cache
def fresh_state() -> dict[str, Tensor]:
    return dict(build_model(small_spec(4)).state_dict())


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 4])
def test_there_and_back(tmp_path: Path, bits: int) -> None:
    spec = dataclasses.replace(small_spec(bits), epsilon=8 / 255)
    model = perturbed(small_spec(bits)).train()
    info = {"clean_accuracy": 0.9, "recipe": {"epochs": 3}, "notes": ["a", None]}
    save_model(tmp_path / "new" / "model.pt", model, spec, info=info)
    loaded, loaded_spec, loaded_info = load_model(tmp_path / "new" / "model.pt")
    assert (loaded_spec, loaded_info) == (spec, info)
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    x = to_float(digits()[0][:8])
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


def test_a_model_file_holds_weights_and_plain_values_only(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", perturbed(small_spec(4)), small_spec(4), info={"seed": 1})
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content.keys() == {"format", "version", "spec", "state", "info"}
    assert all(not value.requires_grad and value.device.type == "cpu" for value in content["state"].values())


def test_others_may_read_the_file(tmp_path: Path) -> None:
    save_atomically({}, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_mode & 0o777 == 0o644


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_info_becomes_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    info = {
        "accuracy": np.float64(0.5),
        "count": np.int64(3),
        "path": Path("a") / "b",
        "version": torch.__version__,
        "nested": [{"mean": np.float32(0.25)}, (1, None)],
    }
    save_model(path, build_model(small_spec(4)), small_spec(4), info=info)
    expected = {
        "accuracy": 0.5,
        "count": 3,
        "path": str(Path("a") / "b"),
        "version": str(torch.__version__),
        "nested": [{"mean": 0.25}, [1, None]],
    }
    assert load_model(path)[2] == expected


def test_info_that_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"info\['when'\] is a datetime"):
        save_model(tmp_path / "m.pt", build_model(small_spec(4)), small_spec(4), info={"when": datetime.now()})
    assert list(tmp_path.iterdir()) == []


# --- files that are no checkpoint ------------------------------------------------------------------------------------


FOREIGN = "is not a torch or safetensors file (no checkpoint could be read from it)"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; give a model.pt"),
        (b"", "is empty (0 bytes)"),
        (b"hello\n", FOREIGN),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), FOREIGN),
        (b"\x08\x0a\x12\x07pytorch", FOREIGN),
        (bytes(1000), FOREIGN),
    ],
    ids=["missing", "empty", "text", "png", "onnx", "zeros"],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    assert refusal(lambda: load_model(path)).startswith(f"{path}: {said}")
    assert refusal(lambda: load_model(tmp_path)).startswith(f"{tmp_path}: is a folder; give the .pt file in it")


def test_a_truncated_file_and_a_zip_archive_of_something_else(tmp_path: Path) -> None:
    path = written(tmp_path, good())
    whole = path.read_bytes()
    for share in (0.01, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert refusal(lambda: load_model(path)).startswith(f"{path}: is broken or truncated (")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    assert refusal(lambda: load_model(path)).startswith(f"{path}: is broken or truncated (")


def test_any_damage_is_one_line(tmp_path: Path) -> None:
    """torch.load has no error of its own: a damaged pickle ends in whatever its unpickler stumbles over."""
    draw = random.Random(0)
    content = {"a": torch.zeros(3), "b": [1, 2, {"x": "y"}]}
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(content, zipped)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    plain = pickle.dumps({"a": [1, 2, 3], "b": "xyz"}, protocol=2)
    path = tmp_path / "model.pt"
    refused = 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for whole in (zipped.getvalue(), legacy.getvalue(), plain):
            for _ in range(60):
                damaged = bytearray(whole[: draw.randrange(1, len(whole) + 1)])
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
                path.write_bytes(damaged)
                try:
                    read_checkpoint(path)
                except ModelFileError as error:
                    refused += 1
                    assert "\n" not in str(error)
    # A warning would be a second line of an error; an accepted file of torch before 1.6 has one.
    assert len(warned) <= 180 - refused and all("has no checksum" in str(one.message) for one in warned)
    assert refused > 120


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """In the weights torch.load would read on over it, and the network would be another one."""
    path = written(tmp_path, good())
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = [one for one in archive.infolist() if "/data/" in one.filename and one.file_size > 100][-1]
        content = archive.read(record.filename)
    whole[whole.index(content, record.header_offset) + record.file_size // 2] ^= 4
    path.write_bytes(whole)
    torch.load(path, weights_only=True)  # does not notice
    assert f"is damaged (the checksum of {record.filename} differs)" in refusal(lambda: load_model(path))


# --- files that would run code ---------------------------------------------------------------------------------------


class Payload:
    """Unpickling it runs a command that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return subprocess.call, (["touch", str(self.mark)],)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "inside a model"])
def test_no_code_of_a_file_runs(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "model.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    elif kind == "inside a model":
        torch.save(good(info={"note": Payload(mark)}), path)
    else:
        torch.save(Payload(mark), path, _use_new_zipfile_serialization=kind == "zip")
    message = refusal(lambda: load_model(path))
    assert not mark.exists()
    assert ("loading it would run code" in message) == (kind != "pickle")
    # The payload is a real one.
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()


# --- files of another content ----------------------------------------------------------------------------------------


def test_a_bare_state_dict_says_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path, build_model(small_spec(32)).state_dict())
    message = refusal(lambda: load_model(path))
    assert message.startswith(f"{path}: is a bare state dict") and "robustq harden FILE --data NAME" in message
    assert is_bare_state_dict(read_checkpoint(path))


@pytest.mark.parametrize("content", [[1, 2], {}, torch.zeros(3), {"format": "other"}])
def test_other_content(tmp_path: Path, content: Any) -> None:
    path = written(tmp_path, content)
    message = refusal(lambda: load_model(path))
    assert f"holds a {type(content).__name__} that robustq did not write" in message
    assert not is_bare_state_dict(content)


@pytest.mark.parametrize("version", [2, "1", None])
def test_another_version(tmp_path: Path, version: Any) -> None:
    path = written(tmp_path, good(version=version))
    assert f"version {version!r} of the format, this robustq reads {VERSION}" in refusal(lambda: load_model(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "resnet9"}, "unknown architecture 'resnet9'"),
        ({"weight_bits": 5}, "weight bits 5 are not in the table"),
        ({"classes": 0}, "classes = 0"),
    ],
)
def test_a_spec_that_cannot_be_built_names_the_file(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = written(tmp_path, good(spec={**small_spec(4).to_dict(), **change}))
    message = refusal(lambda: load_model(path))
    assert message.startswith(f"{path}: ") and said in message


@pytest.mark.parametrize("name", ["classes", "channels"])
def test_a_spec_larger_than_its_weights_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It would take 256 GB for a billion classes."""
    path = written(tmp_path, good(spec={**small_spec(4).to_dict(), name: 10**9}))

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("built")

    monkeypatch.setattr("robustq.checkpoint.build_model", build)
    assert f"{name} = 1000000000" in refusal(lambda: load_model(path))


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: without(state, "fc.weight"), "do not fit the spec in 1 entries (fc.weight"),
        (lambda state: {**state, "extra": torch.zeros(1)}, "do not fit the spec in 1 entries (extra"),
        (lambda state: {**state, "fc.bias": torch.zeros(11)}, "do not fit the spec in 1 entries (fc.bias"),
        (lambda state: {**state, "fc.bias": torch.full((10,), math.nan)}, "fc.bias holds NaN or Inf"),
        (lambda state: {}, "holds no weights"),
        (lambda state: {**state, "fc.bias": [0.0] * 10}, "holds no weights"),
    ],
    ids=["missing", "left over", "shape", "NaN", "empty", "no tensor"],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], said: str) -> None:
    path = written(tmp_path, good(state=change(good()["state"])))
    message = refusal(lambda: load_model(path))
    assert message.startswith(f"{path}: ") and said in message


# --- bare state dicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda state: without(state, "layer2.0.bn1.bias"), "1 entries (layer2.0.bn1.bias"),
        (lambda state: without(without(state, "bn1.weight"), "bn1.bias"), "2 entries (bn1.weight, bn1.bias"),
    ],
)
def test_a_near_miss_names_the_differences(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], differing: str
) -> None:
    state = dict(build_model(small_spec(32)).state_dict())
    message = refusal(lambda: describe_state_dict(change(state), Path("weights.pt")))
    assert f"nearest: resnet8, which differs in {differing}" in message


# --- weights from one width to another -------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "wanted"), [(32, 4), (8, 2), (1, 4), (4, 32)])
def test_weights_go_into_a_network_of_any_width(given: int, wanted: int) -> None:
    source, target = perturbed(small_spec(given)), build_model(small_spec(wanted))
    thresholds = {name: value.clone() for name, value in target.state_dict().items() if name.endswith("log_threshold")}
    load_weights(target, source.state_dict(), Path("weights.pt"))
    for name, value in target.state_dict().items():
        # Activation scales of another width mean nothing: they are left to calibration.
        assert torch.equal(value, thresholds[name] if name in thresholds else source.state_dict()[name]), name
    assert bool(thresholds) == (wanted != 32)


def test_refused_weights_leave_the_network_as_it_was() -> None:
    target = build_model(small_spec(4))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = dict(build_model(small_spec(32)).state_dict())
    for wrong in (without(state, "conv1.weight"), {**state, "conv1.weight": torch.full((16, 1, 3, 3), math.nan)}):
        assert "conv1.weight" in refusal(lambda wrong=wrong: load_weights(target, wrong, Path("weights.pt")))  # type: ignore[misc]
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("conv1", [{}, {"conv1.weight": torch.zeros(16)}])
def test_a_state_dict_of_something_else(conv1: dict[str, Tensor]) -> None:
    message = refusal(lambda: describe_state_dict({**conv1, "fc.weight": torch.zeros(10, 64)}, Path("weights.pt")))
    assert "unknown architecture (no conv1.weight and fc.weight); known: resnet8, resnet20" in message
