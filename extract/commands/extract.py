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
    from ..pipeline.progress import ExtractionProgress, OnProgress, Summary

REPORT_EVERY_S = 5.0


def parse_layers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """ "0,3,6", "-1" or "last", "0-12"."""
    layers: list[int] = []
    for word in value.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", word)
        if span:
            layers += range(int(span[1]), int(span[2]) + 1)
        elif word == "last":
            layers.append(-1)
        elif re.fullmatch(r"-?\d+", word):
            layers.append(int(word))
        else:
            raise click.BadParameter(f"{word!r} is no layer; give numbers as in 0,3,6 or 0-6 or last")
    return layers


@click.command()
@click.argument("corpus", type=click.Path(exists=True, path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--teacher", help="A model: a folder, or a name on the Hugging Face hub.")
@click.option("--name", help="What the store calls it. Default: the last part of the model's name.")
@click.option(
    "--layers",
    default="-1",
    show_default=True,
    callback=parse_layers,
    help="As in 0,3,6 or 0-6; last or -1 from the end.",
)
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
    type=click.Choice(["float16", "bfloat16", "float32", "int8"]),
    help="Of the stored states; int8 takes half of float16, at an error of 1 % or less.",
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
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Processes on this machine, or tasks of a cluster.",
)
@click.option(
    "--engine",
    default="local",
    show_default=True,
    type=click.Choice(["local", "ray"]),
    help="Where the workers run: processes here, or tasks of a Ray cluster.",
)
@click.option("--ray-address", help="The cluster: auto, or as Ray spells it. Default: one is started here.")
@click.option("--shard", metavar="I/N", help="Only the I-th of N parts (I from 0): for job arrays.")
@click.option("--status", is_flag=True, help="Only tell what of STORE is done, running and missing.")
@click.option("--dry-run", is_flag=True, help="Only tell what it will cost in tokens, bytes and time.")
@click.option("--force", is_flag=True, help="Start although the disk has not the room.")
@click.option("--refresh", is_flag=True, help="Redo what CORPUS says otherwise than STORE; drop what it no longer has.")
@click.option("--json", "as_json", is_flag=True, help="The outcome as JSON.")
def extract(**options: Any) -> None:
    """Run a language model over CORPUS and keep its hidden states in STORE.

    Interrupted or killed, the same command resumes. Several at once share the work.

    Example: stillhouse extract corpus.jsonl teacher.zarr --teacher bert-base-uncased --layers 6,12 --context both:64
    """
    outcome, text = _status(options["store"]) if options["status"] else _run(options)
    click.echo(json.dumps(outcome, indent=1) if options["as_json"] else text)


def _status(store: Path) -> tuple[Any, str]:
    from ..pipeline.progress import render_status, status

    found = status(store)
    return found.as_json(), render_status(found)


def _run(options: dict[str, Any]) -> tuple[Any, str]:
    from ...data.manifest import read_manifest
    from ..pipeline.estimate import check_disk_space, size_up
    from ..pipeline.estimate import render as render_sizing
    from ..pipeline.extract import extract as run
    from ..pipeline.request import Request
    from ..pipeline.workers import parse_part, share_threads, start_workers
    from ..store.remote.client import is_url
    from ..store.remote.paths import writable_copy
    from ..teacher.model import load_teacher

    store, part, workers = options["store"], parse_part(options["shard"]), options["workers"]
    load = _load_options(options)
    corpus = read_manifest(options["corpus"]).select(options["split"])
    teacher = load_teacher(**load)
    request = Request(
        name=options["name"] or default_name(load["source"]),
        layers=options["layers"],
        contexts=options["contexts"],
        transform=options["transform"],
        join=options["join"],
        dtype=options["dtype"],
        batch_tokens=options["batch_tokens"],
        seed=options["seed"],
    )
    if options["dry_run"]:
        with writable_copy(store) as folder:
            sizing = size_up(folder, corpus, teacher, request, refresh=options["refresh"])
        return sizing.as_json(), render_sizing(sizing)
    check = None if options["force"] else check_disk_space
    if options["engine"] == "ray":
        from ..pipeline.workers import start_ray_workers

        ray_crew = start_ray_workers(request.name, load, workers, part, options["ray_address"])
        summary = run(store, corpus, teacher, request, progress_lines(), None, ray_crew, check, options["refresh"])
        return summary.as_json(), render(summary)
    share_threads(workers)
    crew = start_workers(request.name, load, workers, part)
    mine = (part[0], part[1] * workers) if is_url(store) else part  # no locks there: every worker has its share
    summary = run(store, corpus, teacher, request, progress_lines(), mine, crew, check, options["refresh"])
    return summary.as_json(), render(summary)


def _load_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_teacher`. Errors: UsageError for a missing teacher, or other code than its own trusted."""
    from ...data.errors import UsageError

    source, trusted = options["teacher"], options["trust_remote_code"]
    if source is None:
        raise UsageError("no teacher", expected="--teacher FOLDER, or a name on the hub")
    if trusted is not None and trusted != source:
        raise UsageError(f"--trust-remote-code {trusted} is not the teacher", expected=source)
    return {
        "source": source,
        "device": options["device"],
        "dtype": options["model_dtype"],
        "window": options["window"],
        "revision": options["revision"],
        "trust_remote_code": trusted is not None,
    }


def default_name(source: str) -> str:
    """The last part of a path or hub name, in letters that a store allows."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(source).name).strip("-.") or "teacher"


def progress_lines() -> OnProgress:
    """A line on stderr every few seconds."""
    last = time.perf_counter()

    def report(p: ExtractionProgress) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < REPORT_EVERY_S:
            return
        last = now
        click.echo(
            f"{p.item}: {p.rows:,} of {p.rows_total:,} tokens, {p.tokens_per_s:,.0f} tokens/s, "
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


@click.group()
def teacher() -> None:
    """Language models on this machine."""


@teacher.command(epilog="Example: stillhouse teacher convert SmolLM2-135M-Instruct.Q4_1.gguf teachers/smollm2")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--note", default="", help="Words to keep about the model, beside what its file tells.")
@click.option("--json", "as_json", is_flag=True, help="The new folder's teacher.json.")
def convert(source: Path, out: Path, note: str, as_json: bool) -> None:
    """Read SOURCE, a GGUF file or a model's folder, once, and write the folder OUT, which --teacher loads at once.

    Quantised weights become the float32 numbers that they stand for. Hidden states and tokenizer are compared with the
    source's, bit by bit, before OUT appears; OUT/teacher.json says what it is. GGUF needs the extra gguf.
    """
    from ..teacher.convert import convert as run
    from ..teacher.convert import render as render_card

    card = run(source, out, note)
    click.echo(json.dumps(card.as_json(), indent=1, ensure_ascii=False) if as_json else render_card(card))
