"""The command `braeburn`: all commands together, and how a mistake is told."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from braeburn import __version__
from braeburn.background import ending_process
from braeburn.cli import exchange, generate, launch, plan, prepare, recipes, train, use, verify
from braeburn.cli.options import UsageError
from braeburn.disk import explained
from braeburn.errors import UserError
from braeburn.parallel import processes
from braeburn.train.quiet import quieten_orbax

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def console() -> None:
    """The installed command: `main`, for training in a process that takes its memory in huge pages.

    They save a sixth of the time of a step on CPUs, and glibc reads its settings only as a process
    starts.
    """
    if (
        sys.argv[1:2] == ["train"]
        and sys.platform == "linux"
        and "GLIBC_TUNABLES" not in os.environ
    ):
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
    with ending_process(processes.wait_for_others):
        main()


def main() -> None:
    """Runs the command line; a mistake of the user's is one sentence on standard error and exit
    code 2.
    """
    quieten_orbax()
    try:
        _check_encoding(sys.argv[1:])
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="braeburn", standalone_mode=False))
    except UserError as error:
        message = str(error)
    except UsageError as error:
        message = (
            f"{error.format_message().rstrip('.')}; `{error.ctx.command_path} --help` lists "
            f"what there is"
        )
    except typer.Abort:
        print("interrupted", file=sys.stderr)
        processes.leave(130)
    except processes.ProcessLost as error:
        processes.report(str(error))
        processes.leave(1)
    except Exception as error:
        sentence = explained(error) if isinstance(error, OSError) else _memory_used_up(error)
        if sentence:
            _refuse(sentence)
        if not processes.joined():
            raise
        traceback.print_exc()
        processes.leave(1)
    _refuse(message)


def _memory_used_up(error: Exception) -> str | None:
    """One sentence about a failure for want of memory; None for any other."""
    text = str(error).partition("\n")[0]
    told = any(words in text for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
    if not told and not isinstance(error, MemoryError):
        return None
    what = f" ({text[:160]})" if text else ""
    return (
        f"the memory of a device or of this machine is used up{what}; split the model over more "
        f"devices with mesh or --mesh, hold weights with --dtype bf16, or take shorter sequences "
        f"and smaller batches: `braeburn plan` tells what fits"
    )


def _refuse(sentence: str) -> None:
    """Ends the process with a sentence about a mistake, and tells of which URL a folder in it is a
    copy.
    """
    from braeburn.remote import explained

    processes.report(explained(sentence))
    processes.leave(2)


def _check_encoding(arguments: Sequence[str]) -> None:
    """Refuses arguments that are not UTF-8: prompts become tokens, names and paths JSON, and
    neither can hold them.

    Raises:
        UserError: naming the argument.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the argument {argument!r} is not UTF-8; write it in UTF-8, or rename the file "
                f"or folder that it names"
            ) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"braeburn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Pretrain language models in pure JAX, from one recipe."""


for group in (recipes, plan, prepare, train, use, generate, exchange, verify):
    app.add_typer(group.commands)
app.add_typer(launch.commands, name="launch")
