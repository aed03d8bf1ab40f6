"""What can be named: one line per entry of every kind."""

from __future__ import annotations

from collections.abc import Callable

from robustfair.attacks.named import list_attacks
from robustfair.data import AUGMENTATIONS, CATALOG
from robustfair.data.corruptions.names import CORRUPTIONS, SETS
from robustfair.errors import UnknownNameError
from robustfair.registry import BUNDLES, EDITS, METHODS, MODELS, OBJECTIVES, REPAIRS, Registry, canonical
from robustfair.report.explain import summary
from robustfair.report.recipes import recipe_entries


def listing(kind: str, word: str = "") -> list[tuple[str, str]]:
    """(name, what it is) of every entry.

    Args:
        kind: recipes, objectives, methods, augmentations, models, datasets, attacks, repairs, edits or corruptions.
        word: only entries with it in their name; of recipes it opens tables, see `report.recipes`.

    Raises:
        UnknownNameError: another kind, or no entry has the word.
    """
    kinds: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "recipes": lambda: recipe_entries(word),
        "objectives": lambda: _registered(OBJECTIVES),
        "methods": lambda: [*_registered(METHODS), *_registered(BUNDLES)],
        "augmentations": _augmentations,
        "models": _models,
        "datasets": lambda: [(name, entry.summary) for name, entry in sorted(CATALOG.items())],
        "attacks": list_attacks,
        "repairs": lambda: _registered(REPAIRS),
        "edits": lambda: _registered(EDITS),
        "corruptions": _corruptions,
    }
    if canonical(kind) not in kinds:
        raise UnknownNameError("kind of entry", kind, kinds)
    found = kinds[canonical(kind)]()
    if canonical(kind) == "recipes" or not word:
        return found
    fits = [(name, text) for name, text in found if canonical(word) in canonical(name)]
    if not fits:
        raise UnknownNameError(f"entry of {canonical(kind)}", word, [name for name, _ in found])
    return fits


def _registered(registry: Registry) -> list[tuple[str, str]]:
    return [(name, summary(registry.get(name))) for name in registry]


def _models() -> list[tuple[str, str]]:
    return [
        *_registered(MODELS),
        ("wrn-D-W", "WideResNet of depth D = 6 n + 4 and width W"),
        ("dm-wrn-D-W", "DeepMind's WideResNet with SiLU, of depth D = 6 n + 4 and width W"),
        ("xcit-s12-pP", "XCiT-S12 with a patch embedding of stride P = 1, 2, 4, 8 or 16; xcit-s12 is xcit-s12-p2"),
    ]


def _corruptions() -> list[tuple[str, str]]:
    """The sets, then each corruption with the sets that hold it."""
    sets = {canonical(name): members for name, members in SETS.items()}
    about = {
        "standard": "of the benchmark",
        "fair-tat": "of FAIR-TAT's tables, all but glass_blur",
        "extra": "that the benchmark has beside the standard ones",
        "all": "there are",
    }
    return [(name, f"the {len(members)} {about[name]}") for name, members in sets.items()] + [
        (name, f"of the sets {', '.join(each for each, members in sets.items() if name in members)}")
        for name in CORRUPTIONS
    ]


def _augmentations() -> list[tuple[str, str]]:
    """Each with the settings in which it differs from its class's defaults."""
    found = []
    for name, augmentation in AUGMENTATIONS.items():
        defaults = vars(type(augmentation)())
        changed = [f"{key}={value}" for key, value in vars(augmentation).items() if value != defaults[key]]
        settings = f" ({', '.join(changed)})" if changed else ""
        found.append((name, summary(type(augmentation)) + settings))
    return found
