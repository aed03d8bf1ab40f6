"""ImageDataset, Splits, and every named data set on a small folder in its layout on the hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from reference.layouts import IMAGE, cells, class_label, pixels, write_images, write_parquet
from robustfair.data.augment.crops import AUGMENTATIONS
from robustfair.data.catalog import CATALOG, CIFAR10_CLASSES
from robustfair.data.corruptions.names import CORRUPTIONS, FAIR_TAT, STANDARD
from robustfair.data.datasets import ImageDataset, Splits, load_dataset
from robustfair.data.load import cache
from robustfair.errors import ConfigError, DataError, RobustFairWarning, UnknownNameError

REAL = os.environ.get("ROBUSTFAIR_DATA", "")
needs_cifar10 = pytest.mark.skipif(not Path(REAL, "cifar10").is_dir(), reason="ROBUSTFAIR_DATA holds no cifar10")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ROBUSTFAIR_DATA, and a cache of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(folder))
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    return folder


def make(labels: list[int], num_classes: int = 3) -> ImageDataset:
    images = torch.from_numpy(pixels(len(labels)))
    names = tuple("abcdefgh"[:num_classes])
    return ImageDataset(images=images, labels=torch.tensor(labels, dtype=torch.int64), class_names=names)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(count))


# ImageDataset and Splits


def test_labels_outside_the_range_name_the_first() -> None:
    with pytest.raises(DataError, match="labels outside the range 0 to 2, the first is 3 at index 1"):
        make([0, 3, -1])
    with pytest.raises(DataError, match="the first is -1 at index 0"):
        make([-1, 0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2, dtype=torch.int64),
            r"images must be uint8 .* got float32 \(2, 3, 4, 4\); store \(255 \* x\)\.round\(\) as uint8$",
        ),
        (
            torch.full((2, 3, 4, 4), -1.5, dtype=torch.bfloat16),
            torch.zeros(2, dtype=torch.int64),
            r"values from -1\.5 to -1\.5 look already normalised",
        ),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"images must be uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"labels must be int64 \(2,\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), r"labels must be int64 .* got float32"),
    ],
)
def test_shapes_and_types_are_checked(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataset(images=images, labels=labels, class_names=("a",))


def test_groups_cover_every_class() -> None:
    data = make([0, 1, 2])
    fields = {"images": data.images, "labels": data.labels, "class_names": data.class_names}
    grouped = ImageDataset(**fields, groups=(0, 1, 0), group_names=("x", "y"))
    assert grouped.subset([0]).groups == (0, 1, 0)
    for groups, group_names in [((0, 1), ("x", "y")), ((0, 1, 0), ()), (None, ("x",)), ((0, 1, 2), ("x", "y"))]:
        with pytest.raises(DataError, match="groups"):
            ImageDataset(**fields, groups=groups, group_names=group_names)


def test_fingerprint_is_the_hash_of_the_content_alone() -> None:
    data = make([0, 1, 2, 0])
    same = ImageDataset(
        images=data.images.clone(), labels=data.labels.clone(), class_names=("a", "b", "c"), name="other"
    )
    assert data.fingerprint == same.fingerprint
    digest = hashlib.sha256(b'[["a", "b", "c"], [4, 3, 8, 8]]' + data.images.numpy().tobytes())
    digest.update(data.labels.numpy().tobytes())
    assert data.fingerprint == digest.hexdigest()
    changed = data.images.clone()
    changed[3, 2, 7, 7] ^= 1
    for other in (
        ImageDataset(images=changed, labels=data.labels, class_names=data.class_names),
        ImageDataset(images=data.images, labels=data.labels.flip(0), class_names=data.class_names),
        ImageDataset(images=data.images, labels=data.labels, class_names=("a", "b", "d")),
        data.subset([0, 1, 2]),
    ):
        assert other.fingerprint != data.fingerprint


def test_subset_keeps_order_names_and_classes() -> None:
    data = make([0, 1, 2, 0])
    part = data.subset([3, 1])
    assert part.labels.tolist() == [0, 1]
    assert torch.equal(part.images, data.images[[3, 1]])
    assert part.num_classes == 3
    assert data.subset(np.array([2])).labels.tolist() == data.subset(torch.tensor([2])).labels.tolist() == [2]
    assert part.to("cpu").fingerprint == part.fingerprint


def test_limit_per_class_takes_the_first_in_order() -> None:
    labels = [2, 0, 0, 1, 0, 2, 2, 0]
    limited = make(labels).limit_per_class(2)
    assert limited.labels.tolist() == [2, 0, 0, 1, 2]
    assert torch.equal(limited.images, make(labels).images[[0, 1, 2, 3, 5]])
    assert limited.class_counts().tolist() == [2, 1, 2]
    with pytest.raises(ConfigError, match="data: limit_per_class must be at least 1, got 0"):
        make(labels).limit_per_class(0)


def test_a_class_without_images_keeps_its_index() -> None:
    data = make([0, 2], num_classes=4)
    assert data.class_counts().tolist() == [1, 0, 1, 0]
    assert data.limit_per_class(1).labels.tolist() == [0, 2]


def test_splits_share_names_and_say_what_is_missing() -> None:
    data = make([0, 1])
    assert Splits(train=data).only is data
    with pytest.raises(DataError, match="images has no test part, only 2 images of part train"):
        _ = Splits(train=data).test
    with pytest.raises(DataError, match="images has no train part"):
        _ = Splits(test=data).train
    with pytest.raises(DataError, match="a train and a test part, choose one"):
        _ = Splits(train=data, test=data).only
    with pytest.raises(DataError, match="class names differ"):
        Splits(train=data, test=make([0, 1], num_classes=2))
    with pytest.raises(DataError, match="needs a train part or a test part"):
        Splits()


# Named data sets


def test_digits_are_embedded_scaled_and_split_per_class() -> None:
    data = load_dataset("digits")
    source = load_digits()
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert len(data.train) + len(data.test) == len(source.target)
    assert data.train.augment == "none"
    shares = data.test.class_counts() / (data.test.class_counts() + data.train.class_counts())
    assert shares.sub(0.2).abs().max() < 0.01
    both = sorted(image.tobytes() for part in (data.train, data.test) for image in part.images.numpy())
    expected = sorted(bytes(round(value * 255 / 16) for value in image.flatten()) for image in source.images)
    assert both == expected
    assert load_dataset("Digits").test.fingerprint == data.test.fingerprint
    assert load_dataset("digits", image_size=16).train.images.shape[1:] == (1, 16, 16)


def test_digits_are_read_without_an_import_of_scikit_learn() -> None:
    code = (
        "import sys; from robustfair.data import load_dataset\n"
        "print(load_dataset('digits').test.fingerprint, 'sklearn' in sys.modules, 'scipy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{load_dataset('digits').test.fingerprint} False False\n"


def test_digits_say_which_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sklearn")
    with pytest.raises(DataError, match=r"^digits: scikit-learn has no \S*digits\.csv\.gz: install scikit-learn again"):
        load_dataset("digits")


def test_cifar10_in_the_hub_layout(root: Path) -> None:
    images = pixels(7)
    features = {"img": IMAGE, "label": class_label(CIFAR10_CLASSES)}
    for shard, rows in enumerate((slice(0, 4), slice(4, 5))):
        path = root / "cifar10/plain_text" / f"train-{shard:05d}-of-00002.parquet"
        labels = [9, 0, 1, 2, 9][rows]
        write_parquet(path, {"img": cells(images[rows]), "label": labels}, features)
    test = root / "cifar10/plain_text/test-00000-of-00001.parquet"
    write_parquet(test, {"img": cells(images[5:]), "label": [3, 3]}, features)
    data = load_dataset("cifar10")
    np.testing.assert_array_equal(data.train.images.numpy(), images[:5])
    np.testing.assert_array_equal(data.test.images.numpy(), images[5:])
    assert data.train.labels.tolist() == [9, 0, 1, 2, 9]
    assert data.test.labels.tolist() == [3, 3]
    assert data.train.class_names == CIFAR10_CLASSES
    assert (data.train.name, data.train.augment, data.train.groups) == ("cifar10", "crop-flip", None)


def test_cifar100_has_fine_labels_and_super_classes(root: Path) -> None:
    features = {"img": IMAGE, "fine_label": class_label(names(100)), "coarse_label": class_label(names(20))}
    fine = list(range(100))
    coarse = [label * 7 % 20 for label in fine]
    for part in ("train", "test"):
        columns = {"img": cells(pixels(100, size=2)), "fine_label": fine, "coarse_label": coarse}
        write_parquet(root / f"cifar100/cifar100/{part}-00000-of-00001.parquet", columns, features)
    for _ in range(2):
        data = load_dataset("cifar100").train
        assert data.labels.tolist() == fine
        assert data.groups == tuple(coarse)
        assert data.group_names == names(20)


def test_a_class_with_two_super_classes(root: Path) -> None:
    features = {"img": IMAGE, "fine_label": class_label(names(100)), "coarse_label": class_label(names(20))}
    columns = {"img": cells(pixels(2)), "fine_label": [5, 5], "coarse_label": [1, 2]}
    write_parquet(root / "cifar100/train-00000-of-00001.parquet", columns, features)
    with pytest.raises(DataError, match="class 5 has two super-classes, 1 and 2"):
        load_dataset("cifar100")


def test_stl10_keeps_its_size(root: Path) -> None:
    features = {"image": IMAGE, "label": class_label(names(10))}
    for part in ("train", "test"):
        columns = {"image": cells(pixels(2, size=96)), "label": [4, 0]}
        write_parquet(root / f"stl10/data/{part}-00000-of-00001.parquet", columns, features)
    data = load_dataset("stl10")
    assert data.test.images.shape == (2, 3, 96, 96)
    assert data.train.augment == "crop-flip"


def test_svhn_reads_one_configuration_and_leaves_the_extra_part(root: Path) -> None:
    features = {"image": IMAGE, "label": class_label([str(digit) for digit in range(10)])}
    for part, label in (("train", 1), ("test", 2), ("extra", 3)):
        columns = {"image": cells(pixels(2)), "label": [label, label]}
        write_parquet(root / f"svhn/cropped_digits/{part}-00000-of-00001.parquet", columns, features)
        write_parquet(root / f"svhn/full_numbers/{part}-00000-of-00001.parquet", {"digits": [1]})
    data = load_dataset("svhn")
    assert data.train.labels.tolist() == [1, 1]
    assert data.test.labels.tolist() == [2, 2]
    assert data.train.augment == "crop"


def test_fashion_mnist_stays_grey_under_any_folder_spelling(root: Path) -> None:
    images = pixels(2, channels=1, size=28)
    features = {"image": IMAGE, "label": class_label(names(10))}
    for part in ("train", "test"):
        columns = {"image": cells(images), "label": [4, 0]}
        write_parquet(root / f"fashion_mnist/fashion_mnist/{part}-00000-of-00001.parquet", columns, features)
    data = load_dataset("Fashion_MNIST")
    np.testing.assert_array_equal(data.test.images.numpy(), images)
    assert (data.train.name, data.train.augment) == ("fashion-mnist", "crop")


def test_tiny_imagenet_tests_on_its_validation_part_and_widens_grey(root: Path) -> None:
    grey, colour = pixels(2, channels=1, size=64), pixels(2, size=64)
    features = {"image": IMAGE, "label": class_label(names(200))}
    train = {"image": cells(grey[:1]) + cells(colour) + cells(grey[1:]), "label": [199, 0, 1, 2]}
    write_parquet(root / "tiny-imagenet/data/train-00000-of-00001-abc.parquet", train, features)
    valid = {"image": cells(grey), "label": [7, 8]}
    write_parquet(root / "tiny-imagenet/data/valid-00000-of-00001-abc.parquet", valid, features)
    data = load_dataset("tiny-imagenet")
    expected = np.concatenate([grey[:1].repeat(3, axis=1), colour, grey[1:].repeat(3, axis=1)])
    np.testing.assert_array_equal(data.train.images.numpy(), expected)
    np.testing.assert_array_equal(data.test.images.numpy(), grey.repeat(3, axis=1))
    assert data.test.labels.tolist() == [7, 8]


def test_office_home_is_resized_and_holds_out_a_fifth_per_class(root: Path) -> None:
    images = [image for size in (40, 60, 250) for image in pixels(130 if size < 250 else 65, size=size)]
    columns = {
        "image": [cell for image in images for cell in cells(image[None])],
        "domain": [0] * len(images),
        "label": [index % 65 for index in range(len(images))],
    }
    features = {"image": IMAGE, "domain": class_label(["Art"]), "label": class_label(names(65))}
    write_parquet(root / "office-home/data/train-00000-of-00001.parquet", columns, features)
    data = load_dataset("office-home", image_size=16)
    assert data.train.class_counts().tolist() == [4] * 65
    assert data.test.class_counts().tolist() == [1] * 65
    assert data.test.images.shape[1:] == (3, 16, 16)
    assert load_dataset("office-home", image_size=16).test.fingerprint == data.test.fingerprint
    assert CATALOG["office-home"].image_size == 224


def test_cifar10_c_as_arrays(root: Path) -> None:
    images = pixels(15).transpose(0, 2, 3, 1)
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "gaussian_noise.npy", images)
    np.save(folder / "labels.npy", np.tile(np.array([3, 8, 8], dtype=np.uint8), 5))
    data = load_dataset("cifar10-c/gaussian_noise/3")
    np.testing.assert_array_equal(data.test.images.numpy(), images[6:9].transpose(0, 3, 1, 2))
    assert data.test.labels.tolist() == [3, 8, 8]
    assert data.test.class_names == CIFAR10_CLASSES
    assert data.test.name == "cifar10-c/gaussian_noise/3"
    with pytest.raises(DataError, match="no train part"):
        _ = data.train
    with pytest.raises(UnknownNameError, match="unknown corruption 'gausian-noise': did you mean gaussian-noise"):
        load_dataset("cifar10-c/gausian_noise/3")
    np.save(folder / "labels.npy", np.zeros(4, dtype=np.uint8))
    with pytest.raises(DataError, match="got 15 images and 4 labels"):
        load_dataset("cifar10-c/gaussian_noise/3")


@pytest.mark.parametrize(("which", "members"), [("fair-tat", FAIR_TAT), ("all", CORRUPTIONS), ("standard", STANDARD)])
def test_a_set_of_corruptions_follow_one_another(root: Path, which: str, members: tuple[str, ...]) -> None:
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    images = {name: pixels(10, size=4, seed=seed).transpose(0, 2, 3, 1) for seed, name in enumerate(CORRUPTIONS)}
    for name, rows in images.items():
        np.save(folder / f"{name}.npy", rows)
    np.save(folder / "labels.npy", np.tile(np.array([3, 8], dtype=np.uint8), 5))
    data = load_dataset(f"cifar10-c/{which}/2").test
    expected = np.concatenate([images[name][2:4] for name in members]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.images.numpy(), expected)
    assert data.labels.tolist() == [3, 8] * len(members)
    assert data.name == f"cifar10-c/{which}/2"
    (folder / "spatter.npy").unlink()
    (folder / "snow.npy").unlink()
    with pytest.raises(DataError, match=r"cifar10-c/.*/2: .*CIFAR-10-C lacks snow\.npy"):
        load_dataset(f"cifar10-c/{which}/2")


def test_a_set_of_corruptions_of_a_table(root: Path) -> None:
    names = [name for name in CORRUPTIONS for _ in range(2)]
    columns = {"image": cells(pixels(38)), "label": [1, 2] * 19, "corruption_name": names, "corruption_level": [3] * 38}
    features = {"image": IMAGE, "label": class_label(CIFAR10_CLASSES)}
    write_parquet(root / "cifar10-c/data/train-00000-of-00001.parquet", columns, features)
    for which, count in (("all", 38), ("fair_tat", 36), ("standard", 30), ("extra", 8), ("fog", 2)):
        assert len(load_dataset(f"cifar10-c/{which}/3").test) == count
    with pytest.raises(UnknownNameError, match="unknown part of cifar10-c/all/2 'gaussian-noise/2'"):
        load_dataset("cifar10-c/all/2")


def test_cifar10_c_as_a_table(root: Path) -> None:
    images = pixels(12)
    columns = {
        "image": cells(images),
        "label": [index % 10 for index in range(12)],
        "corruption_name": ["gaussian_noise", "fog"] * 6,
        "corruption_level": [1 + index // 4 for index in range(12)],
    }
    features = {"image": IMAGE, "label": class_label(CIFAR10_CLASSES)}
    write_parquet(root / "cifar10-c/data/train-00000-of-00001.parquet", columns, features)
    data = load_dataset("cifar10-c/gaussian_noise/3").test
    np.testing.assert_array_equal(data.images.numpy(), images[[8, 10]])
    assert data.labels.tolist() == [8, 0]
    assert load_dataset("cifar10-c/gaussian_noise/1").test.labels.tolist() == [0, 2]
    with pytest.raises(UnknownNameError, match="unknown part of cifar10-c/fogg/3 'fogg/3': did you mean fog/3"):
        load_dataset("cifar10-c/fogg/3")


@pytest.mark.parametrize("name", ["cifar10-c", "cifar10-c/fog", "cifar10-c/fog/6", "cifar10-c/fog/3/1"])
def test_cifar10_c_needs_a_corruption_and_a_severity(root: Path, name: str) -> None:
    with pytest.raises(
        DataError,
        match=r"name a corruption or a set \(standard, fair-tat, extra, all\) and a severity of 1 to 5, as in cifar10",
    ):
        load_dataset(name)


def test_a_named_set_with_another_number_of_classes(root: Path) -> None:
    write_images(root / "stl10/train", {"cat": pixels(1), "dog": pixels(1)})
    with pytest.raises(DataError, match="stl10: expected 10 classes, found 2"):
        load_dataset("stl10")


def test_catalogue_rows_are_consistent() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.augment in AUGMENTATIONS
        assert entry.class_names == () or len(entry.class_names) == entry.num_classes


# The hub


def hub_part(images: np.ndarray, labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CIFAR10_CLASSES))})
    return datasets.Dataset.from_dict({"img": cells(images), "label": labels}, features=features)


def test_a_name_that_is_not_local_comes_from_the_hub_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels(300, size=2)
    asked = []

    def load(*arguments: object) -> datasets.DatasetDict:
        asked.append(arguments)
        parts = {"train": hub_part(images, [label % 10 for label in range(300)]), "test": hub_part(images[:2], [5, 6])}
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for _ in range(2):
        data = load_dataset("cifar10")
        np.testing.assert_array_equal(data.train.images.numpy(), images)
        assert data.train.labels.tolist() == [label % 10 for label in range(300)]
        assert data.test.labels.tolist() == [5, 6]
    assert asked == [("uoft-cs/cifar10", None)]


def test_a_hub_repository_whose_test_part_has_no_labels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = {"train": [0, 1], "validation": [1, 2], "test": [-1, -1], "extra": [3, 3]}
    parts = datasets.DatasetDict({split: hub_part(pixels(2), labels) for split, labels in loaded.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: parts)
    for _ in range(2):
        with pytest.warns(RobustFairWarning, match="cifar10: left out: the test part"):
            data = load_dataset("cifar10")
        assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1, 2])
        assert data.notes == (
            "left out: extra (its name means no split)",
            "left out: the test part (no labels)",
            "the validation part is the test part",
        )


def test_a_hub_that_cannot_be_reached_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        load_dataset("svhn")
    assert "\n" not in str(caught.value)
    assert "no route); set ROBUSTFAIR_DATA to a folder that holds svhn/, or pass a folder" in str(caught.value)


def test_a_hub_repository_without_a_test_part(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.DatasetDict({"train": hub_part(pixels(2), [0, 1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    with pytest.raises(DataError, match="cifar10: expected train and test, uoft-cs/cifar10 has train"):
        load_dataset("cifar10")


def test_robustfair_data_must_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"ROBUSTFAIR_DATA is .*nowhere', which is not a folder"):
        load_dataset("cifar10")


# The cache


def test_decodes_again_when_the_source_or_the_size_changes(root: Path) -> None:
    folder = root / "mine"
    write_images(folder, {"cat": pixels(2), "dog": pixels(1)})
    first = load_dataset(folder).train
    assert load_dataset(folder, image_size=4).train.images.shape[2:] == (4, 4)
    write_images(folder, {"eel": pixels(1)})
    assert load_dataset(folder).train.class_names == ("cat", "dog", "eel")
    assert first.class_names == ("cat", "dog")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_cache_file_is_rebuilt(root: Path, tmp_path: Path, damage: str) -> None:
    write_images(root / "mine", {"cat": pixels(2), "dog": pixels(1)})
    expected = load_dataset(root / "mine").train.fingerprint
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "empty": b"",
        "foreign": b"not a cache file",
    }
    path.write_bytes(damaged[damage])
    assert load_dataset(root / "mine").train.fingerprint == expected
    found = cache.read(path)
    assert found is not None
    assert found[1]["fingerprint"] == expected


def test_a_load_from_the_cache_imports_neither_datasets_nor_pyarrow(root: Path) -> None:
    features = {"image": IMAGE, "label": class_label(["a", "b"])}
    write_parquet(root / "mine/train.parquet", {"image": cells(pixels(2)), "label": [0, 1]}, features)
    first = load_dataset(root / "mine").train
    code = (
        "import sys; from robustfair.data import load_dataset\n"
        f"print(load_dataset({str(root / 'mine')!r}).train.fingerprint)\n"
        "print([name for name in ('datasets', 'pyarrow', 'PIL', 'sklearn', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split("\n")[:2] == [first.fingerprint, "[]"]


# The real thing

MEMORY = """
import sys

def used(key):
    line, = (line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024

import torch
before = used("VmRSS")
from robustfair.data import load_dataset
data = load_dataset("cifar10", cache_dir=sys.argv[1])
print(len(data.train), len(data.test), used("VmRSS") - before, used("VmHWM") - before)
"""


@needs_cifar10
def test_real_cifar10(tmp_path: Path) -> None:
    """Memory in MiB beyond torch, on decoding and from the cache; then the facts known about the pixels and labels."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ
        )
        train, test, resident, peak = map(float, done.stdout.split())
        assert (train, test) == (50_000, 10_000)
        assert resident <= 400
        assert peak <= 400
    data = load_dataset("cifar10", cache_dir=tmp_path)
    assert data.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    for part, means in ((data.train, (0.4914, 0.4822, 0.4465)), (data.test, (0.4942, 0.4851, 0.4504))):
        assert part.class_names == CIFAR10_CLASSES
        assert part.class_counts().tolist() == [len(part) // 10] * 10
        channel_means = [
            part.images[:, channel].sum(dtype=torch.int64).item() / (len(part) * 1024 * 255) for channel in range(3)
        ]
        assert channel_means == pytest.approx(means, abs=5e-5)


# Samples


def test_a_stratified_sample_holds_as_many_of_each_class() -> None:
    data = make([0, 1, 2] * 20)
    found = data.sample(31, stratified=True, seed=4)
    assert found.class_counts().tolist() == [10, 10, 10]
    assert found.drawn is not None
    places = found.drawn.places
    assert torch.equal(places, places.sort().values)
    assert len(places.unique()) == 30
    assert torch.equal(found.images, data.images[places])
    assert torch.equal(found.labels, data.labels[places])
    assert (found.drawn.of, found.drawn.class_counts) == (60, (20, 20, 20))
    assert found.count_line("test") == (
        "images, test part: 30 of 60 images of 3 classes (10 each), as many of each class, drawn with seed 4"
    )
    assert found.fingerprint == data.sample(31, stratified=True, seed=4).fingerprint != data.fingerprint
    assert found.fingerprint != data.sample(31, stratified=True, seed=5).fingerprint


def test_a_class_with_fewer_images_gives_all_of_them() -> None:
    data = make([0] * 30 + [1] * 3 + [2] * 30, num_classes=4)
    assert data.sample(24, stratified=True).class_counts().tolist() == [10, 3, 10, 0]
    assert len(data.sample(63, stratified=True)) == 63


def test_a_sample_is_drawn_from_all_images_alike_and_says_so() -> None:
    data = make([0] * 90 + [1] * 10)
    found = data.sample(50, seed=1)
    assert found.drawn is not None
    assert (len(found), found.drawn.class_counts) == (50, None)
    assert found.drawn.words == "50 of 100 images, drawn with seed 1"
    first = np.mean([int(data.sample(10, seed=seed).class_counts()[0]) for seed in range(200)])
    assert first == pytest.approx(9, abs=0.25)


@pytest.mark.parametrize("stratified", [False, True])
def test_a_larger_sample_holds_the_smaller_one(stratified: bool) -> None:
    data = make([0, 1, 2, 2] * 20)
    small, large = (data.sample(n, stratified=stratified, seed=2).drawn for n in (12, 40))
    assert small is not None
    assert large is not None
    assert set(small.places.tolist()) < set(large.places.tolist())


def test_places_follow_a_subset_and_a_sample_of_a_sample() -> None:
    data = make([0, 1, 2] * 20)
    found = data.sample(30, stratified=True)
    assert found.drawn is not None
    assert torch.equal(found.subset([3, 1]).drawn.places, found.drawn.places[[3, 1]])  # type: ignore[union-attr]
    again = found.sample(6, stratified=True, seed=1).drawn
    assert again is not None
    assert set(again.places.tolist()) < set(found.drawn.places.tolist())
    assert again.class_counts == (20, 20, 20)
    assert data.subset([1]).drawn is None


@pytest.mark.parametrize("images", [0, -1, 61, 2.5, True])
def test_samples_that_cannot_be_drawn(images: int) -> None:
    with pytest.raises(ConfigError, match="sample: images must be a whole number from 1 to 60, all there are, got"):
        make([0, 1, 2] * 20).sample(images)
    with pytest.raises(ConfigError, match="from 2, one of every class, to 9, all there are, got 1"):
        make([0] * 5 + [2] * 4).sample(1, stratified=True)
