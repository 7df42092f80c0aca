"""The contract of every split: batches, augmentation, resuming an epoch, digests, and the fixed choices of images."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustq.data import Augment, Split, StreamedSplit, TensorSplit, to_float
from robustq.data.augment import crop_and_flip, draw_crops_and_flips
from robustq.data.splits import split_by_name, stratified_indices, stratified_split
from robustq.errors import DataError, UsageError
from tests.data.images import BOTH, gather, pixels, streamed, tensor_split


@pytest.fixture(params=["tensor", "streamed"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    made: Split = tensor_split() if request.param == "tensor" else streamed(tmp_path / "images")
    return made


def test_batches_in_order_hold_every_image_once_in_the_promised_types(split: Split) -> None:
    batches = list(split.batches(5, device="cpu"))
    assert [len(x) for x, _ in batches] == [5] * (len(split) // 5) + [len(split) % 5]
    images, labels = split.take(0)
    assert images.dtype == torch.uint8 and labels.dtype == split.labels.dtype == torch.int64
    for x, y in batches:
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous() and x.min() >= 0 and x.max() <= 1
    x, y = gather(split, augment=BOTH)  # without a seed nothing is augmented
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
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.dtype == torch.int64 and indices.tolist() != sorted(indices.tolist())
    assert torch.equal(torch.cat([batch.x for batch in batches]), to_float(images[indices]))
    assert torch.equal(torch.cat([batch.y for batch in batches]), labels[indices])


def test_take_is_evenly_spaced(split: Split) -> None:
    everything, all_labels = split.take(0)
    assert len(everything) == len(split.take(1000)[1]) == len(split)
    for n in (1, 2, 7, 22):
        images, labels = split.take(n)
        indices = [i * len(split) // n for i in range(n)]
        assert torch.equal(images, everything[indices]) and torch.equal(labels, all_labels[indices])
    with pytest.raises(UsageError, match="-1"):
        split.take(-1)
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


@pytest.mark.parametrize("padding", [0, 4])
def test_crop_and_flip_equals_the_slow_way_image_by_image(padding: int) -> None:
    images = pixels(64, 3, 5, 7)  # not square: rows and columns must not be mixed up
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


def test_splits_and_augmentations_that_are_refused() -> None:
    for images, labels, message in (
        (torch.zeros(3, 1, 2, 2), torch.zeros(3), "float32"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3), r"\(3, 2, 2\)"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0), "N > 0"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), r"\(2,\)"),
    ):
        with pytest.raises(DataError, match=message):
            TensorSplit(images, labels)
    for paths, labels in (([], torch.zeros(0)), (["a.png"], torch.zeros(2))):
        with pytest.raises(DataError):
            StreamedSplit(paths, labels, image_size=8)
    with pytest.raises(UsageError, match="-1"):
        Augment(crop_padding=-1)


def test_stratified_indices_keeps_class_shares_to_the_image() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100, generator=torch.manual_seed(0))]
    chosen = stratified_indices(labels, 10, at_least=0, spare=1, seed=0)
    assert labels[chosen].bincount().tolist() == [5, 3, 2]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    # 11 images: shares 5.5, 3.3, 2.2, so the first class lost most by rounding down.
    assert labels[stratified_indices(labels, 11, at_least=0, spare=1, seed=0)].bincount().tolist() == [6, 3, 2]
    assert not torch.equal(chosen, stratified_indices(labels, 10, at_least=0, spare=1, seed=1))
    # Within a class the choice is spread, not the first ones.
    assert stratified_indices(torch.zeros(1000, dtype=torch.int64), 100, at_least=0, spare=0, seed=0).max() > 800


def test_stratified_indices_respects_both_bounds() -> None:
    labels = torch.tensor([0] * 97 + [1, 2, 2])
    assert labels[stratified_indices(labels, 4, at_least=1, spare=0, seed=0)].bincount().tolist() == [2, 1, 1]
    assert labels[stratified_indices(labels, 100, at_least=0, spare=1, seed=0)].bincount().tolist() == [96, 0, 1]


def test_stratified_split_are_disjoint_and_complete() -> None:
    labels = torch.arange(101) % 7
    rest, part = stratified_split(labels, 0.1, seed=0)
    assert len(part) == 10 and sorted(rest.tolist() + part.tolist()) == list(range(101))
    assert len(stratified_split(torch.arange(6), 0.1, seed=0)[1]) == 0  # one image per class: none to give
    assert len(stratified_split(torch.tensor([0, 0]), 0.1, seed=0)[1]) == 1


def test_split_by_name_takes_a_fifth_and_empties_no_class() -> None:
    names = [f"{label}/{number}.png" for label in range(5) for number in range(2000)]
    labels = torch.arange(5).repeat_interleave(2000)
    rest, part = split_by_name(names, labels)
    assert sorted(rest.tolist() + part.tolist()) == list(range(10_000))
    # 4 standard deviations of a binomial share of 0.2 among 2000 are 0.036.
    assert ((labels[part].bincount() / 2000 - 0.2).abs() < 0.036).all()
    for number in range(50):
        rest, part = split_by_name([f"a{number}", f"b{number}", f"c{number}"], torch.tensor([0, 0, 1]))
        assert len(part) == 1 and sorted(rest.tolist() + part.tolist()) == [0, 1, 2] and 2 in rest.tolist()


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


def test_random_crops_of_squashed_images_keep_their_shape(tmp_path: Path) -> None:
    """RandomResizedCrop of an image that is squashed first, but from its full resolution."""
    wide = np.repeat(np.array([0, 85, 170, 255], np.uint8), 50)[None, :, None].repeat(20, axis=0).repeat(3, axis=2)
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "0.png")
    split = StreamedSplit([tmp_path / "a" / "0.png"], torch.tensor([0]), image_size=7, workers=0, squash=True)
    crops = [gather(split, seed=0, epoch=epoch, augment=Augment(crop_padding=1))[0] for epoch in range(40)]
    # A square of the squashed image spans 0.28 to 1 of its width, mostly over half: three of the four stripes. A square
    # of the image itself spans a tenth: one stripe or two.
    assert sum(bool(crop.max() - crop.min() > 0.5) for crop in crops) > 20


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_names_an_unreadable_image_in_one_line(tmp_path: Path, workers: int) -> None:
    split = streamed(tmp_path / "images", workers=workers)
    (tmp_path / "images" / "dog" / "03.png").write_bytes(b"no image")
    uses: list[Callable[[], object]] = [lambda: gather(split, seed=0), lambda: split.take(0)]
    for use in uses:
        with pytest.raises(DataError, match=r"dog/03.png cannot be read") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [None, 3])
def test_skipped_batches_leave_the_others_as_they_are(split: Split, seed: int | None) -> None:
    whole = list(split.batches(5, device="cpu", seed=seed, epoch=2, augment=BOTH))
    assert len(whole) > 3
    for skip in (1, len(whole) - 1, len(whole) + 1):
        rest = list(split.batches(5, device="cpu", seed=seed, epoch=2, augment=BOTH, skip=skip))
        assert len(rest) == max(len(whole) - skip, 0)
        for batch, same in zip(rest, whole[skip:], strict=True):
            assert torch.equal(batch.x, same.x)
            assert torch.equal(batch.y, same.y)
            assert torch.equal(batch.indices, same.indices)


def test_ctrl_c_in_a_terminal_leaves_the_workers_alone(tmp_path: Path) -> None:
    split = streamed(tmp_path / "images", workers=2)
    batches = split.batches(2, device="cpu", seed=0)
    indices = [next(batches).indices for _ in range(2)]  # one of each worker: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGINT)  # a terminal sends it to every process
    indices += [batch.indices for batch in batches]
    assert sorted(torch.cat(indices).tolist()) == list(range(24))


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
