"""Commands that decode with a trained run: decode, align. Run `stillhouse decode --help`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click

from ...data.commands.paths import PATH
from .front import front_end, given_features, is_manifest_name
from .live import (
    decode_live,
    features_of,
    read_samples,
    sample_rate,
    say,
    say_left_out,
    say_unheard,
    speed,
    telling,
    write_data,
)
from .tuning import check_request, dev_split, kept_weights, refuse_learnt, tune_weights

POSITIVE = click.IntRange(min=1)


def finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number", context, option)
    return value


def with_options(*options: Callable) -> Callable[[Callable], Callable]:
    """Return a decorator that adds options to a command, in this order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


run_options = with_options(
    click.option("--split", help="Read only this split. Separate several with commas."),
    click.option("--checkpoint", default="best", show_default=True,
                 help="Weights to use: best, last, a step, raw or average:N."),
    click.option("--device", default="auto", show_default=True, help="Device: cpu, cuda, cuda:1 or auto."),
    click.option("--encoder", "source", metavar="MODEL",
                 help="Where the speech encoder of the features is now. [default: where it was]"),
)  # fmt: skip
search_options = with_options(
    click.option("--beam", type=POSITIVE, default=1, show_default=True,
                 help="Number of hypotheses to keep. With 1 and without --lm the search is greedy."),
    click.option("--nbest", type=POSITIVE, default=1, show_default=True, help="Number of hypotheses to write."),
    click.option("--lm", type=PATH, help="N-gram model for shallow fusion: an ARPA file, plain or gzipped."),
    click.option("--lm-weight", type=float, callback=finite, default=0.3, show_default=True,
                 help="Weight of the n-gram model."),
    click.option("--lm-unit", type=click.Choice(["word", "unit"]), default="word", show_default=True,
                 help="The n-grams are of words or of the recogniser's units."),
    click.option("--lm-unknown", type=click.FloatRange(min=0), callback=finite, default=10.0, show_default=True,
                 help="Cost of an unknown word beside <unk>, in nats, before --lm-weight."),
    click.option("--hotwords", type=PATH,
                 help="Prefer these phrases: one a line, with or without its own score, as in `NEW YORK :2.5`."),
    click.option("--hotwords-score", type=click.FloatRange(min=0, min_open=True), callback=finite, default=1.5,
                 show_default=True, help="What each unit of a hotword adds to the score, in nats."),
    click.option("--max-symbols", type=POSITIVE, default=8, show_default=True,
                 help="Largest number of units in one frame."),
    click.option("--blank-penalty", type=float, callback=finite, default=0.0,
                 help="Subtract this from the blank logit. Larger values give more words."),
    click.option("--ilm-weight", type=float, callback=finite, default=0.0,
                 help="Weight of the internal language model, subtracted from each unit's score."),
    click.option("--tune", "tuned", metavar="NAMES",
                 help="Find the best of these weights on CORPUS and keep them: lm-weight,ilm-weight,blank-penalty."),
)  # fmt: skip


@click.command()
@click.argument("run", type=PATH)
@click.argument("corpus", metavar="CORPUS|-|AUDIO", type=PATH)
@click.argument("features", type=PATH, required=False)
@run_options
@search_options
@click.option("--format", "kind", type=click.Choice(["jsonl", "trn", "ctm", "text"]), default="jsonl",
              show_default=True, help="jsonl has everything, trn and ctm are NIST's, text is Kaldi's.")  # fmt: skip
@click.option("--delay", "delay_s", type=click.FloatRange(min=0), callback=finite, default=0.0, metavar="SECONDS",
              help="Time from a sound to the model's unit for it, as `align` measures it. [default: 0]")  # fmt: skip
@click.option("--threads", type=POSITIVE, help="Number of CPU threads of torch. [default: all cores]")
@click.option("--raw", is_flag=True, help="With `-`: read headerless 16-bit mono PCM at the model's sample rate.")
@click.option("--id", "name", help="With `-` or AUDIO: the id of the audio. [default: stdin, or the file's name]")
@click.option("--chunk", type=POSITIVE, metavar="FRAMES",
              help="With `-` or AUDIO: feed so many frames of 10 ms at a time. [default: the model's]")  # fmt: skip
@click.option("--segment", type=click.FloatRange(min=0.1), callback=finite, metavar="SECONDS",
              help="With `-` or AUDIO: end a segment with a final result after this time.")  # fmt: skip
@click.option("--endpoint", type=click.FloatRange(min=0.1), callback=finite, metavar="SECONDS",
              help="With `-` or AUDIO: end a segment after this time without a word.")  # fmt: skip
@click.option("--no-partial", is_flag=True, help="With `-` or AUDIO: write final results only.")
def decode(
    run: Path,
    corpus: Path,
    features: Path | None,
    split: str | None,
    checkpoint: str,
    device: str,
    source: str | None,
    kind: str,
    delay_s: float,
    threads: int | None,
    raw: bool,
    name: str | None,
    chunk: int | None,
    segment: float | None,
    endpoint: float | None,
    no_partial: bool,
    tuned: str | None,
    **settings: Any,
) -> None:
    """Write a hypothesis of each utterance of CORPUS to stdout, as JSON lines {"id", "hyp", "ref", "score", "words"}.

    A word ends where the next one begins or a silence starts. --delay corrects the times of a model that emits units
    late. --lm adds the score of an n-gram model to each unit. It helps most with --beam above 1. --hotwords raises the
    score of phrases, such as names, and needs --beam 2 or more.

    Without FEATURES, the command decodes audio: `-` from a pipe (WAV, or --raw), or the file AUDIO. A model that was
    trained with chunks writes {"id", "hyp", "final", "start_s", "end_s", …} while the audio arrives. Any other model
    writes results at the end of the audio, or after each --segment.

    If the model's features are the states of a speech encoder, the command loads the encoder, and FEATURES of CORPUS
    may be left out. Results of audio then come at its end, or after each --segment.

    --tune decodes a held-out split again and again, by default the dev split of RUN. It prints the error rates and
    keeps the best weights in RUN/tuned.json. Later calls with the same --lm take them, unless weights are given.

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --split test > hyp.jsonl

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --beam 8 --lm words.arpa.gz --format ctm

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --beam 8 --hotwords names.txt

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --split dev --beam 8 --lm words.arpa.gz --tune
    lm-weight,ilm-weight

    Example: stillhouse decode runs/kathleen - --format text < talk.wav
    """
    with telling("loading the libraries"):
        import torch

        from ...data.errors import UsageError
        from ...data.features.settings import times_of
        from ...data.manifest import read_manifest
        from ..decode.decode import decoding_loader, transcribe
        from ..decode.stream import AudioFront, StreamDecoder, chunk_size
        from ..decode.write import check_ids, hypothesis_lines
        from ..model.build import resolve_device
        from ..run.load import load_run

    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    names = check_request(tuned, settings, features is not None or is_manifest_name(corpus))
    with telling(f"loading the model of {run}"):
        model, units, config, step = load_run(run, checkpoint)
        model, longest = model.to(where), config.data.max_frames
    say_unheard(config, step)
    settings |= {"ilm_weight": 1.0} if "ilm-weight" in names else {} if names else kept_weights(run, settings)
    search, nbest = _search(model, units, kind, **settings)
    front = front_end(run, device, source) if features is None else None
    if features is not None or (front is not None and is_manifest_name(corpus)):
        live = {"--raw": raw, "--id": name, "--chunk": chunk, "--segment": segment, "--endpoint": endpoint}
        for option, value in {**live, "--no-partial": no_partial}.items():
            if value:
                raise UsageError(f"{option} is for audio", expected="- or AUDIO, and no CORPUS")
        whole = read_manifest(corpus)
        split = dev_split(whole, split, config.data.dev) if names else split
        with given_features(whole.select(split), features, front) as (path, chosen):
            with telling("reading the corpus, and comparing it with the features"):
                loader = decoding_loader(chosen, path, units, untranscribed=not names, trained=features_of(run))
            say_left_out(loader, "decoded")
            check_ids((u.id for u in loader.utterances), kind)
            hz = loader.features.frame_times.hz
            if long := int((loader.frames > longest).sum()):
                place = "at quiet places" if loader.features.tells_loudness else "without regard to pauses"
                say(f"{long} utterances are cut {place}: the model's training had at most {longest / hz:g} s.")
            if names:
                refuse_learnt(run, loader)
                decoded = partial(transcribe, model, loader, device=where, longest=longest)
                facts = {"checkpoint": checkpoint, "step": step, "corpus": str(corpus), "split": split}
                tune_weights(run, names, search, model, loader, lambda s: decoded(search=s), settings, **facts)
                return
            began = time.perf_counter()
            options: Any = {"search": search, "nbest": nbest, "delay_s": delay_s, "longest": longest}
            for hypothesis in transcribe(model, loader, device=where, **options):
                for line in hypothesis_lines(hypothesis, kind, nbest):
                    write_data(line)
            seconds, audio_s = time.perf_counter() - began, loader.frames.sum() / hz
            say(f"step {step}: {len(loader.utterances)} utterances, {speed(audio_s, seconds)}")
        return
    if split is not None:
        raise UsageError("--split is for a corpus", expected="CORPUS and FEATURES")
    kept: Any = {"nbest": nbest, "delay_s": delay_s, "longest": longest}
    if front is None:
        rate_hz = sample_rate(run)
        chunk = chunk_size(model, chunk, longest)
    else:
        for option, value in (("--chunk", chunk), ("--endpoint", endpoint)):
            if value:
                what = f"the speech encoder of the features needs whole audio, so {option} is not possible"
                raise UsageError(what, expected=f"no {option}, --segment SECONDS, or a model of fbank that streams")
        rate_hz, chunk = front.settings.rate_hz, 0
        kept["front"] = AudioFront(partial(front.rows, id=name or str(corpus)), times_of(vars(front.settings)))
    decoder = StreamDecoder(
        model, units, search=search, rate_hz=rate_hz, chunk=chunk, segment_s=segment, endpoint_s=endpoint, **kept
    )
    if not chunk:
        if endpoint is not None:
            raise UsageError("--endpoint is for a model that streams", expected="--segment SECONDS")
        when = f"after at most {segment:g} s" if segment else "when the audio ends"
        why = "it was not trained to stream" if front is None else "a speech encoder computes its features"
        say(f"This model needs whole utterances, because {why}. Results come {when}.")
    name = name or ("stdin" if str(corpus) == "-" else corpus.stem)
    samples = read_samples(corpus, rate_hz, raw, remedy=front is None)
    decode_live(decoder, samples, kind, nbest, name, bool(segment or endpoint), not no_partial)


def _search(
    model: Any, units: Any, kind: str, beam: int, nbest: int, lm: Path | None, max_symbols: int, **terms: Any
) -> tuple[Callable, int]:
    """Return what makes the search of a batch, and how many hypotheses to keep."""
    from ...data.errors import UsageError
    from ..decode.beam import Beam, Fusion
    from ..decode.fusion import SumFusion, UnitFusion, WordFusion
    from ..decode.greedy import greedy_search
    from ..decode.ngram import read_arpa

    blank_penalty, ilm_weight, hotwords = terms["blank_penalty"], terms["ilm_weight"], terms["hotwords"]
    given = click.get_current_context().get_parameter_source
    for owner, names in ((lm, ("lm_weight", "lm_unit", "lm_unknown")), (hotwords, ("hotwords_score",))):
        for name in names:
            if owner is None and given(name) == click.core.ParameterSource.COMMANDLINE:
                option, of = f"--{name.replace('_', '-')}", f"--{name.split('_')[0]}"
                example = "words.arpa" if of == "--lm" else "names.txt"
                what = "a language model" if of == "--lm" else "a file of hotwords"
                raise UsageError(f"{option} needs {what}", expected=f"{of} {example} {option} …")
    if nbest > beam:
        raise UsageError(f"--nbest {nbest} is more than --beam {beam}", expected=f"--beam {nbest} or more")
    if nbest > 1 and kind != "jsonl":
        raise UsageError(f"{kind} holds one hypothesis, not --nbest {nbest}", expected="--format jsonl")
    if hotwords is not None and beam == 1:
        what = "--hotwords needs a beam search, because a greedy one keeps one hypothesis"
        raise UsageError(what, expected="--beam 8")
    if beam == 1 and lm is None and not ilm_weight and not blank_penalty:
        return partial(greedy_search, max_symbols=max_symbols), 1
    if model.durations and not model.one_unit:
        raise UsageError(
            "this model emits tokens and durations, which only the greedy search supports",
            expected="--beam 1, without --lm, --hotwords, --ilm-weight and --blank-penalty",
        )
    if ilm_weight and model.joint.combine != "add":
        raise UsageError("a multiplicative joint has no internal language model", expected="--ilm-weight 0")
    parts: list[Fusion] = []
    if hotwords is not None:
        parts.append(_phrases(hotwords, units, terms["hotwords_score"]))
    if lm is not None and terms["lm_unit"] == "word":
        parts.append(WordFusion(read_arpa(lm), units, terms["lm_weight"], lm, unknown=terms["lm_unknown"]))
    elif lm is not None:
        parts.append(UnitFusion(read_arpa(lm), units, terms["lm_weight"], lm))
    fusion = SumFusion(parts) if len(parts) > 1 else parts[0] if parts else None
    search = partial(Beam, width=beam, max_symbols=max_symbols, fusion=fusion)
    return partial(search, blank_penalty=blank_penalty, ilm_weight=ilm_weight), nbest


def _phrases(path: Path, units: Any, score: float) -> Any:
    """Return the hotwords of a file, and say which of them cannot count whole."""
    from ...data.errors import first_few
    from ..decode.hotwords import Hotwords, read_hotwords, space_unit

    hotwords = Hotwords(read_hotwords(path, units, score), units.size, space_unit(units))
    if cut := hotwords.cut_short:
        names = first_few([f"{phrase.text!r} (line {phrase.line})" for phrase in cut])
        say(f"{path}: only the beginning of {names} gets a score, because another phrase of the file ends inside.")
    return hotwords


@click.command()
@click.argument("run", type=PATH)
@click.argument("corpus", type=PATH)
@click.argument("features", type=PATH, required=False)
@run_options
@click.option("--textgrid", "folder", type=PATH, help="Also write FOLDER/ID.TextGrid for Praat.")
@click.option("--force", is_flag=True, help="Replace TextGrid files that `align` did not write, such as edited ones.")
@click.option("--delay", "delay_s", type=click.FloatRange(min=0), callback=finite, metavar="SECONDS",
              help="Time from a sound to the model's unit for it. [default: measured on the corpus]")  # fmt: skip
def align(
    run: Path,
    corpus: Path,
    features: Path | None,
    split: str | None,
    checkpoint: str,
    device: str,
    source: str | None,
    folder: Path | None,
    force: bool,
    delay_s: float | None,
) -> None:
    """Write the start and the duration of each word of the transcripts to stdout, as CTM lines.

    A word ends where the next one begins or a silence starts. The model emits a unit some time after its sound. The
    command measures this delay at the pauses of up to 256 utterances. Give --delay to get the same times in any corpus.
    If the model's features are the states of a speech encoder, FEATURES may be left out.

    Example: stillhouse align runs/kathleen corpus.jsonl features.h5 --split test > words.ctm
    """
    from ...data.errors import UsageError
    from ...data.files.atomic import write_atomic
    from ...data.files.outputs import check_file, file_names
    from ...data.manifest import read_manifest
    from ..decode.align import align as alignments
    from ..decode.align import find_delay
    from ..decode.decode import decoding_loader
    from ..decode.write import check_ids, ctm_lines, is_textgrid, textgrid
    from ..model.build import resolve_device
    from ..run.load import load_run

    where = resolve_device(device)
    with telling(f"loading the model of {run}, and comparing the corpus with the features"):
        model, units, config, step = load_run(run, checkpoint)
    say_unheard(config, step)
    front = front_end(run, device, source) if features is None else None
    if features is None and front is None:
        raise UsageError("FEATURES is missing", where=corpus, remedy="stillhouse corpus features CORPUS features.h5")
    with given_features(read_manifest(corpus).select(split), features, front) as (path, chosen):
        loader = decoding_loader(chosen, path, units, trained=features_of(run))
        say_left_out(loader, "aligned")
        check_ids((u.id for u in loader.utterances), "ctm")
        names = file_names(u.id for u in loader.utterances)
        grids = {id: folder / f"{name}.TextGrid" for id, name in names.items()} if folder is not None else {}
        for grid in grids.values():
            check_file(grid, (corpus, path), own=is_textgrid, force=force)
        words = 0
        model = model.to(where)
        if delay_s is None:
            found = find_delay(model, loader, device=where)
            delay_s = found or 0.0
            told = f"The model emits units {delay_s:.2f} s after their sound (--delay {delay_s:.2f}), "
            none = "There are too few pauses to measure the model's delay (--delay 0)."
            say(none if found is None else f"{told}measured at the pauses.")
        for alignment in alignments(model, loader, device=where, delay_s=delay_s):
            words += len(alignment.words)
            if alignment.untimed:
                say(f"{alignment.id}: {alignment.untimed} words have no times, because {alignment.why}.")
            for line in ctm_lines(alignment.id, alignment.words):
                write_data(line)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(grids[alignment.id], textgrid(alignment), durable=False)
        say(f"step {step}: {words} words of {len(loader.utterances)} utterances")
