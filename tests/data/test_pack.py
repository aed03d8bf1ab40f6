"""Packed data sets: what comes back is what went in, and a wrong file is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.layouts import IMAGE, cells, class_label, pixels, write_parquet
from reference.pack import read_split
from robustfair.cli.app import main
from robustfair.data import ImageDataset, Splits, codec, load_dataset, pack
from robustfair.data.pack import find_pack, read_pack, read_part, write_pack
from robustfair.errors import ConfigError, DataError

REAL = os.environ.get("ROBUSTFAIR_DATA", "")
CIFAR10 = next(Path(REAL, "cifar10").rglob("test*.parquet"), None) if REAL else None
needs_cifar10 = pytest.mark.skipif(CIFAR10 is None, reason="ROBUSTFAIR_DATA holds no parquet files of cifar10")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images_of(shape: tuple[int, ...], *, smooth: bool = False, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    if not smooth:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    steps = rng.integers(-3, 4, shape).cumsum(-1).cumsum(-2)
    return torch.from_numpy((steps & 255).astype(np.uint8))


def dataset(shape: tuple[int, ...], classes: int = 3, **rest: object) -> ImageDataset:
    labels = torch.arange(shape[0]) % classes
    fields = {"images": images_of(shape), "class_names": tuple(f"klass {c} ü" for c in range(classes)), **rest}
    return ImageDataset(labels=labels, **fields)  # type: ignore[arg-type]


def small(seed: int = 0) -> Splits:
    fields = {"name": "small", "augment": "crop"}
    train = dataset((7, 3, 5, 6), images=images_of((7, 3, 5, 6), smooth=True, seed=seed), **fields)
    return Splits(train=train, test=dataset((4, 3, 5, 6), **fields))


def require_same(read: Splits, written: Splits) -> None:
    assert read.parts.keys() == written.parts.keys()
    for split, part in written.parts.items():
        back = read.parts[split]
        assert torch.equal(back.images, part.images)
        assert torch.equal(back.labels, part.labels)
        for field in ("class_names", "groups", "group_names", "augment", "fingerprint", "name"):
            assert getattr(back, field) == getattr(part, field), field


# Round trips


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_shape_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("pack")
    shape = data.draw(st.tuples(st.sampled_from((1, 2, 3, 4)), st.integers(1, 9), st.integers(1, 9)))
    splits = data.draw(st.sampled_from((("train",), ("test",), ("train", "test"))))
    made = {}
    for split in splits:
        count, smooth, seed = data.draw(st.integers(1, 6)), data.draw(st.booleans()), data.draw(st.integers(0, 99))
        images = images_of((count, *shape), smooth=smooth, seed=seed)
        made[split] = dataset((count, *shape), data.draw(st.integers(1, 300)) if len(splits) == 1 else 5, images=images)
    written = Splits(**made)
    files = write_pack(written, folder, parts=data.draw(st.integers(1, max(len(part) for part in made.values()))))
    read = read_pack(find_pack(folder))
    assert len(files) == len(list(folder.iterdir()))
    for split, part in made.items():
        np.testing.assert_array_equal(read.parts[split][0], part.images.numpy())
        np.testing.assert_array_equal(read.parts[split][1], part.labels.numpy())
        assert read.parts[split][0].flags.c_contiguous


def test_extreme_pixels_and_several_blocks_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_BLOCK_PIXELS", 100)
    images = torch.from_numpy(np.random.default_rng(0).choice([0, 255], (11, 3, 6, 6)).astype(np.uint8))
    written = Splits(train=dataset((11, 3, 6, 6), images=images, augment="crop-flip"))
    write_pack(written, tmp_path, parts=3)
    require_same(load_dataset(tmp_path), written)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_format_is_what_its_description_says(tmp_path: Path, channels: int) -> None:
    images = images_of((5, channels, 4, 7), smooth=True)
    files = write_pack(Splits(train=dataset((5, channels, 4, 7), images=images)), tmp_path)
    read, labels = read_split(files, "train")
    np.testing.assert_array_equal(read, images.numpy())
    assert labels == [0, 1, 2, 0, 1]


def test_names_groups_and_augmentation_come_back_through_every_path(tmp_path: Path, cache: Path) -> None:
    groups = {"groups": (0, 1, 0), "group_names": ("x", "y"), "name": "Äpfel/3", "augment": "none"}
    written = Splits(train=dataset((5, 1, 4, 4), **groups), test=dataset((2, 1, 4, 4), **groups))
    files = write_pack(written, tmp_path / "new" / "packed", parts=2)
    assert [file.name for file in files] == ["äpfel-3.1-of-2.npz", "äpfel-3.2-of-2.npz"]
    for path in (tmp_path / "new" / "packed", str(files[0]), files[1]):
        require_same(load_dataset(path), written)
    assert len(list(cache.iterdir())) == 2, "decoded once, then read from the cache"


def test_images_are_brought_to_the_size_that_is_asked_for(tmp_path: Path) -> None:
    write_pack(small(), tmp_path)
    assert load_dataset(tmp_path, image_size=4).test.images.shape == (4, 3, 4, 4)


def test_a_named_data_set_is_found_packed_and_equals_its_parquet_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(tmp_path / "data"))
    names = class_label([f"class {index}" for index in range(10)])
    for split, count in (("train", 12), ("test", 10)):
        columns = {"image": cells(pixels(count, channels=1)), "label": [index % 10 for index in range(count)]}
        write_parquet(tmp_path / "data/fashion_mnist" / f"{split}.parquet", columns, {"image": IMAGE, "label": names})
    written = load_dataset("fashion-mnist")
    assert main(["data", "pack", "fashion-mnist", "--out", str(tmp_path / "data/packed"), "--parts", "3"]) == 0
    shutil.rmtree(tmp_path / "data/fashion_mnist")
    (tmp_path / "data/packed").rename(tmp_path / "data/fashion-mnist")
    require_same(load_dataset("fashion-mnist"), written)
    read = load_dataset(tmp_path / "data/fashion-mnist")
    require_same(read, written)
    assert read.train.augment == "crop"


def test_a_corruption_is_taken_by_its_name_out_of_several_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(tmp_path))
    for severity in (1, 2):
        name = f"cifar10-c/gaussian_noise/{severity}"
        data = dataset((10, 3, 4, 4), 10, images=images_of((10, 3, 4, 4), seed=severity), name=name)
        write_pack(Splits(test=data), tmp_path / "CIFAR-10-C")
    images = load_dataset("cifar10-c/gaussian-noise/2").test.images
    assert torch.equal(images, images_of((10, 3, 4, 4), seed=2))
    with pytest.raises(DataError, match=r"holds several packed data sets \(cifar10-c-gaussian-noise-1\.1-of-2"):
        load_dataset(tmp_path / "CIFAR-10-C")


def test_the_same_data_gives_the_same_files(tmp_path: Path) -> None:
    one, two = (write_pack(small(), tmp_path / name) for name in ("a", "b"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


@needs_cifar10
def test_cifar10_images_take_1700_bytes_and_come_back(tmp_path: Path) -> None:
    written = Splits(test=load_dataset(str(CIFAR10)).only.limit_per_class(100))
    sizes = [file.stat().st_size for file in write_pack(written, tmp_path)]
    assert sum(sizes) < 1700 * 1000, "60,000 of them in two parts are then far below 60 MB a part"
    assert max(sizes) < 1.1 * min(sizes)
    require_same(load_dataset(tmp_path), written)


# Files that are not what they should be


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_pack(small(), tmp_path / "packed", parts=3)


def test_a_part_can_be_checked_alone(files: list[Path]) -> None:
    files[0].unlink()
    rows = read_part(files[1])
    np.testing.assert_array_equal(rows["train"][0], small().train.images[2:4])
    np.testing.assert_array_equal(rows["test"][1], small().test.labels[1:2])


def test_missing_parts_are_named(files: list[Path]) -> None:
    files[1].unlink()
    for path in (files[0].parent, files[2]):
        with pytest.raises(DataError, match=r"packed lacks small\.2-of-3\.npz: .* needs all of its 3 parts"):
            load_dataset(path)


def test_parts_of_another_pack_are_named(files: list[Path], tmp_path: Path) -> None:
    other = write_pack(small(seed=1), tmp_path / "other", parts=3)
    shutil.copy(other[2], files[2])
    with pytest.raises(DataError, match=r"small\.3-of-3\.npz is of another pack than small\.1-of-3\.npz"):
        load_dataset(files[0].parent)


def test_parts_under_each_others_names_are_named(files: list[Path]) -> None:
    shutil.copy(files[0], files[1])
    with pytest.raises(DataError, match=r"small\.2-of-3\.npz holds part 1 of 3 of small: give it back that name"):
        load_dataset(files[0].parent)
    copy = files[0].rename(files[0].with_name("copy.npz"))
    with pytest.raises(DataError, match=r"copy\.npz is a part of a packed data set: give it back its name"):
        load_dataset(copy)


@pytest.mark.parametrize("schema", [None, "robustfair.pack/2"])
def test_foreign_files_are_named(files: list[Path], schema: str | None) -> None:
    arrays = {"images": pixels(2)} if schema is None else {pack.HEADER: np.array(json.dumps({"schema": schema}))}
    np.savez(files[1], **arrays)
    with pytest.raises(DataError, match=rf"2-of-3\.npz is no part of a packed data set: its schema is {schema}"):
        load_dataset(files[0].parent)


def test_a_cut_part_is_named_wherever_it_is_cut(files: list[Path]) -> None:
    whole = files[1].read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        files[1].write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"2-of-3\.npz is cut, damaged or no part of a packed data set"):
            load_dataset(files[0].parent)


def test_a_changed_byte_is_noticed_wherever_it_matters(files: list[Path]) -> None:
    whole, expected, refused = files[0].read_bytes(), read_part(files[0]), []
    for position in range(0, len(whole), 23):
        changed = bytearray(whole)
        changed[position] ^= 0x55
        files[0].write_bytes(changed)
        try:
            rows = read_part(files[0])
        except DataError as error:
            refused.append(str(error))
            continue
        for split, arrays in rows.items():
            for array, original in zip(arrays, expected[split], strict=True):
                np.testing.assert_array_equal(array, original)
    assert len(refused) > 50
    assert all(str(files[0]) in line for line in refused)


def test_a_whole_archive_with_other_pixels_is_refused(files: list[Path]) -> None:
    with np.load(files[0], allow_pickle=False) as arrays:
        content = dict(arrays)
    content["test_labels"] = (content["test_labels"] + 1) % 3
    np.savez(files[0], **content)
    with pytest.raises(DataError, match=r"1-of-3\.npz is damaged: its test images are not those that were packed"):
        load_dataset(files[0].parent)


def test_objects_are_never_unpickled(files: list[Path]) -> None:
    np.savez(files[0], **{pack.HEADER: np.array([{"schema": "robustfair.pack/1"}], dtype=object)})
    with pytest.raises(DataError, match=r"1-of-3\.npz is cut, damaged or no part .* allow_pickle=False"):
        load_dataset(files[0].parent)


# Writing


def test_nothing_is_overwritten_and_nothing_is_left_behind(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in files}
    with pytest.raises(DataError, match=r"small\.1-of-3\.npz exists and is not overwritten"):
        write_pack(small(), files[0].parent, parts=2)
    assert {file: file.read_bytes() for file in files[0].parent.iterdir()} == before

    def fail_late(path: Path, rows: object, contents: object, part: int, parts: int) -> None:
        path.write_bytes(b"half")
        if part == 2:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pack, "_write_part", fail_late)
    with pytest.raises(OSError, match="No space left"):
        write_pack(small(), tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


def test_impossible_packs_are_refused(tmp_path: Path) -> None:
    for parts in (0, 8):
        with pytest.raises(ConfigError, match=f"pack: parts must be 1 to 7, the number of images, got {parts}"):
            write_pack(small(), tmp_path, parts=parts)
    with pytest.raises(DataError, match="images of the train part have no pixels"):
        write_pack(Splits(train=dataset((2, 3, 0, 4))), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file: name a folder"):
        write_pack(small(), tmp_path / "file")


# The command


def test_the_command_packs_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packs"
    assert main(["data", "pack", "digits", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {file} ({file.stat().st_size / 1e3:,.0f} kB)" for file in sorted(out.iterdir())
    ]
    require_same(load_dataset(out), load_dataset("digits"))
    assert main(["data", "pack", "digits", "--out", str(out)]) == 2
    assert "digits.1-of-2.npz exists and is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digitz", "--out", "x"], "unknown data set 'digitz': did you mean digits?"),
        (["digits", "--out", "x", "--parts", "0"], "pack: parts must be 1 to 1438"),
        (["digits"], "--out"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "pack", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
