"""`robustfair data`: commands that prepare data sets."""

from __future__ import annotations

from cyclopts import App

from robustfair.cli.flags import PathFlag
from robustfair.report.console import say

data_commands = App(name="data", help="Prepare data sets.", help_format="plaintext")


@data_commands.command
def pack(name: str, /, *, out: PathFlag, parts: int = 2) -> int:
    """Pack a data set losslessly into a few small .npz files, which load where only torch and numpy are installed.

    Parameters
    ----------
    name
        Name or path of the data set.
    out
        Folder of the files; --data reads it back.
    parts
        Number of files.
    """
    from robustfair.data import load_dataset
    from robustfair.data.pack import write_pack

    for file in write_pack(load_dataset(name), out, parts=parts):
        say(f"wrote {file} ({file.stat().st_size / 1e3:,.0f} kB)")
    return 0
