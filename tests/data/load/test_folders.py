"""Image folders as they lie on disks: what is read, what is said to be left out, and what is refused as two-fold."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference.layouts import picture, pixels, write_images
from robustfair.data.datasets import Splits, load_dataset
from robustfair.errors import DataError, RobustFairWarning


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    return path


def place(folder: Path, *files: str) -> None:
    """A random picture at every path with the suffix of one, text at the others; paths that end in / are folders."""
    for position, name in enumerate(files):
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            picture(pixels(1, seed=position)[0]).save(path, format="PNG")
        elif not name.endswith("/"):
            path.write_text("text")


def classes(names: str, under: str = "", count: int = 2) -> list[str]:
    """Paths of `count` pictures of every class in `names`, which are separated by spaces."""
    return [f"{under}{name}/{number}.png" for name in names.split() for number in range(count)]


def read(folder: Path) -> Splits:
    """The data set; its notes must be just what it warns of."""
    with pytest.warns(RobustFairWarning) as caught:
        data = load_dataset(folder)
    assert [str(warning.message) for warning in caught] == [f"mine: {note}" for note in data.notes]
    return data


# What is left out


@pytest.mark.parametrize(
    ("stray", "note"),
    [
        (["__MACOSX/car/._0.png"], "left out: __MACOSX (hidden, or of an operating system)"),
        (["logs/run.txt"], "left out: logs/ (no image in it)"),
        (["empty/", "void/deep/"], "left out: empty/, void/ (no image in it)"),
        ([".git/0.png", "dog/.DS_Store"], "left out: .DS_Store, .git (hidden, or of an operating system)"),
        (["dog/Thumbs.db", "desktop.ini"], "left out: Thumbs.db, desktop.ini (hidden, or of an operating system)"),
        (["loose.png"], "left out: 1 in mine (images of no class and part that is read)"),
        (["a.md", "dog/b.csv", "dog/c.csv", "LICENSE"], "left out: 2 .csv, 1 .md, 1 without suffix (no images)"),
    ],
)
def test_what_is_no_class_is_left_out_and_said(folder: Path, stray: list[str], note: str) -> None:
    place(folder, *classes("car dog"), *stray)
    data = read(folder)
    assert data.only.class_names == ("car", "dog")
    assert data.only.class_counts().tolist() == [2, 2]
    assert note in data.notes


def test_a_folder_without_more_says_nothing_and_reports_its_counts(
    folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    place(folder, *classes("car dog", "train/"), *classes("car dog", "test/", count=1))
    data = load_dataset(folder)
    assert not recwarn.list
    expected = ("mine, train part: 4 images of 2 classes (2 each)", "mine, test part: 2 images of 2 classes (1 each)")
    assert data.report == data.counts == expected


def test_notes_are_the_same_from_the_cache(folder: Path) -> None:
    place(folder, *classes("car dog"), "notes.txt")
    Image.new("RGBA", (8, 8)).save(folder / "car" / "x.png")
    first = read(folder)
    assert first.notes == (
        "left out: 1 .txt (no images)",
        "converted: 1 image (RGBA to RGB: transparency is dropped)",
    )
    assert read(folder).notes == first.notes


def test_upper_case_suffixes_are_images(folder: Path) -> None:
    place(folder, "a/1.PNG", "b/2.Png")
    assert load_dataset(folder).only.class_counts().tolist() == [1, 1]


def test_a_class_folder_with_files_that_cannot_be_read_is_refused(folder: Path) -> None:
    place(folder, *classes("car dog"), "eel/1.heic", "eel/2.heic")
    with pytest.raises(DataError, match=r"mine/eel holds no image that can be read \(2 \.heic\): .*Convert the files"):
        load_dataset(folder)


def test_an_empty_file_is_named_with_what_to_do(folder: Path) -> None:
    place(folder, *classes("car dog"))
    (folder / "dog" / "x.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"dog/x\.png cannot be decoded: it is empty \(0 bytes\); replace it, or remove"
    ):
        load_dataset(folder)


# Parts


@pytest.mark.parametrize(
    ("train", "test"), [("TRAIN", "Testing"), ("training", "eval"), ("my_train", "my_val"), ("train-1", "dev")]
)
def test_spellings_of_parts(folder: Path, train: str, test: str) -> None:
    place(folder, *classes("a b", f"{train}/"), *classes("a b", f"{test}/", count=1))
    data = load_dataset(folder)
    assert (len(data.train), len(data.test)) == (4, 2)


def test_numbered_folders_are_pieces_of_one_part(folder: Path) -> None:
    place(folder, *classes("a b", "train.X1/"), *classes("b c", "train.X2/"), *classes("a b c", "val.X/", count=1))
    data = read(folder)
    assert data.train.class_counts().tolist() == [2, 4, 2]
    assert data.test.class_counts().tolist() == [1, 1, 1]
    assert data.notes == ("the train part is read from train.X1, train.X2", "the validation part is the test part")


@pytest.mark.parametrize(
    "folders",
    [("train", "train_old"), ("train2014", "train2017"), ("train-1", "train-2", "train-4"), ("train", "training")],
)
def test_folders_that_may_be_versions_of_one_part_are_refused(folder: Path, folders: tuple[str, ...]) -> None:
    for name in folders:
        place(folder, *classes("a b", f"{name}/"))
    with pytest.raises(DataError, match=r"all bear the name of the train part: .*number them on from 1 .* or name one"):
        load_dataset(folder)
    assert len(load_dataset(folder / folders[0]).only) == 4


def test_a_validation_part_beside_a_test_part_is_left_out(folder: Path) -> None:
    place(folder, *classes("a b", "train/"), *classes("a b", "val/"), *classes("a b", "test/", count=1))
    data = read(folder)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.notes == (
        "left out: the validation part (there is a test part, and training holds out its own)",
        "left out: 4 in val (images of no class and part that is read)",
    )


def test_folders_beside_the_parts_are_left_out(folder: Path) -> None:
    place(folder, *classes("a b", "train/"), *classes("a b", "test/"), *classes("a", "unlabeled/"))
    assert "left out: unlabeled (beside the parts, and no part by name)" in read(folder).notes


@pytest.mark.parametrize("images", ["test/0.png", "test/images/0.png", "test/unknown/0.png"])
def test_a_test_part_without_labels_is_left_out(folder: Path, images: str) -> None:
    place(folder, *classes("a b", "train/"), *classes("a b", "val/", count=1), images)
    data = read(folder)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert any(note.startswith("left out: ") and "no labels" in note for note in data.notes)
    assert "the validation part is the test part" in data.notes


def test_a_class_with_the_name_of_a_part_beside_others_is_refused_as_two_fold(folder: Path) -> None:
    place(folder, "bullet_train/side/0.png", *classes("bus car"))
    with pytest.raises(DataError, match=r"bullet_train can be the name of a part, .*: a part, .* or classes\. For the"):
        load_dataset(folder)
    (folder / "class_names.txt").write_text("bus\ncar\nbullet_train\n")
    assert load_dataset(folder).only.class_counts().tolist() == [2, 2, 1]


def test_parts_without_class_folders_are_refused_as_two_fold(folder: Path) -> None:
    place(folder, "train/0.png", "test/1.png")
    with pytest.raises(DataError, match="test, train hold images and no class folders: parts without labels, or"):
        load_dataset(folder)
    (folder / "class_names.txt").write_text("train\ntest\n")
    assert load_dataset(folder).only.labels.tolist() == [0, 1]


def test_classes_of_one_part_only_are_kept_and_counted(folder: Path) -> None:
    place(folder, *classes("a b", "train/"), *classes("b c", "test/"))
    assert load_dataset(folder).counts == (
        "mine, train part: 4 images of 3 classes (a: 2, b: 2, c: 0), none of c",
        "mine, test part: 4 images of 3 classes (a: 0, b: 2, c: 2), none of a",
    )


def test_class_names_that_differ_in_upper_case_alone_are_said(folder: Path) -> None:
    place(folder, *classes("Cat dog", "train/"), *classes("cat dog", "test/"))
    note = "names that differ in upper case or spaces alone are classes of their own: Cat, cat"
    assert read(folder).notes == (note,)


# Folders around and below


@pytest.mark.parametrize("around", ["data/", "archive/data/"])
@pytest.mark.parametrize("part", ["", "train/"])
def test_one_folder_around_all_is_entered(folder: Path, around: str, part: str) -> None:
    place(folder, *classes("a b", around + part), "__MACOSX/x", "readme.txt")
    data = read(folder)
    assert data.train.class_names == ("a", "b")
    assert "read from data, the one folder in" in data.notes[0]


def test_one_folder_around_the_classes_of_a_part_is_entered(folder: Path) -> None:
    place(folder, *classes("a b", "train/train/"), *classes("a b", "test/test/", count=1))
    data = read(folder)
    assert (data.train.class_names, len(data.train), len(data.test)) == (("a", "b"), 4, 2)


def test_folders_below_class_folders_count_for_them_and_are_said(folder: Path) -> None:
    place(folder, *classes("cat dog", "animals/"), *classes("bus", "vehicles/"))
    data = read(folder)
    assert data.only.class_counts().tolist() == [4, 2]
    assert data.notes == ("images in sub-folders count for the class folder above: animals (cat, dog)",)


def test_the_same_folders_below_each_can_be_the_classes(folder: Path) -> None:
    place(folder, *classes("cat dog", "art/"), *classes("cat dog eel", "photo/", count=1))
    with pytest.raises(DataError, match=r"the classes are art, photo, or they are cat, dog\. List .* in .*class_names"):
        load_dataset(folder)
    (folder / "class_names.txt").write_text("\ufeffdog\ncat\nnewt\n", encoding="utf-8")
    data = read(folder)
    assert data.only.class_names == ("dog", "cat", "newt")
    assert data.only.class_counts().tolist() == [3, 3, 0]
    assert data.notes == (
        "the classes are those in class_names.txt, in its order",
        "left out: 1 in photo (images of no class and part that is read)",
    )
    (folder / "class_names.txt").write_text("art\nphoto\n")
    assert load_dataset(folder).only.class_counts().tolist() == [4, 3]


@pytest.mark.parametrize(
    ("text", "problem"), [("", "names no folder"), ("ant\n", "names no folder of"), ("a\nb\na\n", "names a twice")]
)
def test_class_names_that_name_nothing(folder: Path, text: str, problem: str) -> None:
    place(folder, *classes("a b"))
    (folder / "class_names.txt").write_text(text)
    with pytest.raises(DataError, match=rf"class_names\.txt {problem}.*: write the name of a class folder a line"):
        load_dataset(folder)


def test_parts_below_the_classes_are_refused(folder: Path) -> None:
    place(folder, *(f"{label}/{part}/0.png" for label in ("cat", "dog") for part in ("train", "test")))
    with pytest.raises(
        DataError, match="the parts test, train lie in the class folders cat, dog: only <split>/<class>"
    ):
        load_dataset(folder)


def test_numbers_as_class_names_are_sorted_as_text_and_it_is_said(folder: Path) -> None:
    place(folder, *classes(" ".join(map(str, range(11))), count=1))
    data = read(folder)
    assert data.only.class_names[:4] == ("0", "1", "10", "2")
    (note,) = data.notes
    assert note.startswith("class names are sorted as text: class index 2 is 10; another order can be given in ")
    (folder / "class_names.txt").write_text("\n".join(map(str, range(11))))
    assert load_dataset(folder).only.class_names == tuple(map(str, range(11)))


# Links


@pytest.mark.parametrize("target", ["..", "../..", ".", "../a"])
def test_a_link_that_leads_up_is_left_out(folder: Path, target: str) -> None:
    place(folder, *classes("a b"))
    os.symlink(target, folder / "a" / "up")
    data = read(folder)
    assert data.only.class_counts().tolist() == [2, 2]
    assert data.notes == ("left out: a/up (a link to a folder above it)",)


def test_linked_class_folders_and_files_are_read(folder: Path, tmp_path: Path) -> None:
    place(folder, *classes("a b"))
    place(tmp_path / "store", "0.png", "1.png")
    os.symlink(tmp_path / "store", folder / "c")
    os.symlink(tmp_path / "store" / "0.png", folder / "a" / "more.png")
    assert load_dataset(folder).only.class_counts().tolist() == [3, 2, 2]


@pytest.mark.parametrize(("link", "target"), [("c", "a"), ("a/more", "../b")])
def test_a_folder_that_is_reached_twice_is_refused(folder: Path, link: str, target: str) -> None:
    place(folder, *classes("a b"))
    os.symlink(target, folder / link)
    with pytest.raises(DataError, match="are one folder by a link: its images would count twice"):
        load_dataset(folder)


def test_a_part_that_is_a_link_to_the_other_is_said(folder: Path) -> None:
    place(folder, *classes("a b", "train/"))
    os.symlink("train", folder / "test")
    assert read(folder).notes == ("train and test share a folder by a link: some images are in both",)


@pytest.mark.parametrize("link", ["c", "a/x.png"])
def test_a_link_that_leads_nowhere_is_refused(folder: Path, link: str) -> None:
    place(folder, *classes("a b"))
    os.symlink("gone", folder / link)
    with pytest.raises(
        DataError, match=rf"mine/{link} is a link that leads nowhere \(gone\): mend the link, or remove"
    ):
        load_dataset(folder)


# Pixels


def png16(image: np.ndarray) -> bytes:
    """(8, 8, 3) of 16 bits as the bytes of a PNG file, which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_every_conversion_is_counted(folder: Path) -> None:
    colour = Image.new("RGB", (8, 8), (10, 20, 30))
    (folder / "a").mkdir()
    colour.save(folder / "a" / "00.png")
    colour.convert("RGBA").save(folder / "a" / "01.png")
    colour.convert("RGBA").save(folder / "a" / "02.png")
    colour.convert("P").save(folder / "a" / "03.png")
    colour.convert("CMYK").save(folder / "a" / "04.jpg")
    colour.convert("L").save(folder / "a" / "05.png")
    colour.convert("1").save(folder / "a" / "06.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(folder / "a" / "07.gif", save_all=True, append_images=frames[1:])
    (folder / "a" / "08.png").write_bytes(png16(np.full((8, 8, 3), 0x0A0B)))
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "a" / "09.jpg", exif=exif)
    assert read(folder).notes == (
        "converted: 1 image (1-bit grey to RGB)",
        "converted: 1 image (16 bits a channel to 8)",
        "converted: 1 image (CMYK to RGB)",
        "converted: 2 images (RGBA to RGB: transparency is dropped)",
        "converted: 1 image (grey, among colour: repeated to RGB)",
        "converted: 2 images (palette to RGB)",
        "converted: 1 image (several frames: the first is kept)",
        "converted: 1 image (turned as its EXIF orientation says)",
    )


def test_images_of_one_grey_channel_are_not_converted(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_images(folder, {"a": pixels(2, channels=1), "b": pixels(1, channels=1)})
    assert load_dataset(folder).only.images.shape[1] == 1
    assert not recwarn.list


# Folders that hold something else


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["0.png", "1.png", "labels.csv"], r"found 1 \.csv, 2 \.png in no class folder"),
        (["train_32x32.mat", "test_32x32.mat"], r"found 2 \.mat\. Bring"),
        (["data.npz"], r"found 1 \.npz; name the \.npz itself"),
        (["cat/"], "found no file"),
    ],
)
def test_a_folder_without_images_says_what_it_holds_and_what_is_read(
    folder: Path, files: list[str], found: str
) -> None:
    place(folder, *files)
    with pytest.raises(DataError, match=rf"mine holds no images that can be read: expected <class>/<image>.*{found}"):
        load_dataset(folder)


def test_an_archive_is_to_be_unpacked(folder: Path) -> None:
    (folder / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="unpack it and name the folder"):
        load_dataset(folder / "images.zip")
