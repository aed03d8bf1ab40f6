"""`robustfair list`."""

from __future__ import annotations

import json

from robustfair.cli.flags import JsonSwitch, PluginFlag
from robustfair.registry import load_plugin
from robustfair.report.console import say, screen


def list_(kind: str, /, *, plugin: PluginFlag = None, json_: JsonSwitch = False) -> int:
    """List what can be named: recipes, objectives, methods, models, datasets, attacks, repairs, edits, ...

    Parameters
    ----------
    kind
        One of these words, or augmentations, or corruptions.
    json_
        Print JSON.
    """
    from robustfair.report.listing import listing

    for path in plugin or ():
        load_plugin(path)
    entries = listing(kind)
    if json_:
        say(json.dumps(dict(entries)))
        return 0
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        say(screen().fold(f"{name:<{width}}  {text}"))
    return 0
