"""The command line: thin commands over the library. Results on stdout, progress on stderr; exit 0, 1 failed, 2 misuse.

torch is imported inside the commands, so that `--help` and mistyped commands answer at once.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import cyclopts
from cyclopts import App

from robustfair.cli.audit import audit
from robustfair.cli.compare import compare
from robustfair.cli.corruptions import corruptions
from robustfair.cli.data import data_commands
from robustfair.cli.demo import demo
from robustfair.cli.explain import explain
from robustfair.cli.list import list_
from robustfair.cli.repair import repair
from robustfair.cli.train import train
from robustfair.errors import DivergedError, RobustFairError, as_flags
from robustfair.report.console import PipedConsole, results, results_apart

app = App(
    name="robustfair",
    help="Train, audit and repair image classifiers that stay robust in every class.",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
for command in (train, audit, corruptions, compare, repair, explain, demo):
    app.command(command)
app.command(list_, name="list")
app.command(data_commands)


def main(argv: list[str] | None = None) -> int:
    """Entry point: run a command and turn every error that a user caused into one line and an exit code."""
    with warnings.catch_warnings(), results_apart(for_good=argv is None):
        _show_warnings_as_lines()
        try:
            help_console = PipedConsole(file=results())
            result = app(
                argv, console=help_console, exit_on_error=False, print_error=False, result_action="return_value"
            )
        except cyclopts.CycloptsError as error:
            return _fail(_one_line(str(error)), 2)
        except DivergedError as error:
            return _fail(str(error), 1)
        except RobustFairError as error:
            return _fail(_one_line(as_flags(str(error))), 2)
        except KeyboardInterrupt:
            return _fail("interrupted; training goes on with --resume, a saved audit with the same command", 130)
        except BrokenPipeError:
            return 141
        except OSError as error:
            return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    return result if isinstance(result, int) else 0


def _show_warnings_as_lines() -> None:
    """Our warnings as one line each on stderr, at every place once; others as Python has them."""
    from robustfair.errors import RobustFairWarning

    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, RobustFairWarning):
            print(f"warning: {as_flags(str(message))}", file=sys.stderr)
        else:
            plain(message, category, *rest)

    warnings.showwarning = show  # type: ignore[assignment]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(text: str, code: int) -> int:
    print(f"robustfair: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
