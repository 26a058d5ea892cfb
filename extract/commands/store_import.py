"""`stillhouse store` and `stillhouse store import`: states that another program has saved.

Guarantees: an interrupted import leaves a store that the same command resumes.
Try: `stillhouse store import --help`.
"""

from __future__ import annotations

import json
from typing import Any

import click

from . import options as opt
from .extract import default_name, parse_layers, progress_line, render

_FROM = "A folder with one file per utterance, or one .h5, .npz or .safetensors file."
_DEPTH = "Number of the model's last layer, if there is no --teacher. Default: the last of --layers."


@click.group(epilog="STORE is a folder that stillhouse extract wrote. Exit codes: 10 no store, 11 locked, 12 stale.")
def store() -> None:
    """Import states into stores, and delete from, copy, subset and merge them."""


@store.command(
    "import",
    epilog="Example: stillhouse store import corpus.jsonl corpus.zarr --from dump --file '{id}.npy' "
    "--teacher all-MiniLM-L6-v2 --layers 6 --drop 1,1",
)
@click.argument("corpus", type=opt.EXISTING)
@click.argument("store", type=opt.STORE)
@click.option("--from", "source", required=True, type=opt.PATH, help=_FROM)
@click.option("--file", help="File of an utterance in the folder, as in {split}/{id}.npz. Default: {id}.npy.")
@click.option("--key", help="Array in the file, as in layer_{layer}. Default: the only one, or {id} in a single file.")
@click.option("--map", "names", type=opt.EXISTING, help="TSV of utterance ids and their {id}.")
@click.option("--layers", required=True, callback=parse_layers, help="Layers of the files in their order, as in 0,3,6.")
@click.option("--layer-axis", type=int, help="Axis of layers in an array of all layers. Default: an array per layer.")
@click.option("--drop", default="0,0", show_default=True, help="Special tokens at begin and end of an array to drop.")
@click.option("--context", default="alone", show_default=True, help="Context of the states, as in stillhouse extract.")
@click.option("--teacher", help="Model that made the states: a folder, or a name on the Hugging Face hub.")
@click.option("--tokenizer", help="Tokenizer of a model that is lost. Input embeddings are then NaN.")
@click.option("--token-ids", help="Array of an utterance's token ids, if the tokenizer is lost too. Needs --spans.")
@click.option("--spans", help="Array [tokens, 2] of code points in the transcript.")
@opt.choice("--kind", ["encoder", "decoder"], "Kind of the model, if there is no --teacher.")
@click.option("--depth", type=click.IntRange(min=0), help=_DEPTH)
@opt.name_option
@opt.transform_option
@opt.dtype_option
@opt.split_option
@opt.outcome_option
def import_(**options: Any) -> None:
    """Import states that another program has saved into STORE.

    It reads .npy, .npz, .h5 and .safetensors files, and no pickles (.pt, .pkl). Each utterance must have as many states
    as tokens. The same command resumes after an interruption.
    """
    from dataclasses import replace

    from ...data.errors import UsageError
    from ...data.files.outputs import refuse_input
    from ...data.manifest import read_manifest
    from ..maintain.import_states import ImportCache, import_states, read_names
    from ..pipeline.request import Request
    from ..store.storage import check_place

    check_place(options["store"])
    refuse_input(options["store"], [options["source"]])
    sources = [n for n in ("teacher", "tokenizer", "token_ids") if options[n]]
    if len(sources) != 1 or bool(options["token_ids"]) != bool(options["spans"]):
        expected = "--teacher, or --tokenizer, or --token-ids with --spans"
        raise UsageError("the source of the tokens is not given", expected=expected)
    begin, comma, end = options["drop"].partition(",")
    if not (comma and begin.isdigit() and end.isdigit()):
        raise UsageError(f"--drop {options['drop']}", expected="two numbers, as in 1,1")
    names = read_names(options["names"]) if options["names"] else {}
    places = {key: options[key] for key in ("source", "layers", "file", "key", "layer_axis")}
    cache = ImportCache(**places, drop=(int(begin), int(end)), names=names)
    corpus = read_manifest(options["corpus"]).select(options["split"])
    source = options["teacher"] or options["tokenizer"] or str(options["source"])
    if options["teacher"]:
        from ..teacher.model import load_teacher

        teacher: Any = load_teacher(source, device="cpu")
        cache = replace(cache, layers=[k if k >= 0 else teacher.depth + 1 + k for k in cache.layers])
    else:
        teacher = _unknown_teacher(options, cache, corpus, source)
    name, contexts = options["name"] or default_name(source), [options["context"]]
    request = Request(name, cache.layers, contexts, options["transform"], dtype=options["dtype"])
    summary = import_states(options["store"], corpus, cache, teacher, request, opt.progress(progress_line))
    click.echo(json.dumps(summary.as_json(), indent=1) if options["as_json"] else render(summary))


def _unknown_teacher(options: dict[str, Any], cache: Any, corpus: Any, source: str) -> Any:
    """A teacher without its model: a tokenizer or given tokens, and the width of the first utterance's states."""
    from ...data.errors import UsageError
    from ..maintain.import_states import GivenTokens, UnknownTeacher

    if options["tokenizer"]:
        from transformers import AutoTokenizer

        from ..teacher.tokenizer import Tokeniser

        tokeniser: Any = Tokeniser(AutoTokenizer.from_pretrained(options["tokenizer"]), options["kind"])
    else:
        tokeniser = GivenTokens(cache, corpus, options["token_ids"], options["spans"])
    first = next((u for u in corpus.utterances if u.text.strip()), None)
    if first is None:
        raise UsageError("no utterance has any text", where=options["corpus"])
    width = next(iter(cache.states(first, cache.layers).values())).shape[1]
    depth = max(cache.layers) if options["depth"] is None else options["depth"]
    return UnknownTeacher(tokeniser, source, width, depth, options["kind"])
