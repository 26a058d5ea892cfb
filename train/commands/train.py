"""The commands train, study and demo. Try: `stillhouse train --help`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...data.commands.paths import PATH
from .live import say, telling

if TYPE_CHECKING:
    from ...data.files.stopping import StopRequest
    from ..config.toml import Layer


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a line that tells how to resume, and an exit code."""
    from ...data.errors import StoppedError
    from ...data.files.stopping import StopNow, StopRequest

    say_first = say if os.environ.get("RANK", "0") == "0" else lambda _: None  # Every rank is stopped.
    with StopRequest() as stop:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            stop.follow_launcher()
        try:
            yield stop
        except StopNow:
            say_first(f"stopped by {stop.signal}. {stop.after}")
            raise StoppedError(f"stopped by {stop.signal}") from None
        except KeyboardInterrupt:
            say_first(f"interrupted. {stop.after}")
            raise click.exceptions.Exit(130) from None


@click.command()
@click.argument("config", type=PATH)
@click.option("--set", "changes", multiple=True, metavar="A.B=VALUE",
              help="Change one setting. You can repeat this option.")  # fmt: skip
@click.option("--out", type=PATH, help="Write the run to this folder. [default: runs/NAME-OF-CONFIG]")
@click.option("--init", type=PATH, metavar="RUN|EXPORT",
              help="Start from the weights of this run, or of this export as safetensors.")  # fmt: skip
@click.option("--init-parts", metavar="PARTS",
              help="Take these parts alone, with commas between: encoder, predictor, joint. [all]")  # fmt: skip
@click.option("--freeze", metavar="PARTS",
              help="Do not train what was taken of these parts. encoder:N is its front and N blocks. "
                   "[none]")  # fmt: skip
@click.option("--profile", type=click.IntRange(min=1), is_flag=False, flag_value=10, metavar="[STEPS]",
              help="Profile STEPS steps, from the fourth on, and write a trace and a table to RUN/profile. "
                   "[10 without a number]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of the run's folder.")
def train(
    config: Path,
    changes: tuple[str, ...],
    out: Path | None,
    init: Path | None,
    init_parts: str | None,
    freeze: str | None,
    profile: int | None,
    as_json: bool,
) -> None:
    """Train a transducer with the settings of CONFIG, a TOML file. Repeat the command to resume a stopped run.

    --init, --init-parts and --freeze replace the recipe's init.source, init.parts and init.freeze. A run that resumes
    does not need them.

    After SIGTERM or SIGUSR1 the run writes a checkpoint and ends with exit code 143.

    Example: stillhouse train recipes/kathleen.toml --set optim.steps=4000 --out runs/kathleen
    """
    source = None if init is None else str(init)
    given = {"--init": ("source", source), "--init-parts": ("parts", init_parts), "--freeze": ("freeze", freeze)}
    options: list[Layer] = [(o, {"init": {name: value}}) for o, (name, value) in given.items() if value is not None]
    with stoppable() as stop:
        _train(config, changes, options, out or Path("runs") / config.stem, profile, as_json, stop)


def _train(
    config: Path,
    changes: tuple[str, ...],
    options: list[Layer],
    folder: Path,
    profile: int | None,
    as_json: bool,
    stop: StopRequest,
) -> None:
    from dataclasses import asdict

    from ...data.errors import StillhouseError
    from ...data.files.trouble import in_words
    from ..config import load_config

    with telling("loading the libraries"):
        from ..loop.trainer import Trainer
        from ..run.profile import Profile, Profiled
        from ..run.ranks import joined

    settings = load_config(config, changes, options)
    profiled: Profiled | None = None

    def show(result: Profiled | None) -> None:
        nonlocal profiled
        profiled = result
        no_profile = "there is no profile, because the run ended before the fourth step"
        say(result.table(ops=8) + f"profile: {result.trace}" if result else no_profile)

    with joined(settings.run.backend, settings.run.timeout_s) as ranks:
        try:
            what = "reading the corpus, and comparing it with the features and stores"
            with telling(what) if ranks.first else nullcontext():
                trainer = Trainer(settings, folder, say, ranks, stop)
            trainer.run(Profile(folder / "profile", profile, show) if profile else None)
        except (OSError, MemoryError, RuntimeError) as e:
            trouble = in_words(e, folder)
            if trouble is None:
                raise
            remedy = f"{trouble.remedy}. {stop.after}"
            raise StillhouseError(trouble.what, where=trouble.where, remedy=remedy) from e
        if not ranks.first:
            return
        if as_json:
            profile_facts = asdict(profiled) if profiled else None
            facts = {"run": str(folder), "step": trainer.step, "best": trainer.best, "profile": profile_facts}
            facts["init"] = trainer.identity.get("init")
            click.echo(json.dumps(facts, ensure_ascii=False))
        else:
            click.echo(folder)


@click.command()
@click.argument("study", type=PATH)
@click.option("--out", type=PATH, help="Write the runs to this folder. [default: runs/NAME-OF-STUDY]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Train so many runs at a time.")
@click.option("--only", help="Run only these arms, with commas between them.")
@click.option("--seeds", help="Run only these seeds, with commas between them.")
@click.option("--choose", is_flag=True,
              help="Run the alternatives of [choice] on held-out speech, and choose one for each arm.")  # fmt: skip
@click.option("--table", "table_only", is_flag=True, help="Run nothing, and print the table of the finished runs.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON instead of Markdown.")
def study(
    study: Path,
    out: Path | None,
    jobs: int,
    only: str | None,
    seeds: str | None,
    choose: bool,
    table_only: bool,
    as_json: bool,
) -> None:
    """Train every arm of STUDY, a TOML file, with every seed, and compare their error rates.

    Repeat the command to resume a stopped study. SIGTERM and SIGUSR1 stop its runs, each with a checkpoint.

    Each run is an ordinary run folder, OUT/ARM/seed-N. The table goes to standard output, and with plots to
    OUT/study.html.

    If the study has a section [choice], start with --choose. It trains runs of other seeds in OUT/choice, decodes no
    test set, and writes OUT/choice.json, whose settings all later runs take.

    Example: stillhouse study recipes/study-demo.toml --jobs 2
    """
    from dataclasses import asdict

    from ...data.files.outputs import check_folder
    from ..study.choice import FILE, in_lines, make_choice
    from ..study.definition import CHOICE, choose_runs, load_study
    from ..study.report import limit_text, markdown, write_reports
    from ..study.runs import StudyError, run_study
    from ..study.table import detectable_differences, mean_curves, tabulate

    folder = out or Path("runs") / study.stem
    loaded = load_study(study, folder, choosing=choose)
    own = {"study.json", FILE, CHOICE, *loaded.definition.arms}
    check_folder(folder, lambda names: bool(names & own) or all(Path(n).suffix == ".log" for n in names), "a study's")
    runs = choose_runs(loaded, only, seeds)
    failures: list[str] = []
    if not table_only:
        with stoppable():
            failures = run_study(
                loaded, runs, jobs=jobs, on_progress=say, limits=lambda: map(limit_text, detectable_differences(loaded))
            )
    table = tabulate(loaded)
    loaded.out.mkdir(parents=True, exist_ok=True)
    write_reports(table, loaded.out, mean_curves(loaded))
    click.echo(json.dumps(asdict(table), ensure_ascii=False) if as_json else markdown(table), nl=as_json)
    say(f"report: {loaded.out / 'study.html'}")
    if loaded.choosing and not table.missing:
        found = table.values(loaded.choosing.metric)
        for line in in_lines(make_choice(found, loaded.choosing, folder)):
            say(line)
    if failures:
        raise StudyError(
            f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}",
            where=loaded.out,
            remedy="repeat the command to resume them",
        )


@click.command()
@click.option("--quick", is_flag=True,
              help="Train on less speech in under 3 minutes, without limits on the error rates.")  # fmt: skip
@click.option("--study", is_flag=True,
              help="Train nothing, and only make the corpus and stores of recipes/study-demo.toml.")  # fmt: skip
@click.option("--out", type=PATH, help="Work in this folder. [default: demo-out, demo-out-quick or study-demo]")
@click.option("--voices", type=click.Choice(["espeak", "hibari"]), default="espeak", show_default=True,
              envvar="DEMO_VOICE", help="Choose the voices that read the stories.")  # fmt: skip
def demo(quick: bool, study: bool, out: Path | None, voices: str) -> None:
    """Train a recogniser on short stories in synthetic voices, command by command, and write a report.

    Repeat the command to resume a stopped demo. It fails unless the recogniser works. The word error rate must be at
    most 30 % on known sentences in new voices, and at most 60 % on new sentences.

    Example: stillhouse demo --quick
    """
    from ..demo.demo import DemoError, prepare_study, run_demo

    with stoppable():
        if study:
            prepare_study(out or Path("study-demo"), voices, say)
            return
        result = run_demo(out or Path("demo-out-quick" if quick else "demo-out"), quick, voices, say)
    click.echo(f"\n{result.table()}\n\nreport: {result.page}\n")
    say(result.librispeech)
    if result.failures:
        raise DemoError(f"the demo's recogniser does not work: {'; '.join(result.failures)}", where=result.page)
