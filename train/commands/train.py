"""Commands: demo, train, study. Run `stillhouse train --help`."""

from __future__ import annotations

import json
from pathlib import Path

import click


def say(line: str) -> None:
    click.echo(line, err=True)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="A.B=VALUE", help="Change one setting; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [default: runs/NAME-OF-CONFIG]")
@click.option(
    "--profile",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=10,
    metavar="[STEPS]",
    help="Profile so many steps, from the fourth on: a trace and a table in RUN/profile. [10 without a number]",
)
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON instead of the run's folder.")
def train(config: Path, changes: tuple[str, ...], out: Path | None, profile: int | None, as_json: bool) -> None:
    """Train a transducer as CONFIG (TOML) says; goes on where a killed run stopped.

    Example: stillhouse train recipes/kathleen.toml --set optim.steps=4000 --out runs/kathleen
    """
    from dataclasses import asdict

    from ...data.errors import StillhouseError
    from ..config import load_config
    from ..loop.trainer import Trainer
    from ..run.profile import Profile, Profiled
    from ..run.ranks import joined

    settings = load_config(config, changes)
    folder = out or Path("runs") / config.stem
    profiled: list[Profiled | None] = []

    def show(found: Profiled | None) -> None:
        profiled.append(found)
        say(found.table(ops=8) + f"profile: {found.trace}" if found else "no step to profile: the run ended too early")

    with joined(settings.run.backend, settings.run.timeout_s) as ranks:
        try:
            trainer = Trainer(settings, folder, say, ranks)
            trainer.run(Profile(folder / "profile", profile, show) if profile else None)
        except OSError as e:  # the disk is full, or something else lies where the run writes
            raise StillhouseError(
                f"cannot be read or written: {e.strerror or e}",
                where=e.filename2 or e.filename or folder,  # of a rename, what is in its way
                remedy="put that right; the same command again goes on from the last checkpoint",
            ) from e
        if not ranks.first:
            return
        if as_json:
            found = asdict(profiled[0]) if profiled and profiled[0] else None
            facts = {"run": str(folder), "step": trainer.step, "best": trainer.best, "profile": found}
            click.echo(json.dumps(facts, ensure_ascii=False))
        else:
            click.echo(folder)


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the runs. [default: runs/NAME-OF-STUDY]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option("--only", help="Only these arms; several with commas.")
@click.option("--seeds", help="Only these seeds; several with commas.")
@click.option("--table", "table_only", is_flag=True, help="Run nothing: the table of what is done.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON instead of Markdown.")
def study(
    study: Path,
    out: Path | None,
    jobs: int,
    only: str | None,
    seeds: str | None,
    table_only: bool,
    as_json: bool,
) -> None:
    """Train every arm of STUDY (TOML) with every seed and compare their error rates; stopped, it goes on.

    Each run is an ordinary run folder, OUT/ARM/seed-N. The table goes to stdout, and with plots to OUT/study.html.

    Example: stillhouse study recipes/study-demo.toml --jobs 2
    """
    from dataclasses import asdict

    from ..study.definition import chosen, load_study
    from ..study.report import limit, markdown, write_reports
    from ..study.runs import StudyError, run_study
    from ..study.table import curves, limits, tabulate

    whole = load_study(study, out or Path("runs") / study.stem)
    runs = chosen(whole, only, seeds)
    failures = (
        [] if table_only else run_study(whole, runs, jobs=jobs, say=say, limits=lambda: map(limit, limits(whole)))
    )
    table = tabulate(whole)
    whole.out.mkdir(parents=True, exist_ok=True)
    write_reports(table, whole.out, curves(whole))
    click.echo(json.dumps(asdict(table), ensure_ascii=False) if as_json else markdown(table), nl=as_json)
    say(f"report: {whole.out / 'study.html'}")
    if failures:
        raise StudyError(
            f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}",
            where=whole.out,
            remedy="the same command again goes on with them",
        )


@click.command()
@click.option("--quick", is_flag=True, help="Under 3 minutes: hears and trains less, and judges no error rate.")
@click.option("--study", is_flag=True, help="Train nothing: corpus and stores for recipes/study-demo.toml.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to work in. [default: demo-out, or demo-out-quick, or study-demo]",
)
@click.option(
    "--voices",
    type=click.Choice(["espeak", "hibari"]),
    default="espeak",
    show_default=True,
    envvar="DEMO_VOICE",
    help="Whose speech; also by the environment variable DEMO_VOICE.",
)
def demo(quick: bool, study: bool, out: Path | None, voices: str) -> None:
    """From short stories in synthetic voices to a trained recogniser and a report, command by command.

    Stopped, the same command goes on. It fails unless the recogniser works: word error rates of at most 30 % on known
    sentences in voices that it never heard, and of at most 60 % on sentences that it never saw.

    Example: stillhouse demo --quick
    """
    from ..demo.demo import DemoError, prepare_study, run_demo

    if study:
        prepare_study(out or Path("study-demo"), voices, say)
        return
    result = run_demo(out or Path("demo-out-quick" if quick else "demo-out"), quick, voices, say)
    click.echo()
    click.echo(result.table())
    click.echo(f"\nreport: {result.page}\n")
    say(result.librispeech)
    if result.failures:
        raise DemoError("the demo's recogniser does not work: " + "; ".join(result.failures), where=result.page)
