"""`robustfair list`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from robustfair.cli.flags import JsonSwitch, PluginFlag
from robustfair.registry import canonical, load_plugin
from robustfair.report.console import say, screen

if TYPE_CHECKING:
    from robustfair.report.recipes import Shelf


def list_(kind: str, word: str = "", /, *, plugin: PluginFlag = None, json_: JsonSwitch = False) -> int:
    """List what can be named: recipes, objectives, methods, models, datasets, attacks, repairs, edits, ...

    Parameters
    ----------
    kind
        One of these words, or augmentations, or corruptions.
    word
        Only entries that have it in their names. Of recipes it also opens the tables of papers: "cfa" or "cfa/table-1"
        lists their rows with what is reported, "fawa" every row that names it.
    json_
        Print JSON.
    """
    for path in plugin or ():
        load_plugin(path)
    if canonical(kind) == "recipes":  # which are text: no torch is loaded to list them
        from robustfair.report.recipes import recipe_entries, shelves

        if word and not json_:
            return _say_rows(shelves(word))
        entries = recipe_entries(word)
    else:
        from robustfair.report.listing import listing

        entries = listing(kind, word)
    if json_:
        say(json.dumps(dict(entries)))
        return 0
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        say(screen().fold(f"{name:<{width}}  {text}"))
    return 0


def _say_rows(found: list[Shelf]) -> int:
    """Rows under the heads of their tables, with their numbers in a column."""
    for shelf in found:
        if shelf.title:
            say(screen().fold(shelf.title))
        names, numbers = (max(len(entry[at]) for entry in shelf.entries) for at in (0, 2))
        for name, said, reported in shelf.entries:
            cells = [f"{name:<{names}}", *([f"{reported:<{numbers}}"] if numbers else []), said]
            say(screen().fold("  ".join(cells)))
    return 0
