"""ImageNet, its subsets by list, and OfficeHome by domain, in made folders of their real layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from reference.layouts import IMAGE, cells, class_label, picture, pixels, write_images, write_parquet
from robustfair.data import CATALOG, load_dataset
from robustfair.data.catalog import DOMAINS
from robustfair.data.load import memory
from robustfair.errors import DataError, RobustFairWarning, UnknownNameError

WNIDS = ("n01440764", "n01443537", "n02123045")
SIZE = 8


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ROBUSTFAIR_DATA, beside a cache of the test's own; ImageNet has three classes here, ImageNet-100 two."""
    path = tmp_path / "data"
    path.mkdir()
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(path))
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    for name, classes in (("imagenet", 3), ("imagenet/val", 3), ("imagenet-lt", 3), ("imagenet-100", 2)):
        monkeypatch.setitem(CATALOG, name, replace(CATALOG[name], num_classes=classes))
    return path


def jpegs(folder: Path, named: Mapping[str, np.ndarray]) -> None:
    """Pictures (C, H, W) under these names, whatever their suffix says, without a loss."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in named.items():
        picture(image).save(folder / name, format="PNG")


def train(folder: Path, wnids: tuple[str, ...] = WNIDS, each: int = 2) -> np.ndarray:
    """Images of ImageNet's training part, by class."""
    images = pixels(len(wnids) * each, size=SIZE)
    for position, wnid in enumerate(wnids):
        named = {f"{wnid}_{10 + n}.JPEG": images[position * each + n] for n in range(each)}
        jpegs(folder / "train" / wnid, named)
    return images


def flat_val(folder: Path, count: int = 4) -> np.ndarray:
    """Images of ImageNet's validation part, all in one folder."""
    images = pixels(count, size=SIZE, seed=1)
    jpegs(folder, {f"ILSVRC2012_val_{n + 1:08d}.JPEG": image for n, image in enumerate(images)})
    return images


def devkit(folder: Path, labels: tuple[int, ...], numbers: Mapping[int, str]) -> Path:
    """The development kit: a number of a class an image, and the table that names the numbers."""
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{label}\n" for label in labels))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, "a word, words", "what it is", 0) for number, wnid in numbers.items()]
    rows.append((1001, "n00001740", "entity", "all of them", 3))
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    return data


# ImageNet


def test_class_folders_of_both_parts(root: Path) -> None:
    images = train(root / "imagenet")
    for wnid, image in zip(WNIDS, pixels(3, size=SIZE, seed=1), strict=True):
        jpegs(root / "imagenet" / "val" / wnid, {"ILSVRC2012_val_00000007.JPEG": image})
    data = load_dataset("imagenet", image_size=SIZE)
    np.testing.assert_array_equal(data.train.images.numpy(), images)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.train.class_names == WNIDS
    assert (data.train.augment, data.notes) == ("crop-flip", ("the validation part is the test part",))
    assert CATALOG["imagenet"].image_size == 224


def test_all_thousand_classes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "imagenet", replace(CATALOG["imagenet"], num_classes=1000))
    wnids = tuple(f"n{number:08d}" for number in range(1000))
    for part in ("train", "val"):
        write_images(root / "ILSVRC2012" / part, {wnid: pixels(1, size=2) for wnid in wnids})
    assert load_dataset("imagenet", image_size=2).test.labels.tolist() == list(range(1000))


def test_a_flat_validation_folder_beside_the_development_kit(root: Path) -> None:
    train(root / "imagenet")
    images = flat_val(root / "imagenet" / "val")
    devkit(root / "imagenet", (3, 1, 1, 2), {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[1]})
    for _ in range(2):
        data = load_dataset("imagenet", image_size=SIZE)
        assert data.test.labels.tolist() == [0, 1, 2, 2]
        np.testing.assert_array_equal(data.test.images.numpy(), images[[3, 0, 1, 2]])
        assert data.notes == (
            "the classes of the validation part are those in ILSVRC2012_validation_ground_truth.txt",
            "the validation part is the test part",
        )


def test_kaggles_archive(root: Path) -> None:
    inner = root / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    train(inner)
    flat_val(inner / "val")
    jpegs(inner / "test", {"ILSVRC2012_test_00000001.JPEG": pixels(1, size=SIZE)[0]})
    lines = [
        f"ILSVRC2012_val_{n + 1:08d},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8 \n"
        for n, label in enumerate((2, 0, 1, 0))
    ]
    (root / "imagenet" / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    data = load_dataset("imagenet", image_size=SIZE)
    assert (len(data.train), data.test.class_counts().tolist()) == (6, [2, 1, 1])
    assert "read from ILSVRC, the one folder in imagenet" in data.notes
    assert "left out: test (its images lie in no class folder: they have no labels)" in data.notes


def test_a_flat_validation_folder_without_its_classes_names_what_is_missing(root: Path) -> None:
    train(root / "imagenet")
    flat_val(root / "imagenet" / "val")
    expected = (
        r"the images of val in .*imagenet lie in no class folder, and no file tells their classes: expected train/"
    )
    with pytest.raises(DataError, match=expected) as caught:
        load_dataset("imagenet", image_size=SIZE)
    assert "ILSVRC2012_devkit_t12/data/ or LOC_val_solution.csv" in str(caught.value)
    data = devkit(root / "imagenet", (1, 1, 2, 3), dict(enumerate(WNIDS, 1)))
    (data / "meta.mat").unlink()
    with pytest.raises(DataError, match=r"meta\.mat, which names the numbers, is missing: unpack ILSVRC2012_devkit"):
        load_dataset("imagenet", image_size=SIZE)
    (data / "meta.mat").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"meta\.mat cannot be read as the development kit's table of classes"):
        load_dataset("imagenet", image_size=SIZE)


def test_ground_truth_that_does_not_fit_its_images(root: Path) -> None:
    train(root / "imagenet")
    flat_val(root / "imagenet" / "val")
    data = devkit(root / "imagenet", (1, 1, 2), dict(enumerate(WNIDS, 1)))
    with pytest.raises(DataError, match=r"ground_truth\.txt names no class of .*val_00000004\.JPEG"):
        load_dataset("imagenet", image_size=SIZE)
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n3\n1\n2\n")
    assert (
        "the validation part is not whole: 1 of its 5 images are missing"
        in load_dataset("imagenet", image_size=SIZE).notes
    )
    truth.write_text("1\n2\nthree\n1\n")
    with pytest.raises(DataError, match=r"line 3 is 'three', no number of a class in meta\.mat"):
        load_dataset("imagenet", image_size=SIZE)
    truth.write_text("1\n2\n1001\n1\n")
    with pytest.raises(DataError, match=r"line 3 is '1001', no number of a class"):
        load_dataset("imagenet", image_size=SIZE)


def test_the_validation_part_alone(root: Path) -> None:
    train(root / "imagenet")
    flat_val(root / "imagenet" / "val")
    devkit(root / "imagenet", (1, 2, 3, 3), dict(enumerate(WNIDS, 1)))
    data = load_dataset("imagenet/val", image_size=SIZE)
    assert list(data.parts) == ["test"]
    assert data.test.class_names == WNIDS
    assert data.test.fingerprint == load_dataset("imagenet", image_size=SIZE).test.fingerprint
    for file in (root / "imagenet" / "val").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="imagenet/val: there is no test part: expected train/<wnid>/"):
        load_dataset("imagenet/val", image_size=SIZE)


def test_the_validation_part_of_tables(root: Path) -> None:
    features = {"image": IMAGE, "label": class_label(WNIDS)}
    for part, labels in (("train", [0, 1]), ("validation", [2, 1, 0]), ("test", [-1, -1])):
        columns = {"image": cells(pixels(len(labels), size=SIZE)), "label": labels}
        write_parquet(root / "imagenet/data" / f"{part}-00000-of-00001.parquet", columns, features)
    assert load_dataset("imagenet", image_size=SIZE).train.labels.tolist() == [0, 1]
    data = load_dataset("imagenet/val", image_size=SIZE)
    assert (list(data.parts), data.test.labels.tolist()) == (["test"], [2, 1, 0])


def test_images_are_brought_to_the_size_on_loading(root: Path) -> None:
    shapes = [(30, 20), (16, 40), (50, 50), (16, 16), (9, 8), (8, 100)]
    for wnid, two in zip(WNIDS, (shapes[:2], shapes[2:4], shapes[4:]), strict=True):
        (root / "imagenet" / "train" / wnid).mkdir(parents=True)
        for number, size in enumerate(two):
            Image.effect_noise(size, 50).convert("RGB").save(root / "imagenet" / "train" / wnid / f"{number}.JPEG")
    assert load_dataset("imagenet", image_size=16).train.images.shape == (6, 3, 16, 16)
    assert load_dataset("imagenet").train.images.shape == (6, 3, 224, 224)


# Memory


def test_images_that_do_not_fit_are_refused_before_they_are_decoded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(root / "imagenet")
    for wnid in WNIDS:
        write_images(root / "imagenet" / "val", {wnid: pixels(1, size=SIZE)})
    (root / "imagenet" / "val" / WNIDS[2] / "000.png").write_bytes(b"never opened")
    monkeypatch.setattr(memory, "free_memory", lambda: 9 * 3 * 20 * 20)
    message = (
        r"^imagenet: 9 images of 224x224 take 0\.00135 GB of memory and 1.08e-05 GB are free: an `image_size` of at "
        r"most 20 would fit, or take fewer$"
    )
    with pytest.raises(DataError, match=message):
        load_dataset("imagenet")
    with pytest.raises(DataError, match="cannot be decoded"):
        load_dataset("imagenet", image_size=20)


def test_what_many_images_take_is_said_before_they_are_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(root / "imagenet")
    monkeypatch.setattr(memory, "LARGE", 6 * 3 * SIZE * SIZE)
    with pytest.warns(RobustFairWarning, match="imagenet: decoding 6 images of 8x8, all held in memory, 1.15e-06 GB"):
        load_dataset("imagenet", image_size=SIZE)


# ImageNet-LT


def lists(folder: Path, **named: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for part, lines in named.items():
        (folder / f"ImageNet_LT_{part}.txt").write_text("".join(f"{line}\n" for line in lines))


TRAIN = [f"train/{WNIDS[2]}/{WNIDS[2]}_10.JPEG 2", f"train/{WNIDS[0]}/{WNIDS[0]}_11.JPEG 0"]
TRAIN += [f"train/{WNIDS[0]}/{WNIDS[0]}_10.JPEG 0", f"train/{WNIDS[1]}/{WNIDS[1]}_10.JPEG 1"]
TEST = [f"val/{WNIDS[1]}/ILSVRC2012_val_00000002.JPEG 1", f"val/{WNIDS[0]}/ILSVRC2012_val_00000004.JPEG 0"]


@pytest.mark.parametrize("where", ["imagenet", "imagenet-lt", "imagenet/ILSVRC/Data/CLS-LOC"])
def test_long_tail_lists(root: Path, where: str) -> None:
    images, held = train(root / where), flat_val(root / where / "val")
    lists(root / "imagenet-lt", train=TRAIN, test=TEST, val=[f"train/{WNIDS[1]}/{WNIDS[1]}_11.JPEG 1"])
    for _ in range(2):
        data = load_dataset("imagenet-lt", image_size=SIZE)
        np.testing.assert_array_equal(data.train.images.numpy(), images[[0, 1, 2, 4]])
        np.testing.assert_array_equal(data.test.images.numpy(), held[[3, 1]])
        assert data.train.labels.tolist() == [0, 0, 1, 2]
        assert data.test.labels.tolist() == [0, 1]
        assert data.train.class_names == WNIDS
        assert data.notes == (
            "read as ImageNet_LT_train.txt, ImageNet_LT_test.txt list it",
            "left out: the validation part (there is a test part, and training holds out its own)",
        )


def test_long_tail_lists_that_do_not_fit_their_images(root: Path) -> None:
    train(root / "imagenet")
    flat_val(root / "imagenet" / "val")
    lists(root / "imagenet-lt", train=TRAIN)
    with pytest.raises(
        DataError, match=r"imagenet-lt lacks ImageNet_LT_test\.txt: expected ImageNet_LT_train\.txt and"
    ):
        load_dataset("imagenet-lt")
    lists(root / "imagenet-lt", test=[*TEST, "val/n02123045/ILSVRC2012_val_00000009.JPEG 2"])
    with pytest.raises(
        DataError, match=r"1 of 3 images are missing, the first is val/n02123045/ILSVRC2012_val_00000009\.JPEG, looked"
    ):
        load_dataset("imagenet-lt")
    for line, message in (
        ("val/n02123045/ILSVRC2012_val_00000001.JPEG", "line 3 is .*: expected the path of an image and its class"),
        ("val/n02123045/ILSVRC2012_val_00000001.JPEG 0", "class 0 lies in two folders, n01440764 and n02123045"),
    ):
        lists(root / "imagenet-lt", test=[*TEST, line])
        with pytest.raises(DataError, match=message):
            load_dataset("imagenet-lt")
    lists(root / "imagenet-lt", test=[])
    with pytest.raises(DataError, match=r"ImageNet_LT_test\.txt is empty"):
        load_dataset("imagenet-lt")


# ImageNet-100


def test_a_folder_of_the_classes(root: Path) -> None:
    train(root / "imagenet100", WNIDS[1:])
    for wnid in WNIDS[1:]:
        jpegs(root / "imagenet100" / "val" / wnid, {"0.JPEG": pixels(1, size=SIZE)[0]})
    assert load_dataset("imagenet-100", image_size=SIZE).test.class_names == WNIDS[1:]


@pytest.mark.parametrize("flat", [True, False])
def test_a_list_of_the_classes_beside_imagenet(root: Path, flat: bool) -> None:
    images = train(root / "imagenet")
    if flat:
        flat_val(root / "imagenet" / "val")
        devkit(root / "imagenet", (1, 2, 3, 3), dict(enumerate(WNIDS, 1)))
    else:
        write_images(root / "imagenet" / "val", {wnid: pixels(2, size=SIZE) for wnid in WNIDS})
    (root / "imagenet-100").mkdir()
    (root / "imagenet-100" / "imagenet100.txt").write_text(f"{WNIDS[2]} tabby\n{WNIDS[0]}\n\n")
    data = load_dataset("imagenet-100", image_size=SIZE)
    assert data.train.class_names == (WNIDS[0], WNIDS[2])
    np.testing.assert_array_equal(data.train.images.numpy(), images[[0, 1, 4, 5]])
    assert data.test.labels.tolist() == ([0, 1, 1] if flat else [0, 0, 1, 1])
    assert data.notes[0] == f"the classes are the 2 in imagenet100.txt, images from {root / 'imagenet'}"


def test_class_lists_that_do_not_fit(root: Path) -> None:
    file = root / "imagenet-100" / "imagenet100.txt"
    with pytest.raises(
        DataError, match=r"imagenet-100 is read from local files alone, and .*data holds no folder of it"
    ):
        load_dataset("imagenet-100")
    file.parent.mkdir()
    with pytest.raises(
        DataError, match=r"imagenet-100: .* holds no images: expected .* imagenet100\.txt with 100 wnids"
    ):
        load_dataset("imagenet-100")
    file.write_text(f"{WNIDS[0]}\n{WNIDS[1]}\n")
    with pytest.raises(DataError, match=r"names classes, and ROBUSTFAIR_DATA holds no imagenet/ with their images"):
        load_dataset("imagenet-100")
    train(root / "imagenet", WNIDS[1:])
    write_images(root / "imagenet" / "val", {wnid: pixels(1, size=SIZE) for wnid in WNIDS})
    with pytest.raises(DataError, match=rf"imagenet has no train images of {WNIDS[0]}, which .*imagenet100\.txt names"):
        load_dataset("imagenet-100")
    file.write_text(f"{WNIDS[1]}\n{WNIDS[1]}\n")
    with pytest.raises(DataError, match=f"names {WNIDS[1]} twice: write each class once"):
        load_dataset("imagenet-100")
    file.write_text(f"{WNIDS[1]}\n")
    with pytest.raises(DataError, match="imagenet-100: expected 2 classes, found 1"):
        load_dataset("imagenet-100", image_size=SIZE)


# OfficeHome


def office(folder: Path, domains: tuple[str, ...] = DOMAINS) -> dict[str, np.ndarray]:
    """Five pictures of each of 65 classes a domain, in the folders of the authors; their images by domain."""
    found = {}
    for seed, domain in enumerate(domains):
        found[domain] = pixels(65 * 5, size=2, seed=seed)
        named = {f"class {n:02d}": found[domain][5 * n : 5 * n + 5] for n in range(65)}
        write_images(folder / domain, named)
    (folder / "ImageInfo.csv").write_text("about")
    return found


@pytest.mark.parametrize(
    "folder", ["office-home", "OfficeHomeDataset_10072016", "office-home/OfficeHomeDataset_10072016"]
)
def test_one_domain_of_office_home(root: Path, folder: str) -> None:
    images = office(root / folder)
    data = load_dataset("office-home/Real_World", image_size=2)
    assert data.train.name == "office-home/real-world"
    assert (data.train.class_counts().tolist(), data.test.class_counts().tolist()) == ([4] * 65, [1] * 65)
    both = sorted(image.tobytes() for part in data.parts.values() for image in part.images.numpy())
    assert both == sorted(image.tobytes() for image in images["Real World"])


def test_all_domains_of_office_home(root: Path) -> None:
    office(root / "office-home", ("Art", "Clipart", "Product", "RealWorld"))
    whole = load_dataset("office-home", image_size=2)
    assert whole.train.class_counts().tolist() == [16] * 65
    counts = [len(load_dataset(f"office-home/{domain}", image_size=2).test) for domain in ("art", "real-world")]
    assert counts == [65, 65]


def test_a_domain_of_the_table_of_the_hub(root: Path) -> None:
    labels = [index % 65 for index in range(130)]
    columns = {"image": cells(pixels(260, size=2)), "domain": [3] * 130 + [0] * 130, "label": labels + labels[::-1]}
    features = {"image": IMAGE, "domain": class_label(DOMAINS), "label": class_label([f"c{n}" for n in range(65)])}
    write_parquet(root / "office-home/data/train-00000-of-00001.parquet", columns, features)
    data = load_dataset("office-home/real-world", image_size=2)
    assert len(data.train) + len(data.test) == 130
    with pytest.raises(UnknownNameError, match="unknown part of office-home/clipart 'clipart'"):
        load_dataset("office-home/clipart", image_size=2)
    assert len(load_dataset("office-home", image_size=2).train) == 195


def test_a_domain_that_is_missing(root: Path) -> None:
    office(root / "office-home", ("Art", "Product"))
    for name, missing in (("office-home", "Clipart, Real World"), ("office-home/real-world", "Real World")):
        with pytest.raises(
            DataError, match=rf"office-home lacks {missing}, it has Art, Product: expected Art/<class>/"
        ):
            load_dataset(name)
    with pytest.raises(
        UnknownNameError, match="unknown data set 'office-home/reel-world': did you mean office-home/real"
    ):
        load_dataset("office-home/reel-world")


def test_a_domain_of_a_folder_without_domains(root: Path) -> None:
    write_images(root / "office-home", {f"class {n:02d}": pixels(2, size=2) for n in range(65)})
    with pytest.raises(DataError, match="office-home holds no folder Art: expected Art/<class>/, Clipart/<class>/"):
        load_dataset("office-home/art")
    assert len(load_dataset("office-home", image_size=2).train) == 65
