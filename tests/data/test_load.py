"""Data sets by name, from .npz files and from folders, and one line of error for each way data can be wrong."""

from __future__ import annotations

import os
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
import torchvision
from PIL import Image

import robustq.data.folder
from robustq.data import DATASET_NAMES, Dataset, Split, StreamedSplit, TensorSplit, load_dataset
from robustq.data.folder import imagenet_class_names
from robustq.errors import DataError, RobustqError, RobustqWarning, UsageError
from tests.data.images import pixels, write_images, write_npz


@pytest.fixture(autouse=True)
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTQ_DATA", str(tmp_path))


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
    for count, message in ((9, "give 10 to 1294"), (1295, "1294"), (-1, "-1")):
        with pytest.raises(RobustqError, match=message):
            load_dataset("digits", train_images=count)


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
        ("fashion-mnist", "FashionMNIST", TinyMnist),
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
    data = load_dataset(name)
    assert (data.name, data.channels, data.image_size) == (name, 3 if kind.colour else 1, kind.side)
    assert (len(data.train), len(data.holdout), len(data.test)) == (36, 4, 10)
    expected = pixels(10, kind.side, kind.side, *([3] if kind.colour else []), seed=0).reshape(10, kind.side, -1)
    images, labels = data.test.take(0)
    assert torch.equal(images.permute(0, 2, 3, 1).reshape(10, kind.side, -1), torch.from_numpy(expected))
    assert labels.tolist() == list(range(10))
    assert data.class_names[:2] == (("class 0", "class 1") if kind.colour else ("0", "T-shirt/top"))
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""  # stdout is for results, and a library call prints nothing
    # No temporary file is left, and nothing is downloaded twice.
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["archive-False", "archive-True", "sub"]
    again = load_dataset(name)
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

    tqdm = torchvision.datasets.utils.tqdm
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CutOff)
    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else DataError):
        load_dataset("cifar10")
    assert list(tmp_path.iterdir()) == []
    assert torchvision.datasets.utils.tqdm is tqdm


def check_error(name: str | Path, pattern: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(str(name), **options)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message


def test_unknown_names() -> None:
    check_error("CIFAR-10", "'CIFAR-10', did you mean cifar10.*" + ".*".join(DATASET_NAMES))
    check_error("fashionmnist", "did you mean fashion-mnist")
    check_error("xyz", "'xyz'\\? Known")
    check_error("", "''")


def test_paths_and_options_that_are_refused(tmp_path: Path) -> None:
    for name in ("some/folder", "absent.npz", "./digits", "~no-such-user/x"):
        check_error(name, f"{re.escape(name)} does not exist")
    (tmp_path / "x.zip").write_bytes(b"x")
    check_error(tmp_path / "x.zip", r"x\.zip is neither")
    with pytest.raises(UsageError, match="image_size is 0"):
        load_dataset("digits", image_size=0)
    check_error("digits", "image_size is 16.*8x8", image_size=16)
    assert load_dataset("digits", image_size=8).image_size == 8


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


def test_npz_with_labels_from_one(tmp_path: Path) -> None:
    labels = {"y_train": 1 + np.arange(40) % 4, "y_test": 1 + np.arange(8) % 4}
    with pytest.warns(RobustqWarning, match="has no label 0, so that class 0 stays empty"):
        assert load_dataset(str(write_npz(tmp_path / "data.npz", **labels))).classes == 5


OBJECTS = np.array([{"a": 1}] * 40, dtype=object)
BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"x_test": None, "y_test": None}, "lacks x_test, y_test .it holds x_train, y_train"),
    ({"y_train": OBJECTS}, "y_train of .* cannot be read .*Object arrays"),
    ({"x_train": pixels(40, 6, 6, 3) / 255.0}, "x_train of .* is float64"),
    ({"x_train": pixels(40, 3, 6, 6)}, r"x_train of .*\(40, 3, 6, 6\)"),
    ({"x_train": pixels(40, 6, 5, 3)}, "x_train of .* 6x5"),
    ({"x_train": pixels(0, 6, 6, 3), "y_train": np.arange(0)}, "x_train of .* no images"),
    ({"x_test": pixels(8, 6, 6)}, r"differ in channels or size.*\(6, 6, 3\).*\(6, 6\)"),
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


@pytest.mark.parametrize(("train", "part"), [("train", "test"), ("Train", "val"), ("training", "Testing")])
def test_folder_with_train_and_test(train: str, part: str, tmp_path: Path) -> None:
    write_images(tmp_path / train, {"dog": 12, "ant": 9, "cat": 9})
    write_images(tmp_path / part, {"dog": 2, "cat": 3}, seed=1)
    data = load_dataset(str(tmp_path))
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


def test_folder_of_classes_only_gives_a_fifth_away(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 30, "b": 20})
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = load_dataset(str(tmp_path))
    # Golden: the part of a file depends on its name alone, on every machine.
    counts = [part.labels.bincount().tolist() for part in (data.train, data.holdout, data.test)]
    assert counts == [[21, 13], [2, 2], [7, 5]]
    seen = [image.numpy().tobytes() for part in (data.train, data.holdout, data.test) for image in part.take(0)[0]]
    assert len(set(seen)) == 50


def test_a_file_more_or_less_moves_no_other_between_training_and_test(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 40, "b": 40})
    before = load_dataset(str(tmp_path))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a" / "000-first-in-order.png")
    (tmp_path / "b" / "20.png").unlink()
    after = load_dataset(str(tmp_path))

    def images(*parts: Split) -> set[bytes]:
        return {image.numpy().tobytes() for part in parts for image in part.take(0)[0]}

    assert not images(before.test) & images(after.train, after.holdout)
    assert not images(before.train, before.holdout) & images(after.test)


def test_bad_images_are_skipped_only_when_asked_and_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "b" / "03.png").write_bytes(b"no image")
    original = (tmp_path / "a" / "07.png").read_bytes()
    (tmp_path / "a" / "07.png").write_bytes(original[: len(original) // 2])
    check_error(tmp_path, "cannot be read as an image.*--skip-bad-images")
    with pytest.warns(RobustqWarning, match=r"skipped 2 of 24 images.*a/07\.png, .*b/03\.png$"):
        data = load_dataset(str(tmp_path), skip_bad_images=True)
    assert len(data.train) + len(data.holdout) + len(data.test) == 22
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"no image")
    with pytest.warns(RobustqWarning, match="skipped 13 of 24"), pytest.raises(DataError, match="b has no images"):
        load_dataset(str(tmp_path), skip_bad_images=True)


def test_photographs_are_turned_as_their_exif_data_say(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 5, "b": 5})
    expected = load_dataset(str(tmp_path))
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6  # turned by 90 degrees to be shown
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert same_images(load_dataset(str(tmp_path)).train, expected.train)


def test_class_names_that_are_no_utf8(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 5, os.fsdecode(b"b\xff"): 5})
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("a", "b\ufffd") and data.digest()


def test_folder_is_grey_only_when_every_image_is(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 6, "b": 6}, mode="L")
    data = load_dataset(str(tmp_path))
    assert data.channels == 1 and data.train.take(0)[0].shape[1:] == (1, 8, 8)
    write_images(tmp_path, {"b": 1})
    assert load_dataset(str(tmp_path)).channels == 3
    # Not even a training subset of grey images only changes that.
    assert load_dataset(str(tmp_path), train_images=4).channels == 3


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


BAD_FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (make(), "no class folders"),
    (make(top={"a": 0, "b": 0}), "no images"),
    (make(top={"a": 5, "b": 0}), "b has no images"),
    (make(top={"a": 5}), r"one class only .a."),
    (make(top={"a": 1, "b": 1}), "one image per class"),
    (make(train={"a": 1, "b": 1}, test={"a": 1}), "one training image per class"),
    (make(train={"a": 5, "b": 5}), "has train but not test or val"),
    (make(val={"a": 5, "b": 5}), "has val but not train"),
    (make(train={"a": 5, "b": 5}, test={"a": 1, "c": 1}), "test has the class c, which .*train lacks"),
    (make(train={"a": 5, "b": 5}, test={"a": 0}), "test has no images"),
    (other_size, r"b/00.png is 9x9, others 8x8.*image_size"),
    (not_square, r"a/\d\d.png is 8x9\).*image_size"),
    (sixteen_bit, r"b/04.png has more than 8 bits"),
]


@pytest.mark.parametrize(("build", "pattern"), BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, build: Callable[[Path], None], pattern: str) -> None:
    (tmp_path / "data").mkdir()
    build(tmp_path / "data")
    check_error(tmp_path / "data", pattern)


def test_large_folders_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"a": 30, "b": 20}, size=(16, 16))
    decoded = load_dataset(str(tmp_path), image_size=8)
    size = 50 * 3 * 8 * 8
    monkeypatch.setattr(robustq.data.folder, "STREAM_ABOVE_BYTES", size)
    assert isinstance(load_dataset(str(tmp_path), image_size=8).train, TensorSplit)
    monkeypatch.setattr(robustq.data.folder, "STREAM_ABOVE_BYTES", size - 1)
    data = load_dataset(str(tmp_path), image_size=8)
    assert all(isinstance(part, StreamedSplit) for part in (data.train, data.holdout, data.test))
    for part, other in [(data.train, decoded.train), (data.holdout, decoded.holdout), (data.test, decoded.test)]:
        assert torch.equal(part.labels, other.labels)


def whole(image: Image.Image) -> Image.Image:
    return image.resize((8, 8), Image.Resampling.BILINEAR)


def centre(image: Image.Image) -> Image.Image:
    return image.resize((13, 10), Image.Resampling.BILINEAR).crop((2, 1, 10, 9))


@pytest.mark.parametrize(("resize", "reference"), [("squash", whole), ("short-side:10", centre)])
@pytest.mark.parametrize("streams", [False, True])
def test_images_that_are_not_square(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resize: str,
    reference: Callable[[Image.Image], Image.Image],
    streams: bool,
) -> None:
    write_images(tmp_path, {"a": 8, "b": 8}, size=(16, 12))
    if streams:
        monkeypatch.setattr(robustq.data.folder, "STREAM_ABOVE_BYTES", 0)
    data = load_dataset(str(tmp_path), image_size=8, resize=resize)
    assert data.resize == resize and isinstance(data.train, StreamedSplit) == streams
    found = {image.numpy().tobytes() for part in (data.train, data.holdout, data.test) for image in part.take(0)[0]}
    files = [Image.open(path) for path in tmp_path.rglob("*.png")]
    assert found == {np.asarray(reference(one)).transpose(2, 0, 1).tobytes() for one in files}
    # A resumed run notices that its images were resized in another way.
    usual = load_dataset(str(tmp_path), image_size=8)
    assert usual.resize == ("short-side:9" if streams else "short-side:8") and usual.digest() != data.digest()


def test_wrong_resize(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"a": 8, "b": 8}, size=(16, 12))
    for name, resize, said in (
        ("digits", "squash", "images of digits are used as they are; leave it out"),
        (tmp_path / "data", "stretch", "resize is 'stretch'; give squash"),
        (tmp_path / "data", "short-side:7", "resize is 'short-side:7', less than the image size of 8"),
    ):
        with pytest.raises(UsageError, match=said):
            load_dataset(str(name), image_size=8, resize=resize)
    check_error(tmp_path / "data", r"--set image_size=64, with --resize short-side \(centre crop\) or squash")


def test_imagenet(tmp_path: Path) -> None:
    check_error("imagenet", "imagenet/train.*ROBUSTQ_DATA.*--data FOLDER")
    write_images(tmp_path / "imagenet" / "train", {"n01": 10, "n02": 10}, size=(20, 30))
    write_images(tmp_path / "imagenet" / "val", {"n01": 2, "n02": 2})
    write_images(tmp_path / "imagenet" / "test", {"unlabelled": 2})
    data: Dataset = load_dataset("imagenet")
    assert (data.name, data.image_size, data.channels, data.class_names) == ("imagenet", 224, 3, ("n01", "n02"))
    assert isinstance(data.train, StreamedSplit) and data.train.shorter_side == 256
    assert data.resize == "short-side:256"
    assert (len(data.train), len(data.holdout), len(data.test)) == (18, 2, 4)
    small = load_dataset("imagenet", image_size=7, train_images=10)
    assert (len(small.train), len(small.holdout)) == (10, 2)
    assert small.train.take(1)[0].shape == (1, 3, 7, 7)


def test_imagenet_folders_get_their_english_names() -> None:
    names = imagenet_class_names(tuple(f"n{k:08}" for k in range(1000)))
    assert names[0] == "tench" and names[207] == "golden retriever"
    assert imagenet_class_names(tuple(f"class{k}" for k in range(1000)))[0] == "class0"
