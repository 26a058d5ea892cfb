"""Greedy decoding of one utterance at a time, beside sherpa-onnx over the same model.

Invariant: both decode the same real utterances in turns, each once, on one thread, and their words are compared.
Run: `make bench-decode`; `python tests/bench/bench_decode.py [UTTERANCES] [LIBRISPEECH]`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, at_least, beside, rounds, write_table

from stillhouse.data.audio.fbank import fbank
from stillhouse.data.audio.read import read_audio
from stillhouse.data.units import Units
from stillhouse.train.config import Config, dump_config, load_config
from stillhouse.train.decode.greedy import greedy_search
from stillhouse.train.export.export import export_run
from stillhouse.train.model.build import build_model
from stillhouse.train.model.transducer import BLANK, Transducer
from stillhouse.train.run import checkpoint

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "bench" / "decode.md"
CORPORA = Path(os.environ.get("STILLHOUSE_CORPORA", ROOT.parent / "shared" / "corpora"))
MODELS = {"librispeech-100": 500, "conformer-s": 1000, "kathleen": 30}  # recipe and number of units
UNITS_A_STATE = 0.2  # as word pieces have
BAR = 1.0


@torch.no_grad()
def planted(config: Config, size: int, features: list[torch.Tensor]) -> Transducer:
    """A model of a recipe with random weights that emits as many units a state as a trained one."""
    model = build_model(config, size).eval()
    frames = torch.cat(features)
    model.encoder.feature_mean.copy_(frames.mean(0))
    model.encoder.feature_std.copy_(frames.std(0))
    model.joint.output.weight.mul_(8.0)
    encoded = [model.encode(x[None], torch.tensor([len(x)])) for x in features]
    states = sum(int(lengths) for _, lengths in encoded)
    low, high, first = -20.0, 60.0, float(model.joint.output.bias[BLANK])
    for _ in range(14):
        middle = (low + high) / 2
        model.joint.output.bias[BLANK] = first + middle
        count = 0
        for one in encoded:
            search = greedy_search(model, 1, max_symbols=1)
            search.feed(*one)
            count += len(search.finish()[0][0].units)
        low, high = (middle, high) if count > UNITS_A_STATE * states else (low, middle)
    return model


def peer(folder: Path, model: Transducer, config: Config, units: Units) -> Any:
    """The recogniser of sherpa-onnx for a model, with one unit in a state, so that its encoder makes no copies."""
    import sherpa_onnx

    run = folder / "run"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(dump_config(config))
    units.save(run / "units")
    state = {"model": model.state_dict(), "transfer": {"heads.0.weight": torch.zeros(3, 16)}}
    checkpoint.save(run / "checkpoints", {"step": 1, "best": {}}, state)
    export_run(run, folder / "onnx", "onnx", symbols=1)
    parts = {name: str(folder / "onnx" / f"{name}.onnx") for name in ("encoder", "decoder", "joiner")}
    tokens = str(folder / "onnx" / "tokens.txt")
    return sherpa_onnx.OfflineRecognizer.from_transducer(**parts, tokens=tokens, num_threads=1)


def compared(name: str, size: int, audio: list[np.ndarray], features: list[torch.Tensor], folder: Path) -> list[Row]:
    config = load_config(ROOT / "recipes" / f"{name}.toml", ["model.predictor=stateless"])
    units = Units("characters", "none", ["<blank>", "<unk>", "\u2581", *(chr(0x4E00 + n) for n in range(size - 3))])
    model = planted(config, size, features[:4])
    recogniser = peer(folder / name, model, config, units)
    texts: dict[str, dict[int, str]] = {"ours": {}, "theirs": {}}
    heard: dict[int, Any] = {}
    fbank_s: list[float] = []
    for number, samples in enumerate(audio):
        began = time.process_time()
        heard[number] = recogniser.create_stream()
        heard[number].accept_waveform(16_000, samples)
        fbank_s.append(time.process_time() - began)

    @torch.no_grad()
    def ours(number: int) -> None:
        rows = features[number]
        search = greedy_search(model, 1, max_symbols=1)
        search.feed(*model.encode(rows[None], torch.tensor([len(rows)])))
        texts["ours"][number] = units.decode(search.finish()[0][0].units)

    def theirs(number: int) -> None:
        recogniser.decode_stream(heard[number])
        texts["theirs"][number] = heard[number].result.text

    mine, others = rounds(ours, theirs, len(audio) - 2, time.process_time)
    # sherpa-onnx leaves out the spaces between these characters.
    same = sum("".join(text.split()) == "".join(texts["theirs"][n].split()) for n, text in texts["ours"].items())
    seconds = sum(len(x) for x in features[2:]) / 100
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    note = f"{weights:.1f} M weights, {size} units; {1e3 * sum(mine) / seconds:.1f} ms for a second of audio"
    whole = [t + f for t, f in zip(others, fbank_s[2:])]
    shown = sum(map(len, texts["ours"].values()))
    words = f"utterances with the same units, of {len(audio)}: {name}"
    return [
        at_least(f"{name}, against decoding alone", mine, others, BAR, note),
        beside(f"{name}, against decoding and fbank", mine, whole),
        Row(words, same, same, same, f"≥ {len(audio)}", same == len(audio), f"{shown} characters"),
    ]


def main(utterances: int, corpus: Path) -> None:
    torch.set_num_threads(1)
    paths = sorted(corpus.rglob("*.flac"))
    if len(paths) < utterances:
        sys.exit(f"{corpus} has {len(paths)} utterances, and {utterances} are needed")
    audio = [read_audio(path) for path in paths[:: len(paths) // utterances][:utterances]]
    features = [torch.from_numpy(fbank(samples)) for samples in audio]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for recipe, size in MODELS.items():
            rows += compared(recipe, size, audio, features, Path(name))
    seconds = [len(x) / 100 for x in features]
    remarks = [
        f"{utterances} utterances of LibriSpeech, of {min(seconds):.0f} to {max(seconds):.0f} s, each decoded once and "
        "alone, by turns, on one thread in float32. The ratio is that of CPU time, and above 1 Stillhouse is faster.",
        "",
        "The models have random weights, the sizes of the recipes and a stateless prediction network, which "
        f"sherpa-onnx needs. They emit about {UNITS_A_STATE} units in a state, and both searches take at most one.",
        "",
        "Stillhouse gets fbank that is computed before. sherpa-onnx takes audio alone, but it computes fbank when the "
        "audio comes. So the first row of a model leaves this time out, and the second counts it.",
    ]
    write_table(OUT, "Greedy decoding of one utterance at a time", "make bench-decode", rows, remarks)
    sys.exit(0 if all(row.holds for row in rows) else 1)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        int(arguments[0]) if arguments else 24,
        Path(arguments[1]) if len(arguments) > 1 else CORPORA / "librispeech-subset",
    )
