"""`stillhouse extract`: a corpus and a teacher in, a store out.

Invariant: the same command again goes on where the last one ended, and does nothing when all is there.
Run: `stillhouse extract CORPUS STORE --teacher MODEL --layers 0,3,6 --context alone --context both:64`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .run import Progress, Report, Summary

REPORT_EVERY_S = 5.0


def parse_layers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """ "0,3,6", "-1", "0-12"; "all" is every layer (as 0 and all that exist)."""
    layers: list[int] = []
    for word in value.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", word)
        if span:
            layers += range(int(span[1]), int(span[2]) + 1)
        elif re.fullmatch(r"-?\d+", word):
            layers.append(int(word))
        else:
            raise click.BadParameter(f"{word!r} is no layer; give numbers as in 0,3,6 or 0-6 or -1")
    return layers


@click.command()
@click.argument("corpus", type=click.Path(exists=True, path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, help="A model: a folder, or a name on the Hugging Face hub.")
@click.option("--name", help="What the store calls it. Default: the last part of the model's name.")
@click.option("--layers", default="-1", show_default=True, callback=parse_layers, help="As in 0,3,6 or 0-6 or -1.")
@click.option(
    "--context",
    "contexts",
    multiple=True,
    default=["alone"],
    show_default=True,
    help="alone, past:N, past:N+block, future:N, both:N. May be given several times.",
)
@click.option("--split", help="Only these splits of the corpus, as in train,dev.")
@click.option(
    "--transform",
    default="none",
    show_default=True,
    help="Text transforms joined by +, as in sentence_case or lower+no_punct.",
)
@click.option("--join", default="", help="What stands between two utterances of one window. Default: nothing.")
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of the stored states.",
)
@click.option(
    "--model-dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="In which the model runs.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@click.option("--window", type=int, help="Most tokens a pass. Default: what the model allows, up to 4096.")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens a batch. Default: by device.")
@click.option("--revision", help="Of a model on the hub.")
@click.option("--trust-remote-code", metavar="MODEL", help="Run the code of this model; name it again here.")
@click.option("--seed", default=0, show_default=True, help="Of the order of sessions.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON.")
def extract(**options: Any) -> None:
    """Run a language model over CORPUS and keep its hidden states in STORE.

    Interrupted or killed, the same command resumes. Several at once share the work.
    """
    from stillhouse.data.errors import UsageError
    from stillhouse.data.manifest import read_manifest

    from .plan import Request
    from .run import extract as run
    from .teacher import load_teacher

    source = options["teacher"]
    trusted = options["trust_remote_code"]
    if trusted is not None and trusted != source:
        raise UsageError(f"--trust-remote-code {trusted} is not the teacher", expected=source)
    corpus = read_manifest(options["corpus"]).select(options["split"])
    teacher = load_teacher(
        source,
        device=options["device"],
        dtype=options["model_dtype"],
        window=options["window"],
        revision=options["revision"],
        trust_remote_code=trusted is not None,
    )
    request = Request(
        name=options["name"] or default_name(source),
        layers=options["layers"],
        contexts=options["contexts"],
        transform=options["transform"],
        join=options["join"],
        dtype=options["dtype"],
        batch_tokens=options["batch_tokens"],
        seed=options["seed"],
    )
    summary = run(options["store"], corpus, teacher, request, progress_lines())
    if options["as_json"]:
        click.echo(json.dumps(summary.as_json(), indent=1))
    else:
        click.echo(render(summary))


def default_name(source: str) -> str:
    """The last part of a path or hub name, in letters that a store allows."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(source).name).strip("-.") or "teacher"


def progress_lines() -> Report:
    """A line on stderr every few seconds."""
    last = time.perf_counter()

    def report(p: Progress) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < REPORT_EVERY_S:
            return
        last = now
        click.echo(
            f"{p.unit}: {p.rows:,} of {p.rows_total:,} tokens, {p.tokens_per_s:,.0f} tokens/s, "
            f"padding {p.padding_share:.1%}, {p.eta_s / 60:.1f} min to go",
            file=sys.stderr,
        )

    return report


def render(s: Summary) -> str:
    """The summary for people."""
    lines = [
        f"store        {s.store}: {s.store_bytes / 1e6:,.1f} MB, of which states {s.hidden_bytes / 1e6:,.1f} MB",
        f"corpus       {s.utterances:,} utterances, {s.tokens:,} tokens of {s.teacher}",
        f"views        {', '.join(s.views) or 'none complete yet'}",
        f"this run     {s.units_done_now} of {s.units} units in {s.wall_s:,.1f} s",
    ]
    if s.rows_done_now:
        lines.append(
            f"speed        {s.tokens_per_s:,.0f} tokens/s kept, {s.fed_tokens_per_s:,.0f} fed; "
            f"padding {s.padding_share:.1%}; model busy {s.model_share:.0%}"
        )
    return "\n".join(lines)
