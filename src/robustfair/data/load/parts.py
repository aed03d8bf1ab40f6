"""Which part of a data set a file, folder or array is, by its name: train, test, validation, or none of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from robustfair.errors import DataError

T = TypeVar("T")

_ROLES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_NUMBERED = re.compile(r"(.*?)[-_. ]*(\d+)(?:-of-(\d+)\b.*)?")
_SHOWN = 5


def role_of(name: str) -> str | None:
    """The split that the last telling word of a path means: "data/train-00000-of-00005.parquet" is "train"."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        for role, words in _ROLES.items():
            if word in words:
                return role
    return None


def is_role(name: str) -> bool:
    """Whether a name says nothing but a split: "Train" and "val-2" do, "bullet_train" does not."""
    return bool(re.fullmatch("|".join(word for words in _ROLES.values() for word in words), _base(name)[0]))


def by_role(owner: str, items: Iterable[tuple[str, T]], parts: Sequence[str]) -> tuple[dict[str, list[T]], list[str]]:
    """Sort named pieces into "train", "test" and "validation", and say what is left out or doubtful.

    Pieces of other splits (`extra`, `unlabeled`) are left out; where no name means a split, all pieces are "train". If
    `parts` has one entry, all pieces are that part.

    Raises:
        DataError: several names mean one part and are not numbered on from 0 or 1: pieces of it, or versions of it.

    >>> by_role("mine", [("train", 1), ("extra-0", 2), ("valid/0", 3), ("valid/1", 4)], ("train", "test"))
    ({'train': [1], 'validation': [3, 4]}, ['left out: extra-0 (its name means no split)'])
    """
    items = list(items)
    if len(parts) == 1:
        return {parts[0]: [item for _, item in items]}, []
    roles = {role: [(name, item) for name, item in items if role_of(name) == role] for role in _ROLES}
    others = [name for name, _ in items if role_of(name) is None]
    if len(others) == len(items):
        return {"train": [item for _, item in items]}, []
    notes = [f"left out: {listed(others)} (its name means no split)"] if others else []
    for role, pieces in roles.items():
        notes += _require_pieces(owner, role, [name for name, _ in pieces])
    return {role: [item for _, item in pieces] for role, pieces in roles.items() if pieces}, notes


def as_parts(pieces: Mapping[str, T], unlabelled: Collection[str] = ()) -> tuple[dict[str, T], list[str]]:
    """What is trained and tested on: the validation piece is the test part where no other has labels.

    >>> as_parts({"train": 1, "test": 2, "validation": 3}, unlabelled={"test"})
    ({'train': 1, 'test': 3}, ['left out: the test part (no labels)', 'the validation part is the test part'])
    """
    notes = [f"left out: the {role} part (no labels)" for role in pieces if role in unlabelled]
    known = {role: piece for role, piece in pieces.items() if role not in unlabelled}
    if "validation" in known:
        held = known.pop("validation")
        if "test" in known:
            notes.append("left out: the validation part (there is a test part, and training holds out its own)")
        else:
            known["test"] = held
            notes.append("the validation part is the test part")
    return known, notes


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b"]), listed(list("abcdefg"))
    ('a, b', 'a, b, c, d, e and 2 more')
    """
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def text_order(names: Sequence[str]) -> str:
    """What to say of numbers that are class names and sorted as text; empty where that is their order.

    >>> text_order(["0", "1", "10", "2"]), text_order(["1", "2"])
    ('class names are sorted as text: class index 2 is 10', '')
    """
    if not all(name.isdecimal() for name in names):
        return ""
    moved = [index for index, name in enumerate(sorted(names, key=int)) if names[index] != name]
    return f"class names are sorted as text: class index {moved[0]} is {names[moved[0]]}" if moved else ""


def _require_pieces(owner: str, role: str, names: Sequence[str]) -> list[str]:
    """Refuse names that may be versions of one part; say which were taken together, and which are missing."""
    told = sorted({_telling(name) for name in names})
    pieces = [_base(name) for name in told]
    bases, totals = {base for base, _, _ in pieces}, {total for _, _, total in pieces}
    numbers = sorted(number for _, number, _ in pieces if number is not None)
    if len(bases) == len(totals) == 1 and len(set(numbers)) == len(told):
        total = totals.pop()
        if total is not None:
            missing = total - len(told)
            return [f"the {role} part is not whole: {missing} of its {total} files are missing"] if missing > 0 else []
    if len(told) < 2:
        return []
    counted = numbers in (list(range(len(told))), list(range(1, len(told) + 1)))
    if len(bases) > 1 or not counted:
        raise DataError(
            f"{owner}: {listed(told)} all bear the name of the {role} part: pieces of one part, or versions of which "
            f"one is meant. To read them as pieces, number them on from 1 ({role}-1, {role}-2); otherwise move away "
            "those that are not meant, or name one of them alone"
        )
    return [f"the {role} part is read from {listed(told)}"]


def _telling(name: str) -> str:
    """A path up to the component that tells the split: "train/0.parquet" is "train"."""
    components = name.split("/")
    last = max(index for index, component in enumerate(components) if role_of(component))
    return "/".join(components[: last + 1])


def _base(name: str) -> tuple[str, int | None, int | None]:
    """A name without its number, the number, and of how many.

    >>> _base("train.X1"), _base("train-00002-of-00005-9f3a.parquet"), _base("Val")
    (('train.x', 1, None), ('train', 2, 5), ('val', None, None))
    """
    plain = re.sub(r"\.(parquet|arrow)$", "", name.lower())
    match = _NUMBERED.fullmatch(plain)
    if match is None:
        return plain, None, None
    return match[1], int(match[2]), int(match[3]) if match[3] else None
