"""robustq.data: what every split promises, the fixed parts, and one line of error for each way data can be wrong."""

from __future__ import annotations

import pickle
import re
import urllib.error
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
import torchvision
from PIL import Image
from torch import Tensor

import robustq.data.folder
from robustq.data import (
    DATASET_NAMES,
    NO_AUGMENT,
    Augment,
    Dataset,
    Split,
    StreamedSplit,
    TensorSplit,
    load_dataset,
    to_float,
)
from robustq.data.augment import crop_and_flip, draw_crops_and_flips
from robustq.data.folder import imagenet_class_names
from robustq.data.splits import split_by_name, stratified_indices, stratified_split
from robustq.errors import DataError, RobustqError, RobustqWarning, UsageError

BOTH = Augment(crop_padding=2, flip=True)


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tensor_split(count: int = 23, channels: int = 3, side: int = 6) -> TensorSplit:
    # Image i holds the value i in its first pixel and is unique, so that a batch tells which images it holds.
    images = torch.from_numpy(pixels(count, channels, side, side))
    images[:, 0, 0, 0] = torch.arange(count, dtype=torch.uint8)
    return TensorSplit(images, torch.arange(count) % 5)


def write_images(
    folder: Path, counts: dict[str, int], *, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0
) -> Path:
    """COUNTS[name] images of (width, height) `size` in folder/name, 00.png, 01.png, ..."""
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        shape = (count, size[1], size[0], *([3] if mode == "RGB" else []))
        for number, image in enumerate(pixels(*shape, seed=100 * seed + place)):
            Image.fromarray(image).save(folder / name / f"{number:02}.png")
    return folder


def streamed(folder: Path, *, workers: int = 0, channels: int = 3, **options: Any) -> StreamedSplit:
    """24 images of 16x12 in two classes, made into 7x7."""
    if not folder.exists():
        write_images(folder, {"cat": 14, "dog": 10}, size=(16, 12))
    paths = sorted(folder.rglob("*.png"))
    labels = torch.tensor([int(path.parent.name == "dog") for path in paths])
    return StreamedSplit(paths, labels, image_size=7, channels=channels, workers=workers, **options)


def gather(split: Split, batch_size: int = 4, **options: Any) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*split.batches(batch_size, device="cpu", **options), strict=True)  # a batch unpacks as x, y
    return torch.cat(xs), torch.cat(ys)


def write_npz(path: Path, **changes: Any) -> Path:
    """A good file of 40 + 8 images, 4 classes, 6x6 RGB, with the named arrays replaced; None leaves one out."""
    arrays: dict[str, Any] = {
        "x_train": pixels(40, 6, 6, 3),
        "y_train": np.arange(40) % 4,
        "x_test": pixels(8, 6, 6, 3, seed=1),
        "y_test": np.arange(8) % 4,
    }
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture(params=["tensor", "streamed"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    made: Split = tensor_split() if request.param == "tensor" else streamed(tmp_path / "images")
    return made


# The contract of every split


def test_batches_in_order_hold_every_image_once_in_the_promised_types(split: Split) -> None:
    batches = list(split.batches(5, device="cpu"))
    assert [len(x) for x, _ in batches] == [5] * (len(split) // 5) + [len(split) % 5]
    images, labels = split.take(0)
    assert images.dtype == torch.uint8 and labels.dtype == split.labels.dtype == torch.int64
    for x, y in batches:
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous() and x.min() >= 0 and x.max() <= 1
    x, y = gather(split)
    # Exact: pixel / 255 is one correctly rounded division, numpy's as well as torch's.
    np.testing.assert_array_equal(x.numpy(), images.numpy().astype(np.float32) / np.float32(255))
    assert torch.equal(x, to_float(images)) and torch.equal(y, labels) and torch.equal(y, split.labels)


def test_an_epoch_is_a_pure_function_of_seed_and_epoch(split: Split) -> None:
    x, y = gather(split, seed=3, epoch=5, augment=BOTH)
    torch.manual_seed(1)
    list(split.batches(4, device="cpu", seed=9))
    again, labels = gather(split, 7, seed=3, epoch=5, augment=BOTH)  # another batch size too
    assert torch.equal(x, again) and torch.equal(y, labels)
    for seed, epoch in [(3, 6), (4, 5), (5, 3)]:
        assert not torch.equal(x, gather(split, seed=seed, epoch=epoch, augment=BOTH)[0])


def test_batches_leave_the_random_state_of_the_process_alone(split: Split) -> None:
    before = torch.get_rng_state()
    gather(split, seed=3, augment=BOTH)
    split.take(3)
    assert torch.equal(before, torch.get_rng_state())


def test_shuffling_permutes_images_together_with_labels(split: Split) -> None:
    images, labels = split.take(0)
    known = {image.numpy().tobytes(): int(label) for image, label in zip(to_float(images), labels, strict=True)}
    x, y = gather(split, seed=0)
    assert [known.pop(image.numpy().tobytes()) for image in x] == y.tolist()
    assert not known  # every image came, and came once
    assert not torch.equal(y, labels)
    batches = list(split.batches(4, device="cpu", seed=0))
    places = torch.cat([batch.indices for batch in batches])
    assert places.dtype == torch.int64 and places.tolist() != sorted(places.tolist())
    assert torch.equal(torch.cat([batch.x for batch in batches]), to_float(images[places]))
    assert torch.equal(torch.cat([batch.y for batch in batches]), labels[places])


def test_without_a_seed_nothing_is_augmented(split: Split) -> None:
    assert torch.equal(gather(split, augment=BOTH)[0], gather(split)[0])


def test_epochs_differ_in_augmentation_and_not_only_in_order(split: Split) -> None:
    def kinds(epoch: int, augment: Augment) -> set[bytes]:
        return {image.numpy().tobytes() for image in gather(split, seed=0, epoch=epoch, augment=augment)[0]}

    assert kinds(0, NO_AUGMENT) == kinds(1, NO_AUGMENT)
    assert len(kinds(0, BOTH) & kinds(1, BOTH)) < len(split) / 2


@pytest.mark.parametrize("n", [1, 2, 7, 22])
def test_take_is_evenly_spaced(split: Split, n: int) -> None:
    images, labels = split.take(n)
    everything, all_labels = split.take(0)
    places = [i * len(split) // n for i in range(n)]
    assert torch.equal(images, everything[places]) and torch.equal(labels, all_labels[places])


def test_take_gives_everything_for_zero_or_more_than_there_is(split: Split) -> None:
    assert len(split.take(0)[0]) == len(split.take(1000)[1]) == len(split)
    with pytest.raises(UsageError, match="-1"):
        split.take(-1)


def test_take_from_a_split_sorted_by_class_gives_every_class(tmp_path: Path) -> None:
    split = TensorSplit(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), torch.arange(1000) // 100)
    assert split.take(20)[1].bincount().tolist() == [2] * 10
    assert set(streamed(tmp_path / "images").take(4)[1].tolist()) == {0, 1}


def test_a_batch_size_below_one_is_refused_before_iteration(split: Split) -> None:
    with pytest.raises(UsageError, match="batch size is 0"):
        split.batches(0, device="cpu")


def test_a_batch_can_be_changed_without_changing_the_split(split: Split) -> None:
    images, labels = split.take(0)
    for options in ({}, {"seed": 0}):
        for x, y in split.batches(50, device="cpu", **options):  # type: ignore[arg-type]
            x.zero_()
            y.zero_()
    assert torch.equal(gather(split)[0], to_float(images)) and torch.equal(gather(split)[1], labels)
    assert torch.equal(split.labels, labels) and labels.any()


# Augmentation of tensors


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_and_flip_equals_the_slow_way_image_by_image(channels: int, padding: int) -> None:
    images = pixels(64, channels, 5, 7)  # not square: rows and columns must not be mixed up
    generator = torch.Generator().manual_seed(0)
    offsets, flips = draw_crops_and_flips(Augment(padding, True), 64, generator=generator)
    got = crop_and_flip(torch.from_numpy(images), offsets, flips, padding=padding)
    for image, (row, column), flip, result in zip(images, offsets.tolist(), flips.tolist(), got, strict=True):
        expected = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        expected = expected[:, row : row + 5, column : column + 7]
        np.testing.assert_array_equal(result.numpy(), expected[:, :, ::-1] if flip else expected)


def test_batches_apply_crop_and_flip_to_each_image_on_its_own() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    split = TensorSplit(image.expand(4000, 1, 5, 5).contiguous(), torch.zeros(4000, dtype=torch.int64))
    x, _ = gather(split, 500, seed=0, augment=Augment(crop_padding=1, flip=True))
    padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1))
    crops = [padded[:, i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    shapes = torch.stack([to_float(v) for crop in crops for v in (crop, crop.flip(2))])
    matches = (x[:, None] == shapes).flatten(2).all(2)
    assert matches.sum(1).eq(1).all()
    # 4000 / 18 = 222 of each; 5 standard deviations (14.5 each) around it.
    assert matches.sum(0).min() > 150 and matches.sum(0).max() < 295


def test_crop_alone_never_flips_and_flip_alone_never_crops() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets, flips = draw_crops_and_flips(Augment(crop_padding=4), 500, generator=generator)
    assert not flips.any() and set(offsets.flatten().tolist()) == set(range(9))
    assert not torch.equal(offsets[:, 0], offsets[:, 1])
    offsets, flips = draw_crops_and_flips(Augment(flip=True), 500, generator=generator)
    assert not offsets.any() and 150 < flips.sum() < 350  # 250 expected, 9 standard deviations


def test_augment_refuses_negative_padding() -> None:
    with pytest.raises(UsageError, match="-1"):
        Augment(crop_padding=-1)


def test_tensor_split_copies_itself_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    split, moves, move = tensor_split(), [], Tensor.to

    def record(tensor: Tensor, *to: Any, **options: Any) -> Tensor:
        moves.append(tensor is split.images)
        return move(tensor, *to, **options)

    monkeypatch.setattr(Tensor, "to", record)
    for device in ("meta", torch.device("meta"), "meta"):
        list(split.batches(4, device=device, seed=1, augment=BOTH))
    assert sum(moves) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_batches_as_the_cpu() -> None:
    split = tensor_split(200)
    x, y = gather(split, seed=1, augment=BOTH)
    batches = list(split.batches(4, device="cuda", seed=1, augment=BOTH))
    memory = torch.cuda.memory_allocated()
    split.batches(4, device="cuda:0")  # the same device under another name: no second copy
    assert torch.cuda.memory_allocated() - memory < split.images.nbytes
    assert all(x.is_cuda and y.is_cuda for x, y in batches)
    # Bit for bit: all is drawn on the CPU, and the division by 255 is a true one on both.
    assert torch.equal(x, torch.cat([x.cpu() for x, _ in batches]))
    assert torch.equal(y, torch.cat([y.cpu() for _, y in batches]))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 1, 2, 2), torch.zeros(3), "float32"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3), r"\(3, 2, 2\)"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0), "N > 0"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), r"\(2,\)"),
    ],
)
def test_tensor_split_refuses_what_is_no_split(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TensorSplit(images, labels)


# Fixed choices


def test_stratified_places_keeps_class_shares_to_the_image() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100, generator=torch.manual_seed(0))]
    chosen = stratified_indices(labels, 10, at_least=0, spare=1, seed=0)
    assert labels[chosen].bincount().tolist() == [5, 3, 2]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    # 11 images: shares 5.5, 3.3, 2.2, so the first class lost most by rounding down.
    assert labels[stratified_indices(labels, 11, at_least=0, spare=1, seed=0)].bincount().tolist() == [6, 3, 2]
    assert not torch.equal(chosen, stratified_indices(labels, 10, at_least=0, spare=1, seed=1))
    # Within a class the choice is spread, not the first ones.
    assert stratified_indices(torch.zeros(1000, dtype=torch.int64), 100, at_least=0, spare=0, seed=0).max() > 800


def test_stratified_places_respects_both_bounds() -> None:
    labels = torch.tensor([0] * 97 + [1, 2, 2])
    assert labels[stratified_indices(labels, 4, at_least=1, spare=0, seed=0)].bincount().tolist() == [2, 1, 1]
    assert labels[stratified_indices(labels, 100, at_least=0, spare=1, seed=0)].bincount().tolist() == [96, 0, 1]


def test_stratified_parts_are_disjoint_and_complete() -> None:
    labels = torch.arange(101) % 7
    rest, part = stratified_split(labels, 0.1, seed=0)
    assert len(part) == 10 and sorted(rest.tolist() + part.tolist()) == list(range(101))
    assert len(stratified_split(torch.arange(6), 0.1, seed=0)[1]) == 0  # one image per class: none to give
    assert len(stratified_split(torch.tensor([0, 0]), 0.1, seed=0)[1]) == 1


def test_digits_are_scaled_split_and_stay_as_they_are() -> None:
    data = load_dataset("digits")
    assert (data.name, data.classes, data.channels, data.image_size) == ("digits", 10, 1, 8)
    assert data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.holdout), len(data.test)) == (1294, 144, 359)
    # Scaled independently, in integers. The only tie is 8 * 255 / 16 = 127.5, and 128 is both up and even.
    original = sklearn.datasets.load_digits()
    expected = ((original.images.astype(int) * 510 + 16) // 32).astype(np.uint8).reshape(1797, -1)
    mine = np.concatenate([part.take(0)[0].numpy().reshape(-1, 64) for part in (data.train, data.holdout, data.test)])
    assert {row.tobytes() for row in mine} == {row.tobytes() for row in expected}
    assert mine.max() == 255
    whole = torch.from_numpy(original.target).bincount()
    assert ((data.test.labels.bincount() - 0.2 * whole).abs() < 1).all()
    assert ((data.holdout.labels.bincount() - 0.08 * whole).abs() < 1).all()
    # Golden: published numbers rest on these very splits. Whoever changes them breaks comparisons with older results.
    assert [
        zlib.crc32(part.take(0)[0].numpy().tobytes()) for part in (data.train, data.holdout, data.test)
    ] == GOLDEN_DIGITS


GOLDEN_DIGITS = [1781223979, 36439090, 3983239834]


def same_images(one: Split, other: Split) -> bool:
    return torch.equal(one.take(0)[0], other.take(0)[0])


def test_train_images_leave_the_holdout_and_the_test_part_alone() -> None:
    full, data = load_dataset("digits"), load_dataset("digits", train_images=200)
    assert len(data.train) == 200
    assert same_images(data.holdout, full.holdout) and same_images(data.test, full.test)
    counts = data.train.labels.bincount()
    assert counts.min() >= 19 and counts.max() <= 21
    known = {image.numpy().tobytes() for image in full.train.take(0)[0]}
    assert all(image.numpy().tobytes() in known for image in data.train.take(0)[0])


def test_train_images_keep_rare_classes(tmp_path: Path) -> None:
    labels = np.r_[np.zeros(97, int), 1, 2, 2]
    path = write_npz(tmp_path / "rare.npz", x_train=pixels(100, 6, 6, 3), y_train=labels, y_test=np.zeros(8, int))
    data = load_dataset(str(path), train_images=4)
    assert sorted(set(data.train.labels.tolist())) == [0, 1, 2] and len(data.train) == 4


@pytest.mark.parametrize(("count", "message"), [(9, "give 10 to 1294"), (1295, "1294"), (-1, "-1")])
def test_train_images_out_of_range(count: int, message: str) -> None:
    with pytest.raises(RobustqError, match=message):
        load_dataset("digits", train_images=count)


# Names


class TinyTorchvision:
    """Stands for a class of torchvision.datasets: the same attributes, 40 + 10 images."""

    side, colour, classes = 32, True, [f"class {k}" for k in range(10)]

    def __init__(self, root: str, train: bool, download: bool) -> None:
        archive = Path(root, "sub", f"archive-{train}")
        if not download and not archive.exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        if download:
            print("Downloading")  # as torchvision used to do on stdout
            archive.parent.mkdir(exist_ok=True)
            with torchvision.datasets.utils.tqdm(total=7, unit="B", unit_scale=True) as progress:
                archive.write_text("content")
                progress.update(7)
        count = 40 if train else 10
        images = pixels(count, self.side, self.side, *([3] if self.colour else []), seed=int(train))
        labels = np.arange(count) % 10
        # CIFAR: ndarray and list; MNIST: two tensors.
        self.data: Any = images if self.colour else torch.from_numpy(images)
        self.targets: Any = labels.tolist() if self.colour else torch.from_numpy(labels)


class TinyMnist(TinyTorchvision):
    side, colour, classes = 28, False, ["0 - zero", "T-shirt/top", *(str(k) for k in range(2, 10))]


@pytest.mark.parametrize(
    ("name", "attribute", "kind"),
    [
        ("mnist", "MNIST", TinyMnist),
        ("fashion-mnist", "FashionMNIST", TinyMnist),
        ("cifar10", "CIFAR10", TinyTorchvision),
        ("cifar100", "CIFAR100", TinyTorchvision),
    ],
)
def test_torchvision_sets(
    name: str,
    attribute: str,
    kind: type[TinyTorchvision],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torchvision.datasets, attribute, kind)
    data = load_dataset(name, root=tmp_path)
    assert (data.name, data.channels, data.image_size) == (name, 3 if kind.colour else 1, kind.side)
    assert (len(data.train), len(data.holdout), len(data.test)) == (36, 4, 10)
    expected = pixels(10, kind.side, kind.side, *([3] if kind.colour else []), seed=0).reshape(10, kind.side, -1)
    images, labels = data.test.take(0)
    assert torch.equal(images.permute(0, 2, 3, 1).reshape(10, kind.side, -1), torch.from_numpy(expected))
    assert labels.tolist() == list(range(10))
    assert data.class_names[:2] == (("class 0", "class 1") if kind.colour else ("0", "T-shirt/top"))
    told = capsys.readouterr()
    assert told.out == told.err == ""  # stdout is for results, and a library call prints nothing
    # Everything lies in its place, nothing aside, and nothing is downloaded twice.
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["archive-False", "archive-True", "sub"]
    again = load_dataset(name, root=tmp_path)
    assert same_images(again.test, data.test) and capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_a_download_that_is_cut_off_leaves_nothing(
    fault: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class CutOff(TinyTorchvision):
        def __init__(self, root: str, train: bool, download: bool) -> None:
            if not train and download:
                Path(root, "half").write_text("hal")
                raise fault
            super().__init__(root, train, download)

    theirs = torchvision.datasets.utils.tqdm
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CutOff)
    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else DataError):
        load_dataset("cifar10", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torchvision.datasets.utils.tqdm is theirs


def test_a_failed_download_is_one_line_that_names_the_alternatives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**_: Any) -> None:
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    check_error("cifar10", r"cifar10.*no route to host.*--data FILE.npz.*FOLDER", root=tmp_path)


@pytest.mark.parametrize(("variable", "expected"), [("/somewhere", "/somewhere"), (None, "~/.cache/robustq")])
def test_root_comes_from_the_environment(variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = []

    class Recorder(TinyMnist):
        def __init__(self, root: str, train: bool, download: bool) -> None:
            roots.append(root)
            self.data, self.targets = torch.from_numpy(pixels(40, 28, 28)), torch.arange(40) % 10

    monkeypatch.setattr(torchvision.datasets, "MNIST", Recorder)
    monkeypatch.delenv("ROBUSTQ_DATA", raising=False)
    if variable:
        monkeypatch.setenv("ROBUSTQ_DATA", variable)
    load_dataset("mnist")
    assert roots == [str(Path(expected).expanduser())] * 2
    load_dataset("mnist", root=Path("/other"))
    assert roots[2:] == ["/other"] * 2


def check_error(name: str | Path, pattern: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(str(name), **{"workers": 0, **options})
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message


def test_unknown_names_are_told_the_known_and_the_nearest() -> None:
    check_error("CIFAR-10", "'CIFAR-10', did you mean cifar10.*" + ".*".join(DATASET_NAMES))
    check_error("fashionmnist", "did you mean fashion-mnist")
    check_error("xyz", "'xyz'\\? Known")
    check_error("", "''")


@pytest.mark.parametrize("name", ["some/folder", "absent.npz", "./digits", "~no-such-user/x"])
def test_a_path_that_is_absent(name: str) -> None:
    check_error(name, f"{re.escape(name)} does not exist")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"x")
    check_error(tmp_path / "x.zip", r"x\.zip is neither")


def test_image_size_and_workers_out_of_range(tmp_path: Path) -> None:
    for options, message in [({"image_size": 0}, "image_size is 0"), ({"workers": -1}, "workers is -1")]:
        with pytest.raises(UsageError, match=message):
            load_dataset("digits", **options)  # type: ignore[arg-type]
    check_error("digits", "image_size is 16.*8x8", image_size=16)
    assert load_dataset("digits", image_size=8).image_size == 8


# .npz


@pytest.mark.parametrize(
    ("shape", "channels", "label_type", "column"),
    [((6, 6), 1, np.int32, False), ((6, 6, 1), 1, np.uint8, True), ((6, 6, 3), 3, np.uint64, True)],
)
def test_npz(
    tmp_path: Path, shape: tuple[int, ...], channels: int, label_type: type[np.integer[Any]], column: bool
) -> None:
    def labels(count: int) -> np.ndarray[Any, Any]:
        return (np.arange(count) % 4).astype(label_type).reshape((-1, 1) if column else -1)

    x_test = pixels(8, *shape, seed=1)
    path = write_npz(
        tmp_path / "data.npz", x_train=pixels(40, *shape), x_test=x_test, y_train=labels(40), y_test=labels(8)
    ).rename(tmp_path / "DATA.NPZ")
    data = load_dataset(str(path))
    assert data.name == str(path) and Path(data.name).is_absolute()
    assert (data.channels, data.image_size, data.class_names) == (channels, 6, ("0", "1", "2", "3"))
    assert (len(data.train), len(data.holdout), len(data.test)) == (36, 4, 8)
    images, got = data.test.take(0)
    assert got.tolist() == [0, 1, 2, 3] * 2
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), x_test.reshape(8, 6, 6, channels))
    assert load_dataset(str(path), train_images=20).train.labels.bincount().tolist() == [5] * 4


OBJECTS = np.array([{"a": 1}] * 40, dtype=object)
BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"x_test": None, "y_test": None}, "lacks x_test, y_test .it holds x_train, y_train"),
    ({"y_train": OBJECTS}, "y_train of .* cannot be read .*Object arrays"),
    ({"x_train": pixels(40, 6, 6, 3) / 255.0}, "x_train of .* is float64"),
    ({"x_train": pixels(40, 3, 6, 6)}, r"x_train of .*\(40, 3, 6, 6\)"),
    ({"x_test": pixels(8, 36)}, r"x_test of .*\(8, 36\)"),
    ({"x_train": pixels(40, 6, 5, 3)}, "x_train of .* 6x5"),
    ({"x_train": pixels(0, 6, 6, 3), "y_train": np.arange(0)}, "x_train of .* no images"),
    ({"x_test": pixels(0, 6, 6, 3), "y_test": np.arange(0)}, "x_test of .* no images"),
    ({"x_test": pixels(8, 6, 6)}, r"differ in channels or size.*\(6, 6, 3\).*\(6, 6\)"),
    ({"x_test": pixels(8, 7, 7, 3)}, "differ in channels or size"),
    ({"y_train": np.arange(39) % 4}, "40 images in x_train but 39 labels in y_train"),
    ({"y_test": np.arange(8) % 4 * 1.0}, "y_test of .* is float64"),
    ({"y_train": np.eye(4, dtype=int)[np.arange(40) % 4]}, r"y_train of .*\(40, 4\)"),
    ({"y_train": np.arange(40) % 4 - 1}, "y_train of .* label -1"),
    ({"y_test": np.arange(8)}, "y_test of .* label 4, which y_train lacks"),
    ({"y_train": np.full(40, 2**63, dtype=np.uint64)}, "y_train of .* label 9223372036854775808"),
    ({"y_train": np.arange(40) % 4 * 1000, "y_test": np.zeros(8, int)}, "label 3000 for 40 images"),
    ({"y_train": np.zeros(40, int), "y_test": np.zeros(8, int)}, r"one class only"),
    ({"x_train": pixels(4, 6, 6, 3), "y_train": np.arange(4)}, "one training image per class"),
]


@pytest.mark.parametrize(("changes", "pattern"), BAD_ARRAYS)
def test_npz_with_bad_arrays(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    path = write_npz(tmp_path / "bad.npz", **changes)
    check_error(path, pattern)
    check_error(path, re.escape(str(path)))


class Payload:
    """Unpickling it would make a file: the proof that nothing was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_npz_never_unpickles(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    write_npz(tmp_path / "a.npz", y_test=np.array([Payload(trap)], dtype=object))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Payload(trap)))
    for name in ("a.npz", "b.npz"):
        check_error(tmp_path / name, name)
    assert not trap.exists()


def test_npz_that_is_broken(tmp_path: Path) -> None:
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 255  # inside x_train's bytes: only the checksum can tell
    cases = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "npy": (tmp_path / "array.npy").read_bytes(),
        "flipped": bytes(flipped),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        check_error(path, f"{name}.npz " + ("cannot be read .*CRC" if name == "flipped" else "is not a whole"))


# Folders


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"dog": 12, "ant": 9, "cat": 9})
    write_images(tmp_path / "test", {"dog": 2, "cat": 3}, seed=1)
    data = load_dataset(str(tmp_path), workers=0)
    assert data.name == str(tmp_path) and data.class_names == ("ant", "cat", "dog")
    assert (data.channels, data.image_size, data.classes) == (3, 8, 3)
    assert isinstance(data.train, TensorSplit) and isinstance(data.test, TensorSplit)
    assert (len(data.train), len(data.holdout)) == (27, 3)
    # The test part lacks "ant": its labels are still training's numbers.
    images, labels = data.test.take(0)
    assert labels.tolist() == [1, 1, 1, 2, 2]
    # Images that have the network's size already are not touched: bit for bit.
    expected = np.concatenate([pixels(3, 8, 8, 3, seed=101), pixels(2, 8, 8, 3, seed=100)])
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


def test_folder_takes_val_where_test_is_absent(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 5, "b": 5})
    write_images(tmp_path / "val", {"a": 1, "b": 2})
    assert len(load_dataset(str(tmp_path), workers=0).test) == 3


def test_folder_of_classes_only_gives_a_fifth_away(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 30, "b": 20})
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = load_dataset(str(tmp_path), workers=0)
    # Golden: where a file goes depends on its name alone, on every machine.
    assert [part.labels.bincount().tolist() for part in (data.train, data.holdout, data.test)] == GOLDEN_FOLDER
    again = load_dataset(str(tmp_path), workers=0)
    for part, same in [(data.train, again.train), (data.holdout, again.holdout), (data.test, again.test)]:
        assert torch.equal(part.take(0)[0], same.take(0)[0])
    seen = [image.numpy().tobytes() for part in (data.train, data.holdout, data.test) for image in part.take(0)[0]]
    assert len(set(seen)) == 50


GOLDEN_FOLDER = [[21, 13], [2, 2], [7, 5]]


def test_a_file_more_or_less_moves_no_other_between_training_and_test(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 40, "b": 40})
    before = load_dataset(str(tmp_path), workers=0)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a" / "000-first-in-order.png")
    (tmp_path / "b" / "20.png").unlink()
    after = load_dataset(str(tmp_path), workers=0)

    def images(*parts: Split) -> set[bytes]:
        return {image.numpy().tobytes() for part in parts for image in part.take(0)[0]}

    assert not images(before.test) & images(after.train, after.holdout)
    assert not images(before.train, before.holdout) & images(after.test)


def test_named_parts_take_a_fifth_and_leave_no_class_empty() -> None:
    names = [f"{label}/{number}.png" for label in range(5) for number in range(2000)]
    labels = torch.arange(5).repeat_interleave(2000)
    rest, part = split_by_name(names, labels)
    assert sorted(rest.tolist() + part.tolist()) == list(range(10_000))
    # 4 standard deviations of a binomial share of 0.2 among 2000 are 0.036.
    assert ((labels[part].bincount() / 2000 - 0.2).abs() < 0.036).all()
    for number in range(50):
        rest, part = split_by_name([f"a{number}", f"b{number}", f"c{number}"], torch.tensor([0, 0, 1]))
        assert len(part) == 1 and sorted(rest.tolist() + part.tolist()) == [0, 1, 2] and 2 in rest.tolist()


def test_bad_images_are_skipped_only_when_asked_and_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "b" / "03.png").write_bytes(b"no image")
    original = (tmp_path / "a" / "07.png").read_bytes()
    (tmp_path / "a" / "07.png").write_bytes(original[: len(original) // 2])
    check_error(tmp_path, "cannot be read as an image.*--skip-bad-images")
    with pytest.warns(RobustqWarning, match=r"skipped 2 of 24 images.*a/07\.png, .*b/03\.png$"):
        data = load_dataset(str(tmp_path), workers=0, skip_bad_images=True)
    assert len(data.train) + len(data.holdout) + len(data.test) == 22
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"no image")
    with pytest.warns(RobustqWarning, match="skipped 13 of 24"), pytest.raises(DataError, match="b has no images"):
        load_dataset(str(tmp_path), workers=0, skip_bad_images=True)


def test_folder_is_grey_only_when_every_image_is(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 6, "b": 6}, mode="L")
    data = load_dataset(str(tmp_path), workers=0)
    assert data.channels == 1 and data.train.take(0)[0].shape[1:] == (1, 8, 8)
    write_images(tmp_path, {"b": 1})
    assert load_dataset(str(tmp_path), workers=0).channels == 3
    # Not even a training subset of grey images only changes that.
    assert load_dataset(str(tmp_path), workers=0, train_images=4).channels == 3


def test_folder_images_are_scaled_and_cut_in_the_middle(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 6, "b": 6}, size=(24, 12))
    data = load_dataset(str(tmp_path), image_size=6, workers=0)
    assert data.image_size == 6
    images = {image.numpy().tobytes() for part in (data.train, data.holdout, data.test) for image in part.take(0)[0]}
    for path in tmp_path.rglob("*.png"):  # independently, by Pillow alone: to 12x6, then columns 3..8
        scaled = np.asarray(Image.open(path).resize((12, 6), Image.Resampling.BILINEAR))[:, 3:9]
        assert scaled.transpose(2, 0, 1).tobytes() in images


def test_an_image_error_stays_on_one_line_whatever_pillow_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError("two\nlines")

    write_images(tmp_path, {"a": 5, "b": 5})
    monkeypatch.setattr(Image, "open", fail)
    check_error(tmp_path, r"png cannot be read as an image \(two lines\)")


def make(**folders: dict[str, int]) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        for folder, counts in folders.items():
            write_images(root / ("" if folder == "top" else folder), counts)

    return build


def other_size(root: Path) -> None:
    write_images(root, {"a": 5, "b": 5})
    write_images(root, {"b": 1}, size=(9, 9))


def not_square(root: Path) -> None:
    write_images(root, {"a": 5, "b": 5}, size=(8, 9))


def sixteen_bit(root: Path) -> None:
    write_images(root, {"a": 5, "b": 5}, mode="L")
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(root / "b" / "04.png")


def broken(content: bytes) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        write_images(root, {"a": 5, "b": 5})
        original = (root / "b" / "03.png").read_bytes()
        (root / "b" / "03.png").write_bytes(content or original[: len(original) // 2])

    return build


BAD_FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (make(), "no class folders"),
    (make(a={}, b={}), "no class folders"),
    (make(top={"a": 0, "b": 0}), "no images"),
    (make(top={"a": 5, "b": 0}), "b has no images"),
    (make(top={"a": 5}), r"one class only .a."),
    (make(top={"a": 1, "b": 1}), "one image per class"),
    (make(train={"a": 1, "b": 1}, test={"a": 1}), "one training image per class"),
    (make(train={"a": 5}, test={"a": 1}), "train has one class only"),
    (make(train={"a": 5, "b": 5}), "has train but not test or val"),
    (make(val={"a": 5, "b": 5}), "has val but not train"),
    (make(train={"a": 5, "b": 5}, test={"a": 1, "c": 1}), "test has the class c, which .*train lacks"),
    (make(train={"a": 5, "b": 5}, test={"a": 0}), "test has no images"),
    (other_size, r"b/00.png is 9x9, others 8x8.*image_size"),
    (not_square, r"a/\d\d.png is 8x9\).*image_size"),
    (sixteen_bit, r"b/04.png has more than 8 bits"),
    (broken(b"no image"), r"b/03.png cannot be read as an image"),
    (broken(b""), r"b/03.png cannot be read as an image"),
]


@pytest.mark.parametrize(("build", "pattern"), BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, build: Callable[[Path], None], pattern: str) -> None:
    (tmp_path / "data").mkdir()
    build(tmp_path / "data")
    check_error(tmp_path / "data", pattern)
    check_error(tmp_path / "data", re.escape(str(tmp_path / "data")))


# Streaming


def test_large_folders_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"a": 30, "b": 20}, size=(16, 16))
    decoded = load_dataset(str(tmp_path), image_size=8, workers=0)
    size = 50 * 3 * 8 * 8
    monkeypatch.setattr(robustq.data.folder, "STREAM_ABOVE_BYTES", size)
    assert isinstance(load_dataset(str(tmp_path), image_size=8, workers=0).train, TensorSplit)
    monkeypatch.setattr(robustq.data.folder, "STREAM_ABOVE_BYTES", size - 1)
    data = load_dataset(str(tmp_path), image_size=8, workers=0)
    assert all(isinstance(part, StreamedSplit) for part in (data.train, data.holdout, data.test))
    for part, other in [(data.train, decoded.train), (data.holdout, decoded.holdout), (data.test, decoded.test)]:
        assert torch.equal(part.labels, other.labels)


def test_streamed_evaluation_scales_to_8_7_and_cuts_the_middle(tmp_path: Path) -> None:
    images, _ = streamed(tmp_path / "images").take(0)
    paths: Sequence[Path] = sorted(tmp_path.rglob("*.png"))
    for path, image in zip(paths, images, strict=True):
        # 16x12 -> shorter side 8 -> 10x8 (10.67 cut down, as torchvision does) -> the middle 7x7. The corner of the cut
        # is half of (10 - 7, 8 - 7) = (1.5, 0.5), which Python rounds to even: (2, 0).
        scaled = np.asarray(Image.open(path).resize((10, 8), Image.Resampling.BILINEAR))[0:7, 2:9]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), scaled)


def test_streamed_results_do_not_depend_on_workers(tmp_path: Path) -> None:
    alone, together = streamed(tmp_path / "images"), streamed(tmp_path / "images", workers=2)
    options: dict[str, Any] = {"seed": 1, "epoch": 2, "augment": BOTH}
    for ours, theirs in zip(gather(alone, **options), gather(together, **options), strict=True):
        assert torch.equal(ours, theirs)


def test_streamed_augmentations_are_those_asked_for(tmp_path: Path) -> None:
    split = streamed(tmp_path / "images", shorter_side=7)
    plain = {image.numpy().tobytes(): place for place, image in enumerate(gather(split)[0])}
    mirrored = {image.flip(2).contiguous().numpy().tobytes() for image in gather(split)[0]}
    flipped = {image.numpy().tobytes() for image in gather(split, seed=0, augment=Augment(flip=True))[0]}
    assert flipped <= plain.keys() | mirrored
    assert 4 <= len(flipped & mirrored) <= 20  # of 24; 12 expected, 2.4 a standard deviation
    cropped = {image.numpy().tobytes() for image in gather(split, seed=0, augment=Augment(crop_padding=1))[0]}
    assert len(cropped - plain.keys()) > 20


def test_streamed_grey(tmp_path: Path) -> None:
    split = streamed(tmp_path / "images", channels=1)
    assert split.take(2)[0].shape == (2, 1, 7, 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_names_an_unreadable_image_in_one_line(tmp_path: Path, workers: int) -> None:
    split = streamed(tmp_path / "images", workers=workers)
    (tmp_path / "images" / "dog" / "03.png").write_bytes(b"no image")
    uses: list[Callable[[], object]] = [lambda: gather(split, seed=0), lambda: split.take(0)]
    for use in uses:
        with pytest.raises(DataError, match=r"dog/03.png cannot be read") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_streamed_refuses_what_is_no_split() -> None:
    with pytest.raises(DataError):
        StreamedSplit([], torch.zeros(0), image_size=8)
    with pytest.raises(DataError):
        StreamedSplit(["a.png"], torch.zeros(2), image_size=8)


def test_imagenet(tmp_path: Path) -> None:
    check_error("imagenet", "imagenet/train.*ROBUSTQ_DATA.*--data FOLDER", root=tmp_path)
    write_images(tmp_path / "imagenet" / "train", {"n01": 10, "n02": 10}, size=(20, 30))
    write_images(tmp_path / "imagenet" / "val", {"n01": 2, "n02": 2})
    write_images(tmp_path / "imagenet" / "test", {"unlabelled": 2})
    data: Dataset = load_dataset("imagenet", root=tmp_path, workers=0)
    assert (data.name, data.image_size, data.channels, data.class_names) == ("imagenet", 224, 3, ("n01", "n02"))
    assert isinstance(data.train, StreamedSplit) and data.train.shorter_side == 256
    assert (len(data.train), len(data.holdout), len(data.test)) == (18, 2, 4)
    small = load_dataset("imagenet", root=tmp_path, workers=0, image_size=7, train_images=10)
    assert (len(small.train), len(small.holdout)) == (10, 2)
    assert small.train.take(1)[0].shape == (1, 3, 7, 7)


def test_imagenet_folders_get_their_english_names() -> None:
    names = imagenet_class_names(tuple(f"n{k:08}" for k in range(1000)))
    assert names[0] == "tench" and names[207] == "golden retriever"
    assert imagenet_class_names(tuple(f"class{k}" for k in range(1000)))[0] == "class0"
