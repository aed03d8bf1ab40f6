"""Rates by group against plain loops, and files of groups, good and bad."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.audits import made_audit, random_audit
from robustfair import metrics
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, DataError, UnknownNameError
from robustfair.evaluate.groups import Groups, read_groups, regroup
from robustfair.evaluate.result import Audit

NAMES = ("cat", "dog", "car")


def pets() -> Audit:
    """Two cats, two dogs, two cars; under attack a cat is taken for a dog, a dog for a car, a car for a cat."""
    return made_audit(
        [0, 0, 1, 1, 2, 2],
        {"clean": [0, 1, 1, 1, 2, 2], "pgd-20": [0, 1, 1, 2, 2, 0], "cw-20": [1, 1, 1, 1, 2, 2]},
        NAMES,
        groups=(0, 0, 1),
    )


@pytest.fixture
def written(tmp_path: Path):
    """A function that writes lines into a file."""

    def write(*lines: str, name: str = "groups.csv") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


# Rates


def test_fine_labels_count_within_a_super_class() -> None:
    found = regroup(pets(), read_groups("superclass", pets()))
    assert found.class_names == ("group 0", "group 1")
    assert found.attacks == ("clean", "pgd-20", "cw-20")
    assert found.count().tolist() == [4, 2]
    assert found.correct("clean").tolist() == [3, 2]
    assert found.correct("pgd-20").tolist() == [2, 1]
    assert found.correct("robust").tolist() == [1, 1]
    assert found.rate("pgd-20").tolist() == [0.5, 0.5]
    assert found.average("pgd-20") == 0.5
    assert found.worst("robust")[:3] == (0, "group 0", 0.25)
    assert not found.is_upper_bound("robust")


def test_any_class_of_the_group_counts_where_that_is_asked_for() -> None:
    found = regroup(pets(), read_groups("superclass", pets()), within="group")
    assert found.correct("clean").tolist() == [4, 2]
    assert found.correct("pgd-20").tolist() == [3, 1]
    assert found.correct("cw-20").tolist() == [4, 2]
    assert found.correct("robust").tolist() == [3, 1]
    assert [found.is_upper_bound(name) for name in ("clean", "pgd-20", "robust")] == [False, True, True]


@pytest.mark.parametrize("within", ["class", "group"])
def test_rates_match_a_loop_over_images(within: str) -> None:
    audit = replace(random_audit(4, classes=6, images=90), groups=(1, 0, 2, 1, 0, 2))
    found = regroup(audit, read_groups("superclass", audit), within=within)
    columns = {name: audit.prediction(name).tolist() for name in audit.attacks}
    for attack in (*audit.attacks, "robust"):
        hits, count = [0, 0, 0], [0, 0, 0]
        for row, label in enumerate(audit.labels.tolist()):
            group = audit.groups[label]
            used = columns if attack == "robust" else {attack: columns[attack]}
            taken = [column[row] for column in used.values()]
            count[group] += 1
            hits[group] += all(p == label or (within == "group" and audit.groups[p] == group) for p in taken)
        assert (found.correct(attack).tolist(), found.count().tolist()) == (hits, count)
        lower, upper = found.interval(attack, level=0.9)
        for g in range(3):
            expected = tuple(map(float, metrics.wilson(hits[g], count[g], 0.9)))
            assert (float(lower[g]), float(upper[g])) == pytest.approx(expected)
        interval = metrics.bootstrap_statistic(torch.tensor(hits), torch.tensor(count), "worst")
        assert found.worst_interval(attack) == (interval.lower, interval.upper)
        assert found.average_interval(attack) == pytest.approx(tuple(map(float, metrics.wilson(sum(hits), sum(count)))))


def test_a_group_a_class_is_the_audit_itself() -> None:
    audit = random_audit(5)
    found = regroup(audit, Groups(names=audit.class_names, by="class", member=torch.arange(4), source="each"))
    for attack in (*audit.attacks, "robust"):
        assert torch.equal(found.correct(attack), audit.correct(attack))
        assert found.worst(attack) == audit.worst(attack)
        assert found.worst_interval(attack) == audit.worst_interval(attack)
    assert math.isnan(found.rate("clean")[3])


def test_attacks_are_named_as_in_the_audit() -> None:
    found = regroup(pets(), read_groups("superclass", pets()))
    assert torch.equal(found.hits("PGD_20"), found.hits("pgd-20"))
    with pytest.raises(UnknownNameError, match="pgd-20"):
        found.hits("pgd-2")


def test_json_holds_counts_and_intervals() -> None:
    found = regroup(pets(), read_groups("superclass", pets()), within="group")
    about = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (about["schema"], about["groups"]) == ("robustfair.groups/1", ["group 0", "group 1"])
    assert (about["within"], about["source"], about["count"]) == ("group", "superclass", [4, 2])
    entry = about["attacks"]["pgd-20"]
    assert entry["correct"] == [3, 1]
    assert (entry["worst"], entry["worst_group"], entry["upper_bound"]) == (0.5, "group 1", True)
    assert entry["worst_interval"] == list(found.worst_interval("pgd-20"))


def test_groups_know_which_attacks_were_cut() -> None:
    cut = replace(
        pets(),
        settings={**pets().settings, "pgd-20": {"ran": {"pgd-20": 0.25}}},
        provenance={"not_run": ["square"]},
    )
    found = regroup(cut, read_groups("superclass", cut))
    for attack in (*cut.attacks, "robust"):
        assert found.unfinished(attack) == cut.unfinished(attack)
    assert found.unfinished("PGD_20") == {"pgd-20": 0.25}
    assert found.unfinished() == {"square": 0.0, "pgd-20": 0.25}
    bounds = [found.is_upper_bound(name) for name in ("clean", "pgd-20", "cw-20", "robust")]
    assert bounds == [False, True, False, True]
    entries = json.loads(json.dumps(found.to_dict(), allow_nan=False))["attacks"]
    assert (entries["pgd-20"]["unfinished"], entries["cw-20"]["unfinished"]) == ({"pgd-20": 0.25}, {})
    assert (entries["pgd-20"]["upper_bound"], entries["cw-20"]["upper_bound"]) == (True, False)


# Where groups come from


def images(groups: tuple[int, ...] | None = (0, 0, 1)) -> ImageDataset:
    return ImageDataset(
        images=torch.zeros(6, 1, 2, 2, dtype=torch.uint8),
        labels=torch.tensor([0, 0, 1, 1, 2, 2]),
        class_names=NAMES,
        name="pets",
        groups=groups,
        group_names=("animals", "things") if groups else (),
    )


def test_super_classes_bear_the_names_of_the_data_set() -> None:
    for spelling in ("superclass", "Super-Class", "super_class"):
        found = read_groups(spelling, images())
        assert (found.names, found.member.tolist()) == (("animals", "things"), [0, 0, 1])
    assert regroup(pets(), found).class_names == ("animals", "things")
    for without in (images(None), replace(pets(), groups=None)):
        with pytest.raises(DataError, match=r"(pets|toy) has no super-classes: group by a CSV file"):
            read_groups("superclass", without)


def test_a_file_of_classes_names_or_numbers_them(written) -> None:
    path = written(
        "class,group", "2,things", "", ' dog , "pets, four-legged"'.replace(' "', '"'), 'cat,"pets, four-legged"'
    )
    found = read_groups(path, pets())
    assert (found.names, found.by, found.source) == (("things", "pets, four-legged"), "class", str(path))
    assert found.member.tolist() == [1, 1, 0]
    assert regroup(pets(), found).correct("clean").tolist() == [2, 3]
    assert read_groups(str(path), images()).member.tolist() == [1, 1, 0]


def test_a_name_goes_before_the_number_of_another_class(written) -> None:
    audit = made_audit([0, 1], {"clean": [0, 1]}, ("1", "0"))
    assert read_groups(written("class,group", "1,a", "0,b"), audit).member.tolist() == [0, 1]


def test_a_file_of_images_groups_each_on_its_own(written) -> None:
    path = written("Index,Group", "0,day", "1,night", "2,day", "3,night", "5,day", "4,night")
    found = regroup(pets(), read_groups(path, pets()))
    assert found.class_names == ("day", "night")
    assert found.count().tolist() == [3, 3]
    assert found.correct("clean").tolist() == [3, 2]
    assert found.correct("pgd-20").tolist() == [2, 1]
    assert read_groups(path, images()).member.tolist() == [0, 1, 0, 1, 1, 0]
    moved = replace(pets(), index=torch.tensor([5, 4, 3, 2, 1, 0]))
    assert read_groups(path, moved).member.tolist() == [0, 1, 1, 0, 1, 0]
    with pytest.raises(ConfigError, match="class for groups of images"):
        regroup(pets(), read_groups(path, pets()), within="group")


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_bytes("\ufeffclass,group\r\ncat,a\r\ndog,a\r\ncar,b\r\n".encode())
    assert read_groups(path, pets()).member.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "line 1: the header must be class,group or index,group, got ''"),
        (("cat,a",), "line 1: the header must be class,group or index,group, got 'cat,a'"),
        (("class;group", "cat;a"), "line 1: the header must be class,group or index,group, got 'class;group'"),
        (("class,group", "cat,a", "dgo,a"), "line 3: unknown class 'dgo': did you mean dog?"),
        (("class,group", "cat,a", "3,a"), "line 3: unknown class '3': known: car, cat, dog"),
        (("class,group", "", "cat,a", "0,b"), "line 4: class 0 has a group on line 3 already: keep one"),
        (("class,group", "cat,a", "dog,"), "line 3: expected class,group and neither of them empty, got 'dog,'"),
        (("class,group", ",a"), "line 2: expected class,group and neither of them empty, got ',a'"),
        (("class,group", "cat,a,b"), "line 2: expected class,group and neither of them empty, got 'cat,a,b'"),
        (("class,group", "cat,a", "car,b"), "line 3: the file ends without class dog: give each a group"),
        (("class,group",), "line 1: the file ends without class cat and 2 more: give each a group"),
        (("index,group", "6,a"), "line 2: index '6' is none of the 6 images, 0 to 5"),
        (("index,group", "-1,a"), "line 2: index '-1' is none of the 6 images, 0 to 5"),
        (("index,group", "cat,a"), "line 2: index 'cat' is none of the 6 images, 0 to 5"),
        (("index,group", "1,a", "1,a"), "line 3: index 1 has a group on line 2 already: keep one"),
        (("index,group", "1,a"), "line 2: the file ends without index 0 and 4 more: give each a group"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_line(written, lines: tuple[str, ...], message: str) -> None:
    path = written(*lines) if lines else written("")
    if not lines:
        path.write_text("")
    with pytest.raises(DataError) as caught:
        read_groups(path, pets())
    assert str(caught.value) == f"{path}, {message}"


def test_what_is_no_file_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv does not exist: group by superclass, shot, difficulty, or"):
        read_groups(tmp_path / "absent.csv", pets())
    with pytest.raises(DataError, match=r" is a folder: group by superclass, shot, difficulty, or by a CSV file"):
        read_groups(tmp_path, pets())
    with pytest.raises(DataError, match=r"^an empty grouping names nothing: group by superclass, shot, difficulty, or"):
        read_groups("", pets())
    for content in (b"class,group\n\xff\xfe,a\n", b'class,group\n"cat,a\n'):
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.csv is no CSV file in UTF-8"):
            read_groups(tmp_path / "bad.csv", pets())


def test_groups_of_other_data_and_other_words_are_refused(written) -> None:
    groups = read_groups("superclass", pets())
    with pytest.raises(DataError, match="superclass groups 3 classes and the audit of net has 4"):
        regroup(random_audit(1), groups)
    path = written("index,group", *(f"{i},a" for i in range(6)))
    with pytest.raises(DataError, match=r"groups\.csv groups 6 images and the audit of net has 60"):
        regroup(random_audit(1), read_groups(path, pets()))
    with pytest.raises(ConfigError, match="class or group, got 'super'"):
        regroup(pets(), groups, within="super")


def test_a_sample_is_grouped_by_its_places_in_the_data_and_only_with_equal_shares(written) -> None:
    data = ImageDataset(
        images=torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1),
        labels=torch.arange(40) % 2,
        class_names=("cat", "dog"),
        name="pets",
        groups=(0, 0),
        group_names=("animals",),
    )
    sample = data.sample(10, stratified=True)
    assert sample.drawn is not None
    path = written("index,group", *(f"{place},{'low' if place < 20 else 'high'}" for place in sample.drawn.places))
    found = read_groups(path, sample)
    named = [found.names[member] for member in found.member]
    assert named == ["low" if place < 20 else "high" for place in sample.drawn.places]
    uneven = data.drawn_rows(torch.tensor([0, 1, 3]), "by hand")
    with pytest.raises(DataError, match="pets: the sample holds another share of some classes than of others"):
        read_groups("superclass", uneven)
    assert read_groups("superclass", data.drawn_rows(torch.tensor([0, 1, 3]), "by hand", by_class=False)).names
