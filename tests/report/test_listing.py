"""Lists of what can be named: complete, and every line says what the entry is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from robustfair.attacks.named import AUTOATTACK_NAMES, parse_attacks
from robustfair.data import AUGMENTATIONS, CATALOG
from robustfair.data.corruptions.names import CORRUPTIONS
from robustfair.errors import UnknownNameError
from robustfair.models import create_model
from robustfair.registry import BUNDLES, EDITS, METHODS, MODELS, OBJECTIVES, REPAIRS
from robustfair.report.listing import listing
from robustfair.runs.shipped import shipped_recipes, tables

ENTRIES: dict[str, Callable[[], list[str]]] = {
    "recipes": lambda: [*shipped_recipes(), *tables()],
    "objectives": lambda: list(OBJECTIVES),
    "methods": lambda: [*METHODS, *BUNDLES],
    "augmentations": lambda: list(AUGMENTATIONS),
    "models": lambda: [*MODELS, "wrn-D-W", "dm-wrn-D-W", "xcit-s12-pP"],
    "datasets": lambda: sorted(CATALOG),
    "attacks": lambda: ["clean", "cw-K", "fgsm", "pgd-K", *AUTOATTACK_NAMES],
    "repairs": lambda: list(REPAIRS),
    "edits": lambda: list(EDITS),
    "corruptions": lambda: ["standard", "fair-tat", "extra", "all", *CORRUPTIONS],
}


@pytest.mark.parametrize("kind", list(ENTRIES))
def test_every_entry_is_listed_with_a_sentence_of_its_own(kind: str) -> None:
    found = listing(kind)
    assert [name for name, _ in found] == ENTRIES[kind]()
    for name, text in found:
        assert len(text) > 10, name
        assert "\n" not in text, name
        assert "partial(" not in text, name


@pytest.mark.parametrize("word", ["Methods", " METHODS ", "methods"])
def test_kinds_in_any_spelling(word: str) -> None:
    assert listing(word) == listing("methods")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("method", "unknown kind of entry 'method': did you mean methods"),
        ("modles", "did you mean models"),
        (
            "zzz",
            "known: attacks, augmentations, corruptions, datasets, edits, methods, models, objectives, recipes",
        ),
        ("", "known: attacks"),
    ],
)
def test_other_words_show_the_nearest(word: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        listing(word)


def test_a_word_leaves_the_entries_that_have_it_in_their_name() -> None:
    assert [name for name, _ in listing("models", "PreAct")] == ["preact-resnet18"]
    assert [name for name, _ in listing("recipes", "cfa/text-3.3")] == ["cfa/text-3.3/at"]
    with pytest.raises(UnknownNameError, match="unknown entry of methods 'em2': did you mean"):
        listing("methods", "em2")


def test_attack_patterns_are_names() -> None:
    names = [name.replace("K", "3") for name, _ in listing("attacks")]
    assert [attack.name for attack in parse_attacks(names)] == names


@pytest.mark.parametrize("name", [name for name, _ in listing("models")])
def test_listed_models_can_be_built(name: str) -> None:
    width = 8 if "xcit" in name else 1
    create_model(name.replace("D-W", "10-1").replace("pP", "p4"), num_classes=3, in_channels=1, width=width)
