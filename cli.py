"""The table of contents of the commands: a lazy click group.

Invariant: nothing but click is imported before a command runs, so `stillhouse --help` and `stillhouse CMD --help`
are fast. Each package owns its commands in its commands.py. Run: `stillhouse --help`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

# name -> (module:attribute, one line of help); strings, so that no package is imported to print the list.
COMMANDS = {
    "demo": ("stillhouse.train.commands.train:demo", "The whole of it on an embedded corpus, ending in a report."),
    "corpus": ("stillhouse.data.commands.corpus:corpus", "Import, check and split a corpus; features; ASR units."),
    "extract": ("stillhouse.extract.commands.extract:extract", "Store a language model's states of the transcripts."),
    "teacher": ("stillhouse.extract.commands.extract:teacher", "Bring a language model into a form that loads fast."),
    "inspect": ("stillhouse.extract.commands.inspect:inspect", "Look into a store."),
    "store": ("stillhouse.extract.commands.store:store", "Import into stores, clear, cut, copy and merge them."),
    "views": ("stillhouse.extract.commands.inspect_numbers:choose_views", "Help to choose views before training."),
    "train": ("stillhouse.train.commands.train:train", "Train a transducer, with transfer from a store or without."),
    "report": ("stillhouse.train.commands.report:report", "Show a run of train as one HTML page."),
    "study": ("stillhouse.train.commands.train:study", "Arms and seeds of a recipe, trained, decoded and compared."),
    "decode": ("stillhouse.train.commands.decode:decode", "Write hypotheses of a trained model."),
    "align": ("stillhouse.train.commands.decode:align", "Write when a trained model hears each word: CTM, TextGrid."),
    "score": ("stillhouse.train.commands.score:score", "WER and CER with bootstrap intervals."),
    "export": ("stillhouse.train.commands.export:export", "A trained model as ONNX, torch.export or safetensors."),
    "doctor": ("stillhouse.data.commands.doctor:doctor", "What works on this machine, and what to install."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


EPILOG = """\b
Exit codes: 0 done; 1 failed, or findings; 2 usage; 3 some utterances failed;
10 no store; 11 locked; 12 stale or incompatible; 130 interrupted."""


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stillhouse")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Stillhouse distils language models into small transducer speech recognisers."""
    ctx.obj = {"debug": debug}


def main(argv: list[str] | None = None) -> None:
    """Run the command line; the one place where errors become messages and exit codes."""
    args = sys.argv[1:] if argv is None else argv
    # Before torch is loaded: threads that wait by spinning make everything up to 100x slower where other processes
    # use the cores too, and cost nothing measurable to wake where they do not.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `stillhouse … | head` ends quietly
    from stillhouse.data.errors import StillhouseError

    try:
        code = cli.main(args=args, prog_name="stillhouse", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except StillhouseError as e:
        if "--debug" in args or os.environ.get("STILLHOUSE_DEBUG"):
            raise
        click.echo(f"error: {e}", err=True)
        sys.exit(e.exit_code)
    except Exception as e:
        if "--debug" in args or os.environ.get("STILLHOUSE_DEBUG"):
            raise
        told = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else f"{type(e).__name__}: {e}"
        click.echo(
            f"error: {told}; nobody foresaw this: a damaged file, or a fault of Stillhouse "
            "(STILLHOUSE_DEBUG=1 shows where)",
            err=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
