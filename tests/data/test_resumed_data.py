"""What a resumed run asks of its data: the rest of an epoch, a name for what it holds, workers that outlive Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from robustq.data import Augment, Split, StreamedSplit, TensorSplit, load_dataset
from robustq.errors import DataError
from tests.test_data import BOTH, streamed, tensor_split, write_npz


@pytest.fixture(params=["tensor", "streamed"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    return tensor_split() if request.param == "tensor" else streamed(tmp_path / "images")


@pytest.mark.parametrize("augment", [Augment(), BOTH])
@pytest.mark.parametrize("seed", [None, 3])
def test_skipped_batches_leave_the_others_as_they_are(split: Split, seed: int | None, augment: Augment) -> None:
    whole = list(split.batches(5, device="cpu", seed=seed, epoch=2, augment=augment))
    assert len(whole) > 3
    for skip in (0, 1, len(whole) - 1, len(whole), len(whole) + 1):
        rest = list(split.batches(5, device="cpu", seed=seed, epoch=2, augment=augment, skip=skip))
        assert len(rest) == max(len(whole) - skip, 0)
        for batch, same in zip(rest, whole[skip:], strict=True):
            assert torch.equal(batch.x, same.x)
            assert torch.equal(batch.y, same.y)
            assert torch.equal(batch.indices, same.indices)


def test_skipped_images_are_not_read(tmp_path: Path) -> None:
    split = streamed(tmp_path / "images")
    order = torch.cat([batch.indices for batch in split.batches(4, device="cpu", seed=1)])
    (sorted((tmp_path / "images").rglob("*.png"))[int(order[0])]).write_bytes(b"broken")
    with pytest.raises(DataError):
        list(split.batches(4, device="cpu", seed=1))
    assert len(list(split.batches(4, device="cpu", seed=1, skip=1))) == 5


def test_ctrl_c_in_a_terminal_leaves_the_workers_alone(tmp_path: Path) -> None:
    split = streamed(tmp_path / "images", workers=2)
    batches = split.batches(2, device="cpu", seed=0)
    places = [next(batches).indices for _ in range(2)]  # one of each worker: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGINT)  # a terminal sends it to every process
    places += [batch.indices for batch in batches]
    assert sorted(torch.cat(places).tolist()) == list(range(24))


def test_a_digest_names_pixels_and_labels() -> None:
    images, labels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6) % 2
    digest = TensorSplit(images, labels).digest()
    assert TensorSplit(images.clone(), labels.clone()).digest() == digest
    other = images.clone()
    other[3, 0, 1, 1] = 1
    assert TensorSplit(other, labels).digest() != digest
    assert TensorSplit(images, 1 - labels).digest() != digest
    assert TensorSplit(images.view(6, 1, 1, 4), labels).digest() != digest
    # A view with other strides holds the same pixels.
    turned = torch.zeros(2, 2, 6, 1, dtype=torch.uint8).permute(2, 3, 0, 1)
    assert TensorSplit(turned, labels).digest() == digest


def test_a_digest_of_files_names_them_their_sizes_and_labels_but_not_their_place(tmp_path: Path) -> None:
    split = streamed(tmp_path / "images")
    digest = split.digest()
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="cannot be read"):
        split.digest()
    paths = sorted((tmp_path / "moved").rglob("*.png"))
    assert streamed(tmp_path / "moved").digest() == digest
    labels = split.labels.clone()
    assert StreamedSplit(paths, 1 - labels, image_size=7, workers=0).digest() != digest
    assert StreamedSplit(paths, labels, image_size=8, workers=0).digest() != digest
    Image.new("RGB", (16, 12)).save(paths[5])  # one colour: another size of file
    assert streamed(tmp_path / "moved").digest() != digest


def test_a_data_set_is_named_by_all_its_parts_and_not_by_its_path(tmp_path: Path) -> None:
    write_npz(tmp_path / "one.npz")
    write_npz(tmp_path / "two.npz")
    digest = load_dataset(str(tmp_path / "one.npz")).digest()
    assert load_dataset(str(tmp_path / "two.npz")).digest() == digest
    assert load_dataset(str(tmp_path / "one.npz"), train_images=20).digest() != digest
    write_npz(tmp_path / "two.npz", y_test=[1, 0, 2, 3, 0, 1, 2, 3])
    assert load_dataset(str(tmp_path / "two.npz")).digest() != digest
