"""Benchmarks in the files that their authors publish."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.layouts import IMAGE, cells, class_label, pixels, write_images, write_parquet, write_stl10
from robustfair.data.catalog import CIFAR10_CLASSES
from robustfair.data.datasets import load_dataset
from robustfair.data.load.originals import load_pickle
from robustfair.errors import DataError, UnknownNameError

IMAGES = pixels(12, size=32)
LABELS = [label % 10 for label in range(12)]
BATCHES = [(f"data_batch_{number}", slice(2 * number - 2, 2 * number)) for number in range(1, 6)]
FILES = [*BATCHES, ("test_batch", slice(10, 12))]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ROBUSTFAIR_DATA, beside a cache of the test's own."""
    path = tmp_path / "data"
    path.mkdir()
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(path))
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    return path


def dump(path: Path, value: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))


def old_dump(path: Path, value: dict[bytes, Any]) -> None:
    """A pickle as Python 2 and an old numpy wrote it: text is bytes, and arrays name `numpy.core`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short, long = pickle.SHORT_BINSTRING, pickle.BINSTRING

    def text(raw: bytes) -> bytes:
        return short + bytes([len(raw)]) + raw if len(raw) < 256 else long + len(raw).to_bytes(4, "little") + raw

    def item(held: Any) -> bytes:
        if isinstance(held, bytes):
            return text(held)
        if isinstance(held, list):
            return b"](" + b"".join(map(item, held)) + b"e"
        if isinstance(held, int):
            return b"J" + held.to_bytes(4, "little", signed=True)
        shape = b"".join(map(item, held.shape))
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
        kind = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN"
        kind += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        return made + b"(K\x01(" + shape + b"t" + kind + b"\x89" + text(held.tobytes()) + b"tb"

    body = b"}(" + b"".join(item(key) + item(held) for key, held in value.items()) + b"u"
    path.write_bytes(b"\x80\x02" + body + b".")


def same_as_table(root: Path, name: str, features: dict, columns: dict) -> str:
    """Fingerprint of the train part in the hub's layout."""
    for part, rows in (("train", slice(0, 10)), ("test", slice(10, 12))):
        held = {key: value[rows] for key, value in columns.items()}
        write_parquet(root / name / f"{part}-00000-of-00001.parquet", held, features)
    return load_dataset(root / name).train.fingerprint


# CIFAR


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, None])
@pytest.mark.parametrize("folder", ["cifar10/cifar-10-batches-py", "cifar-10-batches-py", "cifar10"])
def test_cifar10_python_version_is_the_data_set_of_the_hub(root: Path, folder: str, protocol: int | None) -> None:
    for name, rows in FILES:
        held = {b"data": IMAGES[rows].reshape(2, -1), b"labels": LABELS[rows], b"batch_label": b"one of many"}
        if protocol is None:
            old_dump(root / folder / name, held)
        else:
            dump(root / folder / name, held, protocol)
    dump(root / folder / "batches.meta", {b"label_names": [name.encode() for name in CIFAR10_CLASSES]})
    (root / folder / "readme.html").write_text("about")
    data = load_dataset("cifar10")
    np.testing.assert_array_equal(data.train.images.numpy(), IMAGES[:10])
    np.testing.assert_array_equal(data.test.images.numpy(), IMAGES[10:])
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == (LABELS[:10], LABELS[10:])
    assert data.notes == (
        "read as the python version of CIFAR-10",
        "left out: readme.html (no files of that layout)",
    )
    features = {"img": IMAGE, "label": class_label(CIFAR10_CLASSES)}
    columns = {"img": cells(IMAGES), "label": LABELS}
    assert data.train.fingerprint == same_as_table(root, "table", features, columns)
    assert load_dataset("cifar10").test.fingerprint == data.test.fingerprint


def test_cifar10_binary_version(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name, rows in FILES:
        records = np.concatenate([np.array(LABELS, np.uint8)[rows, None], IMAGES[rows].reshape(2, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")
    data = load_dataset("cifar10")
    np.testing.assert_array_equal(data.train.images.numpy(), IMAGES[:10])
    assert data.test.labels.tolist() == LABELS[10:]
    (folder / "data_batch_2.bin").write_bytes(b"x" * 3000)
    with pytest.raises(DataError, match=r"data_batch_2\.bin is cut: 3,000 bytes are no multiple of 3073"):
        load_dataset("cifar10")


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_has_its_super_classes(root: Path, binary: bool) -> None:
    folder = root / ("cifar-100-binary" if binary else "cifar100/cifar-100-python")
    folder.mkdir(parents=True)
    images, fine = pixels(100, size=32), np.arange(100)
    coarse = fine * 7 % 20
    names = {"fine_label_names": [f"fine {n}" for n in fine], "coarse_label_names": [f"coarse {n}" for n in range(20)]}
    for part in ("train", "test"):
        if binary:
            records = [coarse[:, None], fine[:, None], images.reshape(100, -1)]
            (folder / f"{part}.bin").write_bytes(np.concatenate(records, axis=1).astype(np.uint8).tobytes())
        else:
            held = {"data": images.reshape(100, -1), "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
            dump(folder / part, held)
    for name, values in names.items():
        if binary:
            (folder / f"{name}.txt").write_text("\n".join(values))
    if not binary:
        dump(folder / "meta", names)
    data = load_dataset("cifar100").train
    np.testing.assert_array_equal(data.images.numpy(), images)
    assert data.labels.tolist() == fine.tolist()
    assert data.groups == tuple(coarse.tolist())
    assert (data.class_names[7], data.group_names[7]) == ("fine 7", "coarse 7")


def test_cifar_that_is_not_whole(root: Path) -> None:
    for name, rows in FILES[1:]:
        dump(root / "cifar10" / name, {b"data": IMAGES[rows].reshape(2, -1), b"labels": LABELS[rows]})
    with pytest.raises(DataError, match="is not the whole of the python version of CIFAR-10: data_batch_1 missing"):
        load_dataset("cifar10")
    dump(root / "cifar10" / "data_batch_1", {b"data": IMAGES[:2], b"labels": LABELS[:2]})
    with pytest.raises(DataError, match=r"data_batch_1: expected data, uint8 \(N, 3072\), it holds data, labels"):
        load_dataset("cifar10")
    dump(root / "cifar10" / "data_batch_1", {b"data": IMAGES[:2].reshape(2, -1), b"labels": [1]})
    with pytest.raises(DataError, match="data_batch_1: expected labels, 2 whole numbers, one an image"):
        load_dataset("cifar10")


def test_the_folder_with_the_name_comes_before_the_originals(root: Path) -> None:
    features = {"img": IMAGE, "label": class_label(CIFAR10_CLASSES)}
    same_as_table(root, "cifar10", features, {"img": cells(IMAGES), "label": LABELS})
    (root / "cifar-10-batches-py").mkdir()
    assert len(load_dataset("cifar10").train) == 10


def test_two_layouts_in_one_folder_are_refused(root: Path) -> None:
    for name, rows in FILES:
        dump(root / "cifar10" / "py" / name, {b"data": IMAGES[rows].reshape(2, -1), b"labels": LABELS[rows]})
        records = np.concatenate([np.array(LABELS, np.uint8)[rows, None], IMAGES[rows].reshape(2, -1)], axis=1)
        (root / "cifar10" / f"{name}.bin").write_bytes(records.tobytes())
    with pytest.raises(DataError, match=r"holds the original files of several data sets .*: name the folder of one"):
        load_dataset("cifar10")


# STL-10


@pytest.mark.parametrize("folder", ["stl10_binary", "stl10/stl10_binary", "stl10"])
def test_stl10_binary_version(root: Path, folder: str) -> None:
    images, rest = write_stl10(root / folder)
    for _ in range(2):
        data = load_dataset("stl10")
        np.testing.assert_array_equal(data.train.images.numpy(), images[:10])
        np.testing.assert_array_equal(data.test.images.numpy(), images[10:])
        assert (data.train.labels.tolist(), data.test.labels.tolist()) == (list(range(10)), [9, 2])
        assert data.train.class_names[9] == "class 9"
        assert data.notes == (
            "read as the binary version of STL-10",
            "left out: unlabeled_X.bin (its images have no labels)",
        )
        unlabelled = load_dataset("stl10/unlabelled")
        np.testing.assert_array_equal(unlabelled.only.images.numpy(), rest)
        assert unlabelled.counts == ("stl10/unlabelled, train part: 3 images of 1 class (3 each)",)
        assert (unlabelled.train.class_names, unlabelled.notes) == (("unlabelled",), ())
    assert load_dataset("stl10/unlabelled", image_size=32).train.images.shape == (3, 3, 32, 32)


def test_stl10_that_is_not_whole(root: Path) -> None:
    with pytest.raises(DataError, match=r"no folder of it: expected stl10_binary/unlabeled_X\.bin"):
        load_dataset("stl10/unlabelled")
    write_stl10(root / "stl10")
    for name, damage, message in (
        ("unlabeled_X.bin", b"x" * 100, r"unlabeled_X\.bin is cut: 100 bytes are no multiple of 27648"),
        ("train_X.bin", b"", r"train_X\.bin is cut: 0 bytes"),
        ("test_y.bin", b"\x01", r"test_X\.bin holds 2 images and test_y\.bin 1 labels"),
        ("test_y.bin", b"\x01\x00", r"stl10: labels outside the range 0 to 9, the first is -1 at index 1"),
    ):
        whole = (root / "stl10" / name).read_bytes()
        (root / "stl10" / name).write_bytes(damage)
        with pytest.raises(DataError, match=message):
            load_dataset("stl10/unlabelled" if name.startswith("un") else "stl10")
        (root / "stl10" / name).write_bytes(whole)
    (root / "stl10" / "test_y.bin").unlink()
    with pytest.raises(DataError, match=r"is not the whole of the binary version of STL-10: test_y\.bin missing"):
        load_dataset("stl10")
    (root / "stl10" / "unlabeled_X.bin").unlink()
    with pytest.raises(DataError, match=r"stl10 holds no unlabeled_X\.bin: expected stl10_binary/unlabeled_X\.bin"):
        load_dataset("stl10/unlabelled")


def test_the_name_has_one_spelling(root: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown data set 'stl10/unlabeled': did you mean stl10/unlabelled"):
        load_dataset("stl10/unlabeled")


# Pickles


class Harmful:
    """Runs a function when it is unpickled by a reader that allows it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ({"data": Harmful(os.system, "touch ran")}, r"system"),
        ({"data": Harmful(eval, "1")}, r"builtin.*\.eval"),
        ({"data": Harmful(getattr, "a", "upper")}, r"builtin.*\.getattr"),
        ({"data": Harmful(np.load, "x.npy")}, r"numpy"),
        ({"data": np.float64(1.0)}, r"numpy.*scalar"),
        ({"data": np.random.default_rng(0)}, r"numpy\.random"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_asks_for_more_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: dict, asked: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "data_batch_1", value, protocol)
    with pytest.raises(
        DataError, match=rf"data_batch_1 cannot be read as a pickle of .*: it asks for \S*{asked}"
    ) as info:
        load_pickle(tmp_path / "data_batch_1")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], "it holds a list and no dictionary"),
        ({"data": np.array([1.5])}, "an array of type <f8, where whole numbers are expected"),
        ({"data": np.array([{}], dtype=object)}, "an array without type or bytes"),
    ],
)
def test_a_pickle_of_something_else(tmp_path: Path, value: Any, reason: str) -> None:
    dump(tmp_path / "meta", value)
    with pytest.raises(DataError, match=reason):
        load_pickle(tmp_path / "meta")


def test_a_pickle_gives_back_what_was_put_in(tmp_path: Path) -> None:
    arrays = [np.arange(12, dtype=dtype).reshape(3, 4) for dtype in ("u1", "<i4", ">i8")]
    for protocol in range(6):
        for array in (*arrays, np.asfortranarray(arrays[0])):
            dump(tmp_path / "x", {"a": array, b"b": ["text", 3, None]}, protocol)
            held = load_pickle(tmp_path / "x")
            np.testing.assert_array_equal(held["a"], array)
            assert held["b"] == ["text", 3, None]


def test_a_cut_pickle(tmp_path: Path) -> None:
    dump(tmp_path / "x", {"a": IMAGES})
    whole = (tmp_path / "x").read_bytes()
    for damaged in (b"", b"no pickle", whole[:1000]):
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(DataError, match="x cannot be read as a pickle of arrays, numbers and text: "):
            load_pickle(tmp_path / "x")


# MNIST and its kin


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "fashion-mnist"])
def test_idx_files(root: Path, folder: str, packed: bool) -> None:
    images = pixels(12, channels=1, size=28)
    (root / folder).mkdir(parents=True)
    suffix = ".gz" if packed else ""
    for part, rows in (("train", slice(0, 10)), ("t10k", slice(10, 12))):
        for name, array in (("images-idx3", images[rows, 0]), ("labels-idx1", np.array(LABELS[rows]))):
            raw = gzip.compress(idx(array)) if packed else idx(array)
            (root / folder / f"{part}-{name}-ubyte{suffix}").write_bytes(raw)
    data = load_dataset("fashion-mnist")
    np.testing.assert_array_equal(data.train.images.numpy(), images[:10])
    assert data.test.labels.tolist() == LABELS[10:]
    assert data.notes == ("read as idx files, as of MNIST",)
    (root / folder / "train-images-idx3-ubyte").write_bytes(idx(images[:10, 0]))
    assert load_dataset("fashion-mnist").train.fingerprint == data.train.fingerprint
    (root / folder / "train-images-idx3-ubyte").write_bytes(idx(images[:9, 0]))
    with pytest.raises(DataError, match=r"holds 9 images and train-labels-idx1-ubyte.* 10 labels"):
        load_dataset("fashion-mnist")
    (root / folder / "train-images-idx3-ubyte").write_bytes(idx(images[:9, 0])[:-1])
    with pytest.raises(DataError, match="train-images-idx3-ubyte is no whole idx file of bytes in 3 dimensions"):
        load_dataset("fashion-mnist")
    (root / folder / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(DataError, match="are not whole: no file of the test labels"):
        load_dataset("fashion-mnist")


# Tiny-ImageNet


def tiny(root: Path, classes: int) -> tuple[Path, np.ndarray]:
    """The folder, and the images: a training image of each class, the first three for validation too."""
    folder, images = root / "tiny-imagenet-200", pixels(max(classes, 3), size=64)
    wnids = [f"n{number:05d}" for number in range(classes)]
    for wnid, image in zip(wnids, images, strict=False):
        write_images(folder / "train" / wnid, {"images": image[None]})
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    write_images(folder / "val", {"images": images[:3]})
    write_images(folder / "test", {"images": images[:5]})
    lines = [f"{number:03d}.png\t{wnids[label]}\t0\t32\t44\t62\n" for number, label in enumerate((1, 0, 1))]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(reversed(wnids)))
    (folder / "words.txt").write_text("n00000\tthing\n")
    return folder, images


def test_tiny_imagenet_as_its_authors_ship_it(root: Path) -> None:
    _, images = tiny(root, 200)
    data = load_dataset("tiny-imagenet")
    np.testing.assert_array_equal(data.train.images.numpy(), images)
    assert data.train.labels.tolist() == list(range(200))
    assert data.test.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(data.test.images.numpy(), images[[1, 0, 2]])
    assert data.train.class_names[:2] == ("n00000", "n00001")
    assert data.notes == (
        "the classes of the validation part are those in val_annotations.txt",
        "left out: the test part (no labels)",
        "the validation part is the test part",
        "left out: 5 in test (images of no class and part that is read)",
        "left out: 202 .txt (no images)",
    )


def test_tiny_imagenet_that_is_not_whole_says_how_it_was_read(root: Path) -> None:
    folder, _ = tiny(root, 2)
    with pytest.raises(DataError, match=r"expected 200 classes, found 2; the classes .* in val_annotations\.txt"):
        load_dataset("tiny-imagenet")
    assert load_dataset(folder).test.class_counts().tolist() == [1, 2]
    (folder / "val" / "images" / "001.png").unlink()
    with pytest.raises(DataError, match=r"val_annotations\.txt line 2 names 001\.png, which is missing: unpack"):
        load_dataset(folder)


def test_validation_images_that_were_sorted_into_class_folders_need_no_annotations(root: Path) -> None:
    folder, _ = tiny(root, 2)
    for number, wnid in enumerate(("n00001", "n00000", "n00001")):
        (folder / "val" / wnid).mkdir(exist_ok=True)
        (folder / "val" / "images" / f"{number:03d}.png").rename(folder / "val" / wnid / f"{number}.png")
    assert load_dataset(folder).test.class_counts().tolist() == [1, 2]
