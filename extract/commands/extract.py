"""`stillhouse extract` and `stillhouse teacher`: run a language model over a corpus and store its states.

Guarantees: the same command resumes an interrupted run, and does nothing if everything is stored.
Try: `stillhouse extract CORPUS STORE --teacher MODEL --layers 0,3,6 --context alone --context both:64`.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options as opt

if TYPE_CHECKING:
    from ...data.files.stopping import StopRequest
    from ..pipeline.progress import ExtractionProgress, Summary


_LAYERS = "Layers to store, as in 0,3,6 or 0-6. The last layer is last or -1."
_CONTEXT = (
    "Text that the model sees beside the utterance: alone, past:N, past:N+block, future:N or both:N tokens. You can "
    "repeat it."
)
_SPACE = (
    "Put a space before each text, as byte-level vocabularies expect. auto does so if the vocabulary needs it, but not "
    "before texts in scripts without spaces. It keeps what STORE has."
)
_TRUST = "Allow this model to run its own Python code. Repeat the model's name."


def parse_layers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """Parse "0,3,6", "0-12", "-1" or "last" into layer numbers."""
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
@click.argument("corpus", type=opt.EXISTING)
@click.argument("store", type=opt.STORE)
@click.option("--teacher", help="The model: a folder, or a name on the Hugging Face hub.")
@opt.name_option
@click.option("--layers", default="-1", show_default=True, callback=parse_layers, help=_LAYERS)
@click.option("--context", "contexts", multiple=True, default=["alone"], show_default=True, help=_CONTEXT)
@opt.split_option
@opt.transform_option
@click.option("--join", default="", help="Text between two utterances of one window. Default: nothing.")
@opt.choice("--leading-space", ["auto", "yes", "no"], _SPACE)
@opt.dtype_option
@opt.choice("--model-dtype", ["float32", "bfloat16", "float16"], "Dtype that the model runs in.")
@click.option("--device", default="auto", show_default=True, help="Device of the model: cpu, cuda, cuda:1 or auto.")
@click.option("--window", type=int, help="Most tokens of a pass. Default: what the model allows, up to 4096.")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens of a batch. Default: chosen by device.")
@click.option("--revision", help="Revision of a model on the hub.")
@click.option("--trust-remote-code", metavar="MODEL", help=_TRUST)
@opt.number("--seed", 0, "Seed of the order of sessions.")
@opt.number("--workers", 1, "Number of processes on this machine, or of tasks on a cluster.", least=1)
@opt.choice("--engine", ["local", "ray"], "Run the workers as processes on this machine, or as tasks of a Ray cluster.")
@click.option("--ray-address", help="Address of the cluster: auto, or any that Ray knows. Default: start one here.")
@click.option("--shard", metavar="I/N", help="Extract only part I of N, counted from 0, for job arrays.")
@opt.flag("--status", "Only show how much of STORE is done, running and missing.")
@opt.flag("--dry-run", "Only show the cost in tokens, bytes and time.")
@opt.flag("--force", "Start although the disk is too small, or views would be copies of others.")
@opt.flag("--refresh", "Extract changed utterances again and hide those no longer in CORPUS.")
@opt.outcome_option
def extract(**options: Any) -> None:
    """Run a language model or a speech encoder over CORPUS and save its hidden states in STORE.

    The model's configuration says which it is. A speech encoder hears the audio of each utterance alone, and has a
    state for each frame.

    The same command resumes after an interruption or a kill. Several processes can run it at once and share the work.

    Example: stillhouse extract corpus.jsonl teacher.zarr --teacher bert-base-uncased --layers 6,12 --context both:64
    """
    from ...data.errors import StoppedError
    from ...data.files.stopping import StopNow, StopRequest

    if options["status"]:
        outcome, text = _status(options["store"])
    else:
        with StopRequest() as stop:
            try:
                outcome, text = _run(options, stop)
            except (StoppedError, StopNow) as e:
                said = f"{e.what}." if isinstance(e, StoppedError) else f"stopped by {stop.signal}. {stop.after}"
                click.echo(said, err=True)
                raise e if isinstance(e, StoppedError) else StoppedError(said) from None
    click.echo(json.dumps(outcome, indent=1) if options["as_json"] else text)


def _status(store: Path) -> tuple[Any, str]:
    from ..pipeline.progress import render_status, status

    current = status(store)
    return current.as_json(), render_status(current)


def _run(options: dict[str, Any], stop: StopRequest) -> tuple[Any, str]:
    from ...data.manifest import read_manifest
    from ..pipeline.estimate import check_draft, size_up
    from ..pipeline.estimate import render as render_sizing
    from ..pipeline.extract import extract as run
    from ..pipeline.request import Request
    from ..pipeline.workers import parse_part, part_of, share_threads, start_ray_workers, start_workers
    from ..speech.teacher import load_any_teacher
    from ..store.storage import check_place, has_locks, writable_files

    check_place(options["store"])
    store, part, workers = options["store"], parse_part(options["shard"]), options["workers"]
    load = _load_options(options)
    name = options["name"] or default_name(load["source"])
    start: Any = None
    if options["engine"] == "ray" and not options["dry_run"]:
        start = start_ray_workers(name, load, workers, part, options["ray_address"])
    corpus = read_manifest(options["corpus"]).select(options["split"])
    teacher = load_any_teacher(**load | {"corpus": corpus})
    settings = ("layers", "contexts", "transform", "leading_space", "join", "dtype", "batch_tokens", "seed")
    numbers = [k if k >= 0 else teacher.depth + 1 + k for k in options["layers"]]
    for what, asked in (("layer", numbers), ("context", list(options["contexts"]))):
        if twice := sorted({str(a) for a in asked if asked.count(a) > 1}):
            warn(f"{what} {', '.join(twice)} is asked for more than once, and stored once")
    request = Request(name, **{key: options[key] for key in settings})
    if options["dry_run"]:
        with writable_files(store) as files:
            sizing = size_up(files, corpus, teacher, request, refresh=options["refresh"])
        return sizing.as_json(), render_sizing(sizing)
    own_part: tuple[int, int] | None = None
    if options["engine"] == "local":
        share_threads(workers)
        start = start_workers(name, load, workers, part)
        own_part = part_of(has_locks(store), part, 0, workers)
    check = partial(check_draft, on_warning=warn, force=options["force"])
    on_progress = opt.progress(progress_line)
    refresh = options["refresh"]
    summary = run(store, corpus, teacher, request, on_progress, own_part, start, check, refresh, stop=stop)
    return summary.as_json(), render(summary)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    click.echo(f"warning: {text}", err=True)


def _load_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_any_teacher`. Raises UsageError without a teacher, or if another model's code is trusted."""
    from ...data.errors import UsageError

    source, trusted = options["teacher"], options["trust_remote_code"]
    if source is None:
        raise UsageError("no teacher is given", expected="--teacher FOLDER, or a name on the hub")
    if trusted is not None and trusted != source:
        raise UsageError(f"--trust-remote-code {trusted} is not the teacher", expected=source)
    kept = {key: options[key] for key in ("device", "window", "revision")}
    kept["corpus"] = Path(options["corpus"]).absolute()
    return {"source": source, "dtype": options["model_dtype"], "trust_remote_code": trusted is not None, **kept}


def default_name(source: str) -> str:
    """Return the last part of a path or hub name, in letters that a store allows."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(source).name).strip("-.") or "teacher"


def progress_line(p: ExtractionProgress) -> str:
    if p.frame_hz:
        done, total = (rows / p.frame_hz / 3600 for rows in (p.rows, p.rows_total))
        return f"{p.item}: {done:,.2f} of {total:,.2f} h, {p.real_time:,.1f}× real time, {p.eta_s / 60:.1f} min left"
    return (
        f"{p.item}: {p.rows:,} of {p.rows_total:,} tokens, {p.tokens_per_s:,.0f} tokens/s, "
        f"padding {p.padding_share:.1%}, {p.eta_s / 60:.1f} min left"
    )


def render(s: Summary) -> str:
    """Return the summary of a run as text for people."""
    from ..pipeline.progress import rows_text
    from ..teacher.passes import PADDED, SPEECH_WORDS

    rate_hz = s.tokens / s.audio_s if s.audio_s else 0.0
    lines = [
        f"store        {s.store}: {s.store_bytes / 1e6:,.1f} MB, of which states {s.hidden_bytes / 1e6:,.1f} MB",
        f"corpus       {s.utterances:,} utterances, {rows_text(s.tokens, rate_hz)} of {s.teacher}",
        f"views        {', '.join(s.views) or 'none complete yet'}",
        f"this run     {s.units_done_now} of {s.units} work items in {s.wall_s:,.1f} s",
    ]
    if s.passes not in (PADDED.words, SPEECH_WORDS):
        lines.append(f"passes       {s.passes}")
    if s.rows_done_now and s.real_time is not None:
        lines.append(f"speed        {s.real_time:,.1f}× real time; model busy {s.model_share:.0%}")
    elif s.rows_done_now:
        lines.append(
            f"speed        {s.tokens_per_s:,.0f} tokens/s kept, {s.fed_tokens_per_s:,.0f} fed; "
            f"padding {s.padding_share:.1%}; model busy {s.model_share:.0%}"
        )
    return "\n".join(lines)


@click.group()
def teacher() -> None:
    """Convert language models to a form that loads fast."""


@teacher.command(epilog="Example: stillhouse teacher convert SmolLM2-135M-Instruct.Q4_1.gguf teachers/smollm2")
@click.argument("source", type=opt.EXISTING)
@click.argument("out", type=opt.PATH)
@click.option("--note", default="", help="Words about the model to keep beside the facts in its file.")
@opt.flag("--json", "Print the teacher.json of the new folder.")
def convert(source: Path, out: Path, note: str, as_json: bool) -> None:
    """Convert SOURCE to the folder OUT, which --teacher loads at once.

    SOURCE is a GGUF file, a model's folder, or the folder of a CTranslate2 Whisper, as faster-whisper uses.
    Quantised weights become the float32 numbers that they stand for. Before OUT appears, its hidden states and its
    tokenizer, or the weights of a Whisper, are compared with the source's, bit by bit. OUT/teacher.json has the facts.
    GGUF needs the extra gguf.
    """
    from ...data.errors import StillhouseError
    from ...data.files.trouble import in_words
    from ..speech.convert import convert_whisper, is_ctranslate2
    from ..teacher.convert import convert as run
    from ..teacher.convert import render as render_facts

    try:
        facts = (convert_whisper if is_ctranslate2(source) else run)(source, out, note)
    except Exception as e:  # safetensors has its own error for a full disk
        raise (None if isinstance(e, StillhouseError) else in_words(e, out)) or e from None
    click.echo(json.dumps(facts.as_json(), indent=1, ensure_ascii=False) if as_json else render_facts(facts))
