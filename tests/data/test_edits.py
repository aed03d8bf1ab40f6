from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustfair.data import ImageDataset, edits, load_dataset
from robustfair.data.edits import Add, ChecksImages, Edited, LongTail, PseudoLabel, Upweight, profile
from robustfair.errors import ConfigError, DataError, ModelError, RecipeError, RobustFairError, RobustFairWarning

Data = Callable[..., ImageDataset]


def nobody(images: ImageDataset) -> Tensor:
    raise AssertionError("this edit asks no model")


def answers(labels: list[int], sure: float = 0.9) -> Callable[[ImageDataset], Tensor]:
    """A model that gives image i the class labels[i], with probability `sure`."""
    return lambda images: torch.full((len(labels), 3), (1 - sure) / 2).scatter(1, torch.tensor(labels)[:, None], sure)


def test_the_profile_falls_by_the_factor() -> None:
    for largest, classes, factor in ((5000, 10, 100), (500, 100, 10), (100, 2, 4)):
        counts = profile(largest, classes, factor)
        assert counts[0] == largest
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == pytest.approx(largest / factor, abs=1)
        assert [counts[c + 1] / counts[c] for c in range(min(3, classes - 1))] == pytest.approx(
            [factor ** (-1 / (classes - 1))] * min(3, classes - 1), abs=0.03
        )
    assert profile(3, 1, 100) == [3]
    assert min(profile(10, 10, 1000)) == 1


@pytest.mark.parametrize("factor", [1, 10, 20, 50, 100, 200])
@pytest.mark.parametrize(("largest", "classes"), [(5000, 10), (500, 100), (4900, 10), (490, 100)])
def test_the_profile_is_that_of_the_published_long_tails(largest: int, classes: int, factor: int) -> None:
    """The formula of the codes of the field, up to where rounding of the power crosses a whole number."""
    theirs = [int(largest * (1 / factor) ** (c / (classes - 1.0))) for c in range(classes)]
    ours = profile(largest, classes, factor)
    exact = [largest * factor ** (-c / (classes - 1)) for c in range(classes)]
    for own, other, value in zip(ours, theirs, exact, strict=True):
        assert own == other or abs(value - round(value)) < 1e-9
    assert sum(profile(5000, 10, 100)) == 12406
    assert sum(profile(500, 100, 100)) == 10847


@pytest.mark.parametrize("classes", [2, 3, 10, 11])
def test_a_step_keeps_the_first_half_of_the_classes(classes: int) -> None:
    counts = profile(200, classes, 8, "step")
    assert counts == [200] * (classes // 2) + [25] * (classes - classes // 2)


def test_a_long_tail_keeps_images_of_their_class_and_draws_by_seed(tiny_data: Data) -> None:
    data = tiny_data((40, 32, 36))
    one, again, other = (LongTail(factor=8)(data, nobody, seed) for seed in (0, 0, 1))
    left = one.apply(data)
    assert left.class_counts().tolist() == profile(32, 3, 8)
    assert torch.equal(left.labels, data.labels[one.index])
    assert torch.equal(one.index, again.index)
    assert not torch.equal(one.index, other.index)
    assert len(set(one.index.tolist())) == len(one.index)
    whole = LongTail(factor=1)(tiny_data((9, 9, 9)), nobody, 0)
    assert whole.index.tolist() == list(range(27))
    fixed = [LongTail(factor=8, seed=5)(data, nobody, seed) for seed in (0, 1)]
    assert torch.equal(fixed[0].index, fixed[1].index)
    assert torch.equal(fixed[0].index, LongTail(factor=8)(data, nobody, 5).index)
    steps = LongTail(factor=8, profile="step")(data, nobody, 0).apply(data)
    assert steps.class_counts().tolist() == [32, 4, 4]


def test_another_number_of_images_of_one_class_does_not_move_the_draw_of_another(tiny_data: Data) -> None:
    one, two = tiny_data((20, 20, 20)), tiny_data((20, 20, 20)).subset(range(60))
    kept = LongTail(factor=4)(one, nobody, 0).index
    cut = two.subset([row for row in range(60) if two.labels[row] != 2 or row % 2])
    assert min(cut.class_counts().tolist()) < 20
    less = LongTail(factor=1)(cut, nobody, 0).apply(cut)
    assert less.class_counts().tolist() == [min(cut.class_counts().tolist())] * 3
    assert len(kept) == sum(profile(20, 3, 4))


def test_a_tail_that_is_shorter_than_asked_for_is_said(tiny_data: Data) -> None:
    with pytest.warns(RobustFairWarning, match="of 20 a factor of 100 leaves none, so that it is 20 here"):
        found = LongTail(factor=100)(tiny_data((20, 20, 20)), nobody, 0)
    assert found.labels.bincount().tolist() == [20, 2, 1]


def test_classes_without_images_cannot_be_thinned(tiny_data: Data) -> None:
    with pytest.raises(DataError, match="long-tail: tiny has no training image of class class 1 to keep"):
        LongTail(factor=2)(tiny_data((4, 0, 4)), nobody, 0)


def test_a_data_set_is_edited_in_one_call() -> None:
    train = load_dataset("digits").train
    tail = edits.edit(train, "long-tail(factor=10)")
    least = int(train.class_counts().min())
    assert tail.class_counts().tolist() == profile(least, 10, 10)
    assert (tail.class_names, tail.name, tail.augment) == (train.class_names, train.name, train.augment)
    assert torch.equal(tail.images, edits.edit(train, LongTail(factor=10)).images)
    assert not torch.equal(tail.images, edits.edit(train, LongTail(factor=10), seed=1).images)
    with pytest.raises(
        ConfigError, match=r"edit: what must be one that asks no model, got 'upweight'. Make it a stage"
    ):
        edits.edit(train, "upweight")
    with pytest.raises(RecipeError, match="names 2 edits"):
        edits.edit(train, "long-tail + long-tail")


@pytest.mark.parametrize("times", [0, 1, 20])
def test_images_that_are_wrong_come_once_and_so_often_again(tiny_data: Data, times: int) -> None:
    data = tiny_data((3, 2, 2))
    given = data.labels.tolist()
    wrong = [(label + 1) % 3 if row in (1, 4) else label for row, label in enumerate(given)]
    found = Upweight(times=times)(data, answers(wrong), 0)
    seen = Counter(found.index.tolist())
    assert [seen[row] for row in range(7)] == [1 + times if row in (1, 4) else 1 for row in range(7)]
    edited = found.apply(data)
    assert torch.equal(edited.labels, data.labels[found.index])
    assert torch.equal(edited.images, data.images[found.index])
    if times:
        fewer = Counter(Upweight(times=times, count="paper")(data, answers(wrong), 0).index.tolist())
        assert [fewer[row] for row in range(7)] == [times if row in (1, 4) else 1 for row in range(7)]


def test_copies_that_do_not_fit_in_memory_are_refused(tiny_data: Data) -> None:
    data = tiny_data((4, 3, 5))
    with pytest.raises(DataError, match=r"upweight: .* images of \d+x\d+ take .* of memory and .* are free"):
        Upweight(times=10**15)(data, answers([0] * len(data)), 0)


def test_images_are_refused_before_a_model_is_asked(
    tiny_data: Data, other: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for edit in (LongTail(), Add(data="other"), PseudoLabel(data="other"), Upweight()):
        assert isinstance(edit, ChecksImages) == (not isinstance(edit, Upweight))
    with pytest.raises(DataError, match="no training image of class class 1 to keep: train on images of every class"):
        LongTail().check(tiny_data((4, 0, 4)))
    for edit in (Add(data="other"), PseudoLabel(data="other")):
        edit.check(tiny_data())
    with pytest.raises(DataError, match="the classes of other are"):
        Add(data="other").check(dataclasses.replace(tiny_data(), class_names=("cat", "dog", "owl")))
    for wants in (Add(data="digits"), PseudoLabel(data="digits")):
        monkeypatch.undo()
        with pytest.raises(DataError, match=r"images of .*: they cannot be trained on together"):
            wants.check(dataclasses.replace(tiny_data(), images=tiny_data().images.repeat(1, 3, 1, 1)))


def test_nothing_is_repeated_where_nothing_is_wrong(tiny_data: Data) -> None:
    data = tiny_data((3, 2, 2))
    assert Upweight(times=20)(data, answers(data.labels.tolist()), 0).index.tolist() == list(range(7))


@pytest.fixture
def other(tiny_data: Data, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    more = tiny_data((4, 3, 2), seed=5)
    monkeypatch.setattr(edits, "source_images", lambda name, images: more)
    return more


def test_added_images_follow_with_their_labels(tiny_data: Data, other: ImageDataset) -> None:
    data = tiny_data((2, 2, 2))
    whole = Add(data="more")(data, nobody, 0).apply(data)
    assert torch.equal(whole.images, torch.cat([data.images, other.images]))
    assert torch.equal(whole.labels, torch.cat([data.labels, other.labels]))
    some = Add(data="more", limit_per_class=2)(data, nobody, 0).apply(data)
    assert some.class_counts().tolist() == [4, 4, 4]


def test_other_classes_are_not_added(tiny_data: Data, other: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = dataclasses.replace(other, class_names=("x", "y", "z"))
    monkeypatch.setattr(edits, "source_images", lambda name, images: renamed)
    with pytest.raises(DataError, match="its labels would not mean the same; add images without them by pseudo-label"):
        Add(data="more")(tiny_data((2, 2, 2)), nobody, 0)
    numbered = dataclasses.replace(other, class_names=("0", "1", "2"))
    monkeypatch.setattr(edits, "source_images", lambda name, images: numbered)
    assert len(Add(data="more")(tiny_data((2, 2, 2)), nobody, 0).index) == 15


def test_images_are_labelled_by_the_model(tiny_data: Data, other: ImageDataset) -> None:
    data, labels = tiny_data((2, 2, 2)), [2, 2, 1, 0, 0, 0, 1, 1, 2]
    edited = PseudoLabel(data="more")(data, answers(labels), 0).apply(data)
    assert edited.labels.tolist() == [*data.labels.tolist(), *labels]
    with pytest.raises(RobustFairError, match="pseudo-label: confidence"):
        PseudoLabel(data="more", confidence=0.95)(data, answers(labels), 0)


def test_a_teacher_of_other_classes_is_refused(tiny_data: Data, other: ImageDataset) -> None:
    data = tiny_data((2, 2, 2, 2))
    for edit in (PseudoLabel(data="more"), Upweight()):
        with pytest.raises(ModelError, match=f"{edit.name}: the model before has 3 classes and tiny 4: let a stage"):
            edit(data, answers([0] * 9), 0)


def test_many_rows_are_taken_in_pieces(tiny_data: Data, other: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edits, "_ROWS_AT_A_TIME", 4)
    data = tiny_data((5, 6, 7))
    index = torch.randint(27, (50,), generator=torch.Generator().manual_seed(0))
    found = Edited(index, torch.zeros(50, dtype=torch.int64), 27, ("more",)).apply(data)
    assert torch.equal(found.images, torch.cat([data.images, other.images])[index])


def test_one_edit_after_another_is_one_edit(tiny_data: Data, other: ImageDataset) -> None:
    """As rows and labels, and as pixels."""
    data = tiny_data((12, 10, 11))
    chain = [LongTail(factor=3), Add(data="more", limit_per_class=2), Upweight(times=2), Add(data="more")]
    images, whole = data, None
    for number, edit in enumerate(chain):
        wrong = ((images.labels + (torch.arange(len(images)) % 4 == 0)) % 3).tolist()
        found = edit(images, answers(wrong), number)
        images, whole = found.apply(images), found if whole is None else found.after(whole)
    assert whole is not None
    assert whole.added == ("more", "more")
    once = whole.apply(data)
    assert torch.equal(once.images, images.images)
    assert torch.equal(once.labels, images.labels)
    assert once.class_names == data.class_names


def test_an_edit_is_read_as_it_was_saved_and_refused_on_other_images(tiny_data: Data, tmp_path: Path) -> None:
    data = tiny_data((12, 10, 11))
    found = LongTail(factor=3)(data, nobody, 0)
    found.save(tmp_path / "images.safetensors")
    read = Edited.read(tmp_path / "images.safetensors")
    assert torch.equal(read.index, found.index)
    assert torch.equal(read.labels, found.labels)
    assert (read.rows, read.added) == (33, ())
    with pytest.raises(DataError, match="its images changed since an edit of 33, there are 32 now"):
        read.apply(tiny_data((12, 10, 10)))
    (tmp_path / "cut").write_bytes((tmp_path / "images.safetensors").read_bytes()[:60])
    for name in ("cut", "missing"):
        with pytest.raises(DataError, match="holds no edit of training images"):
            Edited.read(tmp_path / name)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LongTail(factor=0.5),
        lambda: LongTail(factor=float("inf")),
        lambda: LongTail(profile="linear"),  # type: ignore[arg-type]
        lambda: Upweight(times=-1),
        lambda: Upweight(times=0, count="paper"),
        lambda: PseudoLabel(data="x", confidence=2),
    ],
)
def test_values_out_of_range_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(RobustFairError):
        wrong()
