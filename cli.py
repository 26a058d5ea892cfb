"""The command line: a click group that loads a command when it runs.

Guarantees: only click is imported before a command runs, so `stillhouse --help` and `stillhouse CMD --help` are fast.
Try: `stillhouse --help`.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
from types import TracebackType
from typing import Any

import click

# name -> (module:attribute, one line of help). The lines are strings here, so that the list needs no import.
COMMANDS = {
    "demo": ("stillhouse.train.commands.train:demo", "Run everything on an embedded corpus and write a report."),
    "corpus": ("stillhouse.data.commands.corpus:corpus", "Import, check and split a corpus. Make features."),
    "extract": ("stillhouse.extract.commands.extract:extract", "Store the hidden states of a language model."),
    "teacher": ("stillhouse.extract.commands.extract:teacher", "Convert a language model to a form that loads fast."),
    "inspect": ("stillhouse.extract.commands.inspect:inspect", "Show what a store contains."),
    "store": ("stillhouse.extract.commands.store:store", "Import, delete, copy, subset and merge stores."),
    "views": ("stillhouse.extract.commands.inspect_numbers:choose_views", "Help to choose views before training."),
    "train": ("stillhouse.train.commands.train:train", "Train a transducer, with or without transfer from a store."),
    "report": ("stillhouse.train.commands.report:report", "Write a training run as one HTML page."),
    "study": ("stillhouse.train.commands.train:study", "Train, decode and compare the arms and seeds of a recipe."),
    "decode": ("stillhouse.train.commands.decode:decode", "Transcribe speech with a trained model."),
    "align": ("stillhouse.train.commands.decode:align", "Write when each word is spoken, as CTM or TextGrid."),
    "score": ("stillhouse.train.commands.score:score", "Compute WER and CER with bootstrap intervals."),
    "export": ("stillhouse.train.commands.export:export", "Export a trained model: ONNX, torch.export, safetensors."),
    "doctor": ("stillhouse.data.commands.doctor:doctor", "Check this machine and tell what to install."),
}
# Commands of a group that live in another part of the package: group -> {name: module:attribute}
ADDED = {
    "corpus": {
        "features": "stillhouse.extract.commands.features:features",
        "ngram": "stillhouse.train.commands.ngram:ngram",
    }
}


def _load(place: str) -> click.Command:
    module, attribute = place.split(":")
    return getattr(importlib.import_module(module), attribute)


class LazyGroup(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        from stillhouse.data.files.streams import escaped_output

        with escaped_output():
            return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = _load(COMMANDS[name][0])
        if isinstance(command, click.Group):
            for added, place in ADDED.get(name, {}).items():
                command.add_command(_load(place), added)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


EPILOG = """\b
Exit codes: 0 done, 1 failed or findings, 2 usage, 3 some utterances failed,
10 no store, 11 locked, 12 stale or incompatible, 130 interrupted,
143 stopped by SIGTERM or SIGUSR1: the same command resumes."""


# Without `color`, click deletes terminal escapes from what goes into a pipe, and an id would be another one.
@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "color": True})
@click.version_option(package_name="stillhouse")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Stillhouse distils language models into small transducer speech recognisers."""
    ctx.obj = {"debug": debug}


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Errors become messages and exit codes here and nowhere else."""
    args = sys.argv[1:] if argv is None else argv
    ending = _Ending(final=argv is None)
    if argv is None:
        atexit.register(ending.leave)  # registered first, so it is called last
    # Set before torch is loaded. Threads that spin while they wait make everything up to 100 times slower if other
    # processes use the cores too. On a quiet machine, waking them costs nothing measurable.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `stillhouse … | head` ends without a traceback
    from stillhouse.data.files.streams import escaped_output

    with escaped_output(), ending:
        _run(args)


class _Ending:
    """A context manager that keeps the exit code, and the end of a process that has nothing left to do but free memory.

    Libraries take half a second or more for that, which a scheduler that kills does not always give.
    """

    code: int | None = None

    def __init__(self, final: bool) -> None:
        self.final = final  # whether the process ends with this command

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            self.code = error.code
            if self.final:
                # Nothing is left to save, so a signal that comes now must not make a failure of what is done.
                for name in ("SIGTERM", "SIGUSR1"):
                    if hasattr(signal, name):
                        signal.signal(getattr(signal, name), signal.SIG_IGN)

    def leave(self) -> None:
        if self.code is None:
            return  # An exception that nothing expects, which Python reports with an exit code of its own.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            return  # Python says so.
        os._exit(self.code)


def _run(args: list[str]) -> None:
    from stillhouse.data.errors import StillhouseError, StoppedError
    from stillhouse.data.files.trouble import in_words

    try:
        code = cli.main(args=args, prog_name="stillhouse", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        _hint(args)
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        words = [a for a in args if not a.startswith("-")]
        resumes = words[:1] == ["extract"] or words[:2] == ["corpus", "features"]
        click.echo("interrupted" + (". Repeat the command to resume." if resumes else ""), err=True)
        sys.exit(130)
    except StoppedError as e:  # The command has said so.
        sys.exit(e.exit_code)
    except Exception as e:
        if "--debug" in args or os.environ.get("STILLHOUSE_DEBUG"):
            import traceback

            traceback.print_exc()
            sys.exit(1)
        error = e if isinstance(e, StillhouseError) else in_words(e)
        if error is not None:
            click.echo(f"error: {error}", err=True, color=True)
            _hint(args)
            sys.exit(error.exit_code)
        advice = "Set STILLHOUSE_DEBUG=1 for the traceback, and please report it."
        click.echo(f"error: unexpected error: {type(e).__name__}: {e}. {advice}", err=True, color=True)
        sys.exit(1)


def _hint(args: list[str]) -> None:
    """Say so if two arguments of a command that failed seem swapped."""
    from stillhouse.data.commands.arguments import hint

    if said := hint(cli, args):
        click.echo(f"hint: {said}", err=True, color=True)


if __name__ == "__main__":
    main()
