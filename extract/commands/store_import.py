"""`stillhouse store`: what is done with whole stores.

Invariant: a command either does all of what it says or leaves the store as it was, and the same command goes on.
Run: `stillhouse store --help`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .extract import default_name, parse_layers, progress_lines, render


@click.group(epilog="STORE is a folder that stillhouse extract wrote. Exit codes: 10 no store, 11 locked, 12 stale.")
def store() -> None:
    """Import into stores, take out of them, clear, cut, copy and merge them."""


@store.command(
    "import",
    epilog="Example: stillhouse store import corpus.jsonl corpus.zarr --from dump --file '{id}.npy' "
    "--teacher all-MiniLM-L6-v2 --layers 6 --drop 1,1",
)
@click.argument("corpus", type=click.Path(exists=True, path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--from", "source", required=True, type=click.Path(path_type=Path),
    help="A folder with a file an utterance, or one .h5, .npz or .safetensors.",
)  # fmt: skip
@click.option("--file", help="An utterance's file in the folder, as in {split}/{id}.npz. Default: {id}.npy.")
@click.option("--key", help="Its array in the file, as in layer_{layer}. Default: the only one; {id} in one file.")
@click.option("--map", "names", type=click.Path(exists=True, path_type=Path), help="TSV: utterance id, what {id} is.")
@click.option("--layers", required=True, callback=parse_layers, help="The cache's layers in its order, as in 0,3,6.")
@click.option("--layer-axis", type=int, help="The axis of an array that holds all layers. Default: an array a layer.")
@click.option("--drop", default="0,0", show_default=True, help="Special tokens at begin and end of the arrays.")
@click.option("--context", default="alone", show_default=True, help="What the states saw, as `extract` says it.")
@click.option("--teacher", help="The model that made them: a folder, or a name on the Hugging Face hub.")
@click.option("--tokenizer", help="Where the model is gone: its tokenizer. Input embeddings will be NaN.")
@click.option("--token-ids", help="Where that is gone, too: the array of an utterance's token ids, with --spans.")
@click.option("--spans", help="Array [tokens, 2] of code points of the transcript.")
@click.option("--kind", default="encoder", show_default=True, type=click.Choice(["encoder", "decoder"]),
              help="Without --teacher: what it was.")  # fmt: skip
@click.option("--depth", type=click.IntRange(min=0), help="Without --teacher: its last layer. Default: of --layers.")
@click.option("--name", help="What the store calls the teacher. Default: the last part of the model's name.")
@click.option("--transform", default="none", show_default=True, help="Text transforms that the states were made with.")
@click.option("--dtype", default="float16", show_default=True,
              type=click.Choice(["float16", "bfloat16", "float32", "int8"]), help="Of the stored states.")  # fmt: skip
@click.option("--split", help="Only these splits of the corpus, as in train,dev.")
@click.option("--json", "as_json", is_flag=True, help="The outcome as JSON.")
def import_(**options: Any) -> None:
    """Bring states that another program has cached, an utterance a file or a dataset, into STORE.

    .npy, .npz, .h5 and .safetensors are read; pickles (.pt, .pkl) are not. The number of states of each utterance must
    be that of its tokens. Interrupted, the same command goes on.
    """
    from dataclasses import replace

    from ...data.errors import UsageError
    from ...data.manifest import read_manifest
    from ..maintain.import_states import GivenTokens, ImportCache, UnknownTeacher, import_states, read_names
    from ..pipeline.request import Request

    given = [n for n in ("teacher", "tokenizer", "token_ids") if options[n]]
    if len(given) != 1 or bool(options["token_ids"]) != bool(options["spans"]):
        raise UsageError("what made the tokens?", expected="--teacher, or --tokenizer, or --token-ids with --spans")
    begin, comma, end = options["drop"].partition(",")
    if not (comma and begin.isdigit() and end.isdigit()):
        raise UsageError(f"--drop {options['drop']}", expected="two numbers, as in 1,1")
    names = read_names(options["names"]) if options["names"] else {}
    layers, corpus = options["layers"], read_manifest(options["corpus"]).select(options["split"])
    cache = ImportCache(
        options["source"], layers, options["file"], options["key"], options["layer_axis"], (int(begin), int(end)), names
    )
    if options["teacher"]:
        from ..teacher.model import load_teacher

        teacher: Any = load_teacher(options["teacher"], device="cpu")
        layers = [k if k >= 0 else teacher.depth + 1 + k for k in layers]
        cache = replace(cache, layers=layers)
    else:
        if options["tokenizer"]:
            from transformers import AutoTokenizer

            from ..teacher.tokenizer import Tokeniser

            tokeniser: Any = Tokeniser(AutoTokenizer.from_pretrained(options["tokenizer"]), options["kind"])
        else:
            tokeniser = GivenTokens(cache, corpus, options["token_ids"], options["spans"])
        first = next((u for u in corpus.utterances if u.text.strip()), None)
        if first is None:
            raise UsageError("no utterance has any text", where=options["corpus"])
        width = next(iter(cache.states(first, layers).values())).shape[1]
        source = options["tokenizer"] or str(options["source"])
        depth = max(layers) if options["depth"] is None else options["depth"]
        teacher = UnknownTeacher(tokeniser, source, width, depth, options["kind"])
    request = Request(
        options["name"] or default_name(options["teacher"] or options["tokenizer"] or str(options["source"])),
        layers,
        [options["context"]],
        options["transform"],
        dtype=options["dtype"],
    )
    summary = import_states(options["store"], corpus, cache, teacher, request, progress_lines())
    click.echo(json.dumps(summary.as_json(), indent=1) if options["as_json"] else render(summary))
