"""The `hf-prune` command. One file a command; what they need is imported when they run, so `--help` is quick."""

from __future__ import annotations

import errno
import os
import sys

import typer

from hf_prune.cli.export import export
from hf_prune.cli.inspect import inspect
from hf_prune.cli.push import push
from hf_prune.cli.recipes import recipes
from hf_prune.cli.report import report
from hf_prune.cli.run import run
from hf_prune.cli.sensitivity import sensitivity
from hf_prune.cli.validate import validate
from hf_prune.errors import PruneError


app = typer.Typer(
    name="hf-prune",
    help="Prune Transformers models: weights, neurons, heads, layers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (run, validate, inspect, sensitivity, recipes, report, export, push):
    app.command()(command)

# the user's to mend, whoever met them: no space left, quota, read-only, no permission
_USERS_OWN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def main() -> None:
    """Run the command line: 0 on success, 2 with one message on a user's mistake, 1 on a fault."""
    try:
        app(prog_name="hf-prune")
    except PruneError as error:
        _fail(str(error))
    except BrokenPipeError:
        # the reader of a pipe has left; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _USERS_OWN:
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"hf-prune: {message}", file=sys.stderr)
    sys.exit(2)
