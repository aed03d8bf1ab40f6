"""Every kind of path, and every way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from reference.layouts import IMAGE, cells, class_label, pixels, png, write_images, write_parquet
from robustfair.data.datasets import load_dataset
from robustfair.errors import ConfigError, DataError, RobustFairWarning, UnknownNameError

AB = {"image": IMAGE, "label": class_label(["a", "b"])}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    return path


# Saved data sets


def saved(images: np.ndarray, labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"picture": cells(images), "kind": labels}, features=features)


def test_saved_data_set_with_parts(folder: Path) -> None:
    images = pixels(300, size=3)
    labels = [index % 2 for index in range(300)]
    parts = {"train": saved(images, labels), "validation": saved(images[:2], [1, 1])}
    datasets.DatasetDict(parts).save_to_disk(folder, num_shards={"train": 2, "validation": 1})
    data = load_dataset(folder)
    np.testing.assert_array_equal(data.train.images.numpy(), images)
    assert data.train.labels.tolist() == labels
    assert data.test.labels.tolist() == [1, 1]
    assert (data.train.name, data.train.augment, data.train.class_names) == ("mine", "crop-flip", ("a", "b"))


def test_saved_part_alone_keeps_the_rows_that_were_selected(folder: Path) -> None:
    images = pixels(4)
    saved(images, [0, 1, 1, 0]).select([3, 1]).save_to_disk(folder)
    data = load_dataset(folder).only
    np.testing.assert_array_equal(data.images.numpy(), images[[3, 1]])
    assert data.labels.tolist() == [0, 1]


def test_saved_data_set_that_is_not_whole(folder: Path) -> None:
    saved(pixels(2), [0, 1]).save_to_disk(folder)
    (arrow,) = folder.glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=r"\.arrow cannot be read"):
        load_dataset(folder)
    arrow.unlink()
    with pytest.raises(DataError, match=r"is not whole, .*\.arrow is missing"):
        load_dataset(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json cannot be read"):
        load_dataset(folder)


# Parquet


@pytest.mark.parametrize(
    "files",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train.parquet", "data/val.parquet"),
        ("train/0.parquet", "validation/0.parquet"),
        ("my_train_set.parquet", "my-test-set.parquet"),
    ],
)
def test_parts_are_read_off_file_and_folder_names(folder: Path, files: tuple[str, str]) -> None:
    images = pixels(3)
    write_parquet(folder / files[0], {"image": cells(images[:2]), "label": [1, 0]}, AB)
    write_parquet(folder / files[1], {"image": cells(images[2:]), "label": [1]}, AB)
    data = load_dataset(folder)
    np.testing.assert_array_equal(data.train.images.numpy(), images[:2])
    np.testing.assert_array_equal(data.test.images.numpy(), images[2:])


def test_test_wins_over_validation_and_other_parts_are_left_out(folder: Path) -> None:
    for position, part in enumerate(("train", "validation", "test", "unlabeled")):
        write_parquet(
            folder / f"{part}.parquet", {"image": cells(pixels(position + 1)), "label": [0] * (position + 1)}, AB
        )
    data = load_dataset(folder)
    assert (len(data.train), len(data.test)) == (1, 3)


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_test_part_without_labels_is_left_out_and_the_validation_part_takes_its_place(
    folder: Path, labels: list[int | None]
) -> None:
    for part, held in (("train", [0, 1]), ("validation", [1, 0]), ("test", labels)):
        columns = {"image": cells(pixels(2)), "label": pa.array(held, pa.int64())}
        write_parquet(folder / f"{part}-00000-of-00001.parquet", columns, AB)
    for _ in range(2):
        with pytest.warns(RobustFairWarning):
            data = load_dataset(folder)
        assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1, 0])
        assert data.notes == ("left out: the test part (no labels)", "the validation part is the test part")


def test_a_test_part_without_labels_and_no_other_leaves_the_train_part(folder: Path) -> None:
    write_parquet(folder / "train.parquet", {"image": cells(pixels(2)), "label": [0, 1]}, AB)
    write_parquet(folder / "test.parquet", {"image": cells(pixels(2)), "label": [-1, -1]}, AB)
    for _ in range(2):
        data = load_dataset(folder)
        assert list(data.parts) == ["train"]
        assert data.notes == ("left out: the test part (no labels)",)
    write_parquet(folder / "test.parquet", {"image": cells(pixels(2))})
    assert load_dataset(folder).notes == ("left out: the test part (no labels)",)
    write_parquet(folder / "test.parquet", {"image": cells(pixels(2)), "label": [-1, 1]}, AB)
    with pytest.raises(DataError, match="labels outside the range 0 to 1, the first is -1 at index 0"):
        load_dataset(folder)


@pytest.mark.parametrize(
    "files",
    [
        ("a/train.parquet", "b/train.parquet"),
        ("train.parquet", "train_old.parquet"),
        ("train-00000-of-00001-aaa.parquet", "train-00000-of-00001-bbb.parquet"),
        ("train-00000-of-00002.parquet", "train-00000-of-00003.parquet"),
    ],
)
def test_files_that_may_be_versions_of_one_part_are_refused(folder: Path, files: tuple[str, str]) -> None:
    for file in files:
        write_parquet(folder / file, {"image": cells(pixels(1)), "label": [0]}, AB)
    with pytest.raises(DataError, match="all bear the name of the train part: pieces of one part, or versions"):
        load_dataset(folder)


def test_missing_files_of_a_part_are_said(folder: Path) -> None:
    for number in (0, 2):
        write_parquet(folder / f"train-0000{number}-of-00005.parquet", {"image": cells(pixels(1)), "label": [0]}, AB)
    data = load_dataset(folder)
    assert len(data.only) == 2
    assert data.notes == ("the train part is not whole: 3 of its 5 files are missing",)


def test_tables_beside_image_folders_are_refused_as_two_fold(folder: Path) -> None:
    write_images(folder, {"a": pixels(1), "b": pixels(1)})
    write_parquet(folder / "metadata.parquet", {"image": cells(pixels(1)), "label": [0]}, AB)
    with pytest.raises(DataError, match=r"parquet files \(metadata\.parquet\) and image folders \(a, b\), and either"):
        load_dataset(folder)
    assert len(load_dataset(folder / "metadata.parquet").only) == 1


def test_files_beside_tables_are_left_out(folder: Path) -> None:
    write_images(folder, {"assets": pixels(1)})
    (folder / "README.md").write_text("about")
    write_parquet(folder / "data" / "train.parquet", {"image": cells(pixels(1)), "label": [0]}, AB)
    data = load_dataset(folder)
    assert len(data.only) == 1
    assert data.notes == ("left out: 1 .md, 1 .png (no tables)",)


def test_labels_that_count_from_one_are_refused_as_two_fold(folder: Path) -> None:
    write_parquet(folder / "train.parquet", {"image": cells(pixels(2)), "label": [1, 2]})
    with pytest.raises(
        DataError, match=r"labels run from 1 to 2 and none is 0: they count from one, or class 0 has no"
    ):
        load_dataset(folder)
    np.savez(folder / "made.npz", images=pixels(2), labels=np.array([1, 2]))
    with pytest.raises(DataError, match=r"For the first store labels - 1; for the second name all classes"):
        load_dataset(folder / "made.npz")
    np.savez(folder / "made.npz", images=pixels(2), labels=np.array([1, 2]), class_names=np.array(["a", "b", "c"]))
    assert load_dataset(folder / "made.npz").only.class_counts().tolist() == [0, 1, 1]


def test_files_without_a_part_in_their_name_are_one_part_in_the_order_of_their_names(folder: Path) -> None:
    write_parquet(folder / "b.parquet", {"image": cells(pixels(1)), "label": [1]}, AB)
    write_parquet(folder / "a.parquet", {"image": cells(pixels(2)), "label": [0, 0]}, AB)
    assert load_dataset(folder).only.labels.tolist() == [0, 0, 1]
    assert load_dataset(folder / "b.parquet").only.labels.tolist() == [1]


def test_columns_are_found_by_type_then_by_usual_name(folder: Path) -> None:
    features = {"scan": IMAGE, "organ": class_label(["lung", "heart"]), "age": {"_type": "Value", "dtype": "int64"}}
    write_parquet(folder / "typed/x.parquet", {"age": [7, 8], "scan": cells(pixels(2)), "organ": [1, 0]}, features)
    assert load_dataset(folder / "typed").only.class_names == ("lung", "heart")
    plain = {"img": [png(image) for image in pixels(3)], "y": [2, 0, 2]}
    write_parquet(folder / "plain/x.parquet", plain)
    data = load_dataset(folder / "plain").only
    assert data.class_names == ("0", "1", "2")
    assert data.labels.tolist() == [2, 0, 2]


def test_text_labels_are_sorted_over_all_parts(folder: Path) -> None:
    write_parquet(folder / "train.parquet", {"image": cells(pixels(2)), "label": ["dog", "cat"]})
    write_parquet(folder / "test.parquet", {"image": cells(pixels(2)), "label": ["bee", "dog"]})
    data = load_dataset(folder)
    assert data.train.class_names == ("bee", "cat", "dog")
    assert data.train.labels.tolist() == [2, 1]
    assert data.test.labels.tolist() == [0, 2]
    write_parquet(folder / "train.parquet", {"image": cells(pixels(3)), "label": ["2", "10", "1"]})
    write_parquet(folder / "validation.parquet", {"image": cells(pixels(1)), "label": ["2"]})
    write_parquet(folder / "test.parquet", {"image": cells(pixels(1)), "label": [""]})
    assert load_dataset(folder).notes == (
        "left out: the test part (no labels)",
        "the validation part is the test part",
        "class names are sorted as text: class index 1 is 10",
    )


def test_super_classes_are_unknown_unless_every_class_has_images(folder: Path) -> None:
    features = {"image": IMAGE, "fine_label": class_label(["a", "b"]), "coarse_label": class_label(["x", "y"])}
    for name, fine in (("all", [0, 1]), ("some", [0, 0])):
        columns = {"image": cells(pixels(2)), "fine_label": fine, "coarse_label": [1 - label for label in fine]}
        write_parquet(folder / name / "train.parquet", columns, features)
    assert load_dataset(folder / "all").train.groups == (1, 0)
    assert load_dataset(folder / "some").train.groups is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": cells(pixels(1)), "age": [1]}, "no label column among 'image', 'age' in"),
        ({"age": [1], "label": [1]}, "no image column among 'age', 'label' in"),
        ({"image": cells(pixels(1)), "label": [None]}, "row 0 has no usable 'label', got None"),
        ({"image": cells(pixels(1)), "label": [0.5]}, "row 0 has no usable 'label', got 0.5"),
        ({"image": [1.5], "label": [0]}, "row 0 holds no encoded image, got float"),
        ({"image": [{"bytes": b"broken", "path": None}], "label": [0]}, r"train\.parquet row 0 cannot be decoded"),
        ({"image": [], "label": []}, "mine: the train part holds no images"),
        ({"image": cells(pixels(1)), "label": [-1]}, r"mine: no image has a label \(all are -1\)"),
        ({"image": cells(pixels(2)), "label": [0, -1]}, "labels outside the range"),
        ({"image": cells(pixels(1)), "label": [10**9]}, "labels outside the range, 1000000000 is no class index"),
    ],
)
def test_bad_tables(folder: Path, columns: dict, message: str) -> None:
    write_parquet(folder / "train.parquet", columns)
    with pytest.raises(DataError, match=message):
        load_dataset(folder)


def test_labels_beyond_the_names(folder: Path) -> None:
    write_parquet(folder / "train.parquet", {"image": cells(pixels(3)), "label": [0, 1, 2]}, AB)
    with pytest.raises(DataError, match="mine: labels outside the range 0 to 1, the first is 2 at index 2"):
        load_dataset(folder)


def test_files_that_differ_in_columns_or_names(folder: Path) -> None:
    write_parquet(folder / "train.parquet", {"image": cells(pixels(1)), "label": [0]}, AB)
    write_parquet(folder / "test.parquet", {"image": cells(pixels(1)), "kind": [0]}, AB)
    with pytest.raises(DataError, match="no column 'label' among 'image', 'kind'"):
        load_dataset(folder)
    other = {"image": IMAGE, "label": class_label(["b", "a"])}
    write_parquet(folder / "test.parquet", {"image": cells(pixels(1)), "label": [0]}, other)
    with pytest.raises(DataError, match=r"class names of column 'label' in .* differ"):
        load_dataset(folder)


def test_corrupt_parquet(folder: Path) -> None:
    path = folder / "train.parquet"
    write_parquet(path, {"image": cells(pixels(9)), "label": [0] * 9}, AB)
    whole = path.read_bytes()
    for damaged in (b"", b"no parquet at all", whole[: len(whole) // 2], bytes(300) + whole[300:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train\.parquet"):
            load_dataset(folder)


# Image folders


def test_image_folder_without_parts(folder: Path) -> None:
    cat, dog = pixels(2, seed=1), pixels(1, seed=2)
    write_images(folder, {"dog": dog, "cat": cat})
    data = load_dataset(folder).only
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(data.images.numpy(), np.concatenate([cat, dog]))
    assert data.class_counts().tolist() == [2, 1]


@pytest.mark.parametrize("held", ["test", "val", "valid", "validation"])
def test_image_folder_with_parts_shares_its_classes(folder: Path, held: str) -> None:
    write_images(folder / "train", {"cat": pixels(2), "dog": pixels(1)})
    write_images(folder / held, {"dog": pixels(1), "bee": pixels(1)})
    data = load_dataset(str(folder))
    assert data.train.class_names == data.test.class_names == ("bee", "cat", "dog")
    assert data.train.labels.tolist() == [1, 1, 2]
    assert data.test.labels.tolist() == [0, 2]


def test_a_class_may_bear_the_name_of_a_part(folder: Path) -> None:
    write_images(folder, {"bus": pixels(1), "train": pixels(2)})
    assert load_dataset(folder).only.class_names == ("bus", "train")


def test_only_a_test_part(folder: Path) -> None:
    write_images(folder / "test", {"a": pixels(1), "b": pixels(1)})
    data = load_dataset(folder)
    assert data.only is data.test
    with pytest.raises(DataError, match="mine has no train part, only 2 images of part test"):
        _ = data.train


def test_images_below_a_class_folder_and_hidden_files(folder: Path) -> None:
    write_images(folder / "cat", {"images": pixels(2), ".cache": pixels(3)})
    write_images(folder, {".git": pixels(1)})
    (folder / "cat" / "notes.txt").write_text("not an image")
    data = load_dataset(folder).only
    assert data.class_names == ("cat",)
    assert len(data) == 2


def test_every_mode_but_grey_becomes_colour(folder: Path) -> None:
    grey = pixels(1, channels=1)
    write_images(folder, {"a": grey})
    assert load_dataset(folder).only.images.shape == (1, 1, 8, 8)
    colour = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    colour.save(folder / "a" / "rgba.png")
    colour.convert("RGB").convert("P").save(folder / "a" / "palette.png")
    colour.convert("CMYK").save(folder / "a" / "cmyk.jpg", quality=100)
    images = load_dataset(folder).only.images
    assert images.shape == (4, 3, 8, 8)
    np.testing.assert_array_equal(images[0].numpy(), grey[0].repeat(3, axis=0))
    assert images[3].float().mean((1, 2)).tolist() == [10, 20, 30]


def test_sizes_that_differ_need_image_size(folder: Path) -> None:
    write_images(folder, {"a": pixels(1, size=8)})
    Image.new("RGB", (6, 12), (9, 9, 9)).save(folder / "a" / "z.png")
    with pytest.raises(DataError, match=r"z\.png is 12x6 pixels and the first image 8x8; pass `image_size`"):
        load_dataset(folder)
    images = load_dataset(folder, image_size=6).only.images
    assert images.shape == (2, 3, 6, 6)
    assert (images[1] == 9).all()


def test_resizing_keeps_the_centre_square(folder: Path) -> None:
    wide = np.zeros((1, 3, 4, 12), dtype=np.uint8)
    wide[..., 4:8] = pixels(1, size=4)
    write_images(folder, {"a": wide})
    np.testing.assert_array_equal(load_dataset(folder, image_size=4).only.images.numpy(), wide[..., 4:8])


def test_parts_of_different_size_need_image_size(folder: Path) -> None:
    write_images(folder / "train", {"a": pixels(1, size=8)})
    write_images(folder / "test", {"a": pixels(1, size=4)})
    with pytest.raises(DataError, match=r"parts differ in size \(train 8x8, test 4x4\); pass `image_size`"):
        load_dataset(folder)
    assert load_dataset(folder, image_size=4).train.images.shape == (1, 3, 4, 4)


def test_corrupt_image_is_named(folder: Path) -> None:
    write_images(folder, {"a": pixels(2)})
    broken = folder / "a" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"image .*mine/a/001\.png cannot be decoded") as caught:
        load_dataset(folder)
    assert "\n" not in str(caught.value)


def test_parts_without_a_common_class(folder: Path) -> None:
    write_images(folder / "train", {"cat": pixels(1), "dog": pixels(1)})
    write_images(folder / "val", {"images": pixels(1)})
    with pytest.raises(DataError, match="no class folder in common"):
        load_dataset(folder)


def test_folders_without_images(folder: Path) -> None:
    with pytest.raises(DataError, match="mine holds no images that can be read: expected <class>/<image>"):
        load_dataset(folder)
    Image.new("RGB", (4, 4)).save(folder / "loose.png")
    with pytest.raises(DataError, match=r"expected <class>/<image>.* found 1 \.png in no class folder"):
        load_dataset(folder)
    (folder / "cat").mkdir()
    with pytest.raises(DataError, match=r"expected <class>/<image>.* found 1 \.png in no class folder"):
        load_dataset(folder)


# Arrays


@pytest.mark.parametrize(("image_key", "label_key"), [("images", "labels"), ("x", "y"), ("image", "label")])
@pytest.mark.parametrize("channels_last", [True, False])
def test_npz(folder: Path, image_key: str, label_key: str, channels_last: bool) -> None:
    images = pixels(3)
    stored = images.transpose(0, 2, 3, 1) if channels_last else images
    np.savez(folder / "made.npz", **{image_key: stored, label_key: np.array([2, 0, 2])})
    data = load_dataset(folder / "made.npz").only
    np.testing.assert_array_equal(data.images.numpy(), images)
    assert data.labels.tolist() == [2, 0, 2]
    assert (data.class_names, data.name) == (("0", "1", "2"), "made")


def test_npz_with_parts_and_names(folder: Path) -> None:
    arrays = {
        "train_images": pixels(3, channels=1)[:, 0],
        "train_labels": np.array([0, 1, 1], dtype=np.uint8),
        "test_images": pixels(2, channels=3),
        "test_labels": np.array([3, 0]),
        "class_names": np.array(["a", "b", "c", "d"]),
    }
    np.savez_compressed(folder / "made.npz", **arrays)
    data = load_dataset(str(folder / "made.npz"))
    assert data.train.class_names == ("a", "b", "c", "d")
    assert data.test.labels.tolist() == [3, 0]
    np.testing.assert_array_equal(data.train.images.numpy(), pixels(3, channels=1).repeat(3, axis=1))
    assert load_dataset(folder / "made.npz", image_size=5).test.images.shape == (2, 3, 5, 5)


@pytest.mark.parametrize("keys", ["{part}_images {part}_labels", "x_{part} y_{part}", "{part}_image {part}_y"])
def test_npz_with_three_parts_and_labels_in_a_column(folder: Path, keys: str) -> None:
    arrays = {}
    for count, part in enumerate(("train", "val", "test"), start=2):
        image, label = keys.format(part=part).split()
        arrays[image] = pixels(count, channels=1)[:, 0]
        arrays[label] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez(folder / "med.npz", **arrays)
    with pytest.warns(RobustFairWarning, match="med: left out: the validation part"):
        data = load_dataset(folder / "med.npz")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [0, 1, 0, 1])
    np.testing.assert_array_equal(data.test.images.numpy(), pixels(4, channels=1))


@pytest.mark.parametrize("labels", [{"test_labels": np.array([-1, -1])}, {}])
def test_npz_with_a_test_part_without_labels(folder: Path, labels: dict) -> None:
    arrays = {f"{part}_{key}": value for part in ("train", "valid") for key, value in (("x", pixels(2)), ("y", [0, 1]))}
    np.savez(folder / "made.npz", **arrays, test_images=pixels(3), **labels, ids=np.arange(3))
    data = load_dataset(folder / "made.npz")
    assert (len(data.train), len(data.test)) == (2, 2)
    assert data.notes == (
        "left out: the arrays ids (neither images nor labels of a part)",
        "left out: the test part (no labels)",
        "the validation part is the test part",
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": pixels(2), "labels": np.array([[0, 1, 1], [0, 0, 0]])},
            r"labels must be whole numbers \(N,\), got int64 \(2, 3\): several labels an image \(multi-label\)",
        ),
        (
            {"images": pixels(2), "labels": np.eye(2)},
            r"got float64 \(2, 2\): one-hot rows, or .*: for the first store labels\.argmax\(1\)",
        ),
        (
            {
                "images": pixels(2),
                "labels": np.array([0, 1]),
                "test_images": pixels(2),
                "test_labels": np.array([0, 1]),
            },
            "images, labels beside test_images, test_labels: a part of its own or the whole",
        ),
        ({"val_x": pixels(2), "valid_x": pixels(2)}, "val_x and valid_x both are the images of one part: keep one"),
    ],
)
def test_npz_that_can_be_read_in_two_ways(folder: Path, arrays: dict, message: str) -> None:
    np.savez(folder / "made.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_dataset(folder / "made.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(2)}, r"no array of labels \(train_labels, train_y, train_label\), it holds images"),
        ({"labels": np.array([0])}, "no array of images"),
        ({"images": pixels(0), "labels": np.array([], dtype=np.int64)}, "the train part holds no images"),
        (
            {"images": pixels(2) / 255, "labels": np.array([0, 1])},
            r"images must be uint8 .* got float64 \(2, 3, 8, 8\); store \(255 \* x\)\.round\(\) as uint8$",
        ),
        ({"images": pixels(2).astype(np.int16), "labels": np.array([0, 1])}, r"got int16 .*; store them as uint8$"),
        (
            {"images": (pixels(2) / 255 - 0.5) / 0.25, "labels": np.array([0, 1])},
            r"values from -\d\.?\d* to \d\.?\d* look already normalised, which a model does itself: store the pixels",
        ),
        ({"images": pixels(2), "labels": np.array([0.0, 1.0])}, r"labels must be whole numbers \(N,\), got float64"),
        ({"images": pixels(2), "labels": np.array([0])}, r"labels must be int64 \(2,\)"),
        (
            {"images": pixels(2), "labels": np.array([0, -4])},
            "labels outside the range 0 to 0, the first is -4 at index 1",
        ),
        (
            {"images": pixels(2), "labels": np.array([0, 2]), "class_names": np.array(["a", "b"])},
            "labels outside the range 0 to 1, the first is 2 at index 1",
        ),
        ({"images": pixels(2), "labels": np.array([0, "a"], dtype=object)}, "cannot be read: .*allow_pickle=False"),
    ],
)
def test_bad_npz(folder: Path, arrays: dict, message: str) -> None:
    np.savez(folder / "made.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_dataset(folder / "made.npz")


def test_corrupt_npz(folder: Path) -> None:
    path = folder / "made.npz"
    np.savez_compressed(path, images=pixels(20), labels=np.zeros(20, dtype=np.int64))
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[:400], whole[:100] + bytes(100) + whole[200:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"made\.npz"):
            load_dataset(path)


# Names and paths


def test_what_does_not_exist() -> None:
    with pytest.raises(UnknownNameError, match="unknown data set 'cifer10': did you mean cifar10"):
        load_dataset("cifer10")
    for path in ("./nowhere", "no/where", "nowhere.npz", Path("cifar10")):
        with pytest.raises(DataError, match="does not exist"):
            load_dataset(path)


def test_a_file_of_another_kind(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"expected \.npz, \.parquet or a folder"):
        load_dataset(folder / "notes.txt")


def test_image_size_is_positive() -> None:
    with pytest.raises(ConfigError, match="data: image_size must be at least 1, got 0"):
        load_dataset("digits", image_size=0)
