"""The `orbcalc` command: a thin shell around the functions of the package.

Exit codes: 0, it is done; 1, it failed, or a run ended without a certificate; 2, the command
line or a configuration is wrong.
"""

from __future__ import annotations

import logging
import sys

import typer
from rich.text import Text

from orbcalc.cli.checks import check
from orbcalc.cli.console import console
from orbcalc.cli.inspection import info, report, schema
from orbcalc.cli.labels import label
from orbcalc.cli.models import evaluate, train
from orbcalc.cli.runs import run
from orbcalc.errors import ConfigError, OrbcalcError

__all__ = ["app", "main"]

app = typer.Typer(
    name="orbcalc",
    help="Interatomic potentials taught by cheap orbital charges.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (label, train, evaluate, run, check, info, report, schema):
    app.command()(command)


def main() -> None:
    """Run the command line and exit with its code."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("orbcalc").addHandler(handler)
    try:
        app(prog_name="orbcalc")
    except ConfigError as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        sys.exit(2)
    except (OrbcalcError, OSError) as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; start the same command again to go on")
        sys.exit(1)
