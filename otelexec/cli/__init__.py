"""
The command line: `otelexec` and `python -m otelexec`.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 not done, or something is wrong, or the reader of a
pipe is gone; 2 a setting, an option or the store is wrong; 130 ended by Ctrl-C; 143 ended by SIGTERM. `relay` and `reconcile`,
which stay until somebody ends them so, exit with 0 then, once they have found their store.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import otelexec
from otelexec.cli import console, options
from otelexec.errors import OtelexecError, SettingsError, StoreNotFound, StoreVersionError

if TYPE_CHECKING:
    from collections.abc import Sequence

NOT_DONE: Final = 1
WRONG: Final = 2
COMMANDS: Final = {
    "list": "listing:list_executions",
    "show": "showing:show",
    "cancel": "cancelling:cancel",
    "relay": "relaying:relay",
    "reconcile": "reconciling:reconcile",
    "doctor": "doctor:doctor",
    "prune": "pruning:prune",
    "migrate": "migrating:migrate",
    "demo": "demo:demo",
}
"""Our own commands: `module:function` here."""
ADDED: Final = "otelexec.commands"
"""The entry points of what adapters add to the command line: Typer applications, each a command with its own ones."""
INTERRUPTED: Final = 128 + signal.SIGINT
TERMINATED: Final = 128 + signal.SIGTERM


def _version(value: bool) -> None:  # noqa: FBT001 (typer calls it so)
    if value:
        console.say(f"otelexec {otelexec.__version__}")
        raise typer.Exit


def _root(
    *,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """
    Durable records and spans of background work: look at them, deliver them, close what dead workers left.

    Every command reads OTELEXEC_* variables; its options override them.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        arguments: Without the program's name; None means the process's own.

    Returns:
        The exit code; see the module.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    console.prepare()
    console.log_to_stderr()
    if not console.is_open(sys.stdout):
        console.complain("stdout is closed: there is nowhere to write to")
        return NOT_DONE
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would be written once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            console.complain(f"{error.filename or 'input or output failed'}: {error.strerror or error}")
        return NOT_DONE
    return code


def _application(arguments: Sequence[str]) -> typer.Typer:
    """Make the application, with the one command that is asked for where it is ours: to import all takes longer than most of them do."""
    app = typer.Typer(name="otelexec", add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.callback()(_root)
    asked = arguments[0]
    for name in [asked] if asked in COMMANDS else COMMANDS:
        module, _, function = COMMANDS[name].partition(":")
        app.command(name)(getattr(import_module(f"otelexec.cli.{module}"), function))
    if asked in COMMANDS:
        return app
    for entry in entry_points(group=ADDED):
        try:
            app.add_typer(entry.load(), name=entry.name)
        except ImportError as error:
            if asked == entry.name:
                extra = f"pip install 'otelexec[{entry.name}]'"
                raise SettingsError(f"`otelexec {entry.name}` needs {error.name}, which is not installed: {extra}") from error
    return app


def _run(arguments: Sequence[str]) -> int:
    try:
        code = _application(arguments)(args=arguments, prog_name="otelexec", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except (options.Failure, OtelexecError) as error:
        console.complain(str(error))
        if isinstance(error, options.Failure):
            return error.code
        return WRONG if isinstance(error, SettingsError | StoreNotFound | StoreVersionError) else NOT_DONE
    except OSError:
        raise
    except Exception as error:
        return _usage(error)
    return code if isinstance(code, int) else 0


def _usage(error: Any) -> int:
    """Print what the command was given wrongly; typer's error classes have no public names, so their shape must do."""
    if not (hasattr(error, "format_message") and isinstance(getattr(error, "exit_code", None), int)):
        raise error
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "otelexec"
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    console.complain(f"{message}; see `{command} --help`")
    return WRONG


def _terminate(*_: object) -> None:
    raise SystemExit(TERMINATED)
