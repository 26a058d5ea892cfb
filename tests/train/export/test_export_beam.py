"""Beam search in sherpa-onnx: a model of one unit a state, hotwords, and a joiner for the copies of a state."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from tones import speak

from stillhouse.data.audio.fbank import fbank
from stillhouse.data.audio.read import read_audio
from stillhouse.data.errors import UsageError
from stillhouse.data.manifest import read_manifest
from stillhouse.data.units import Units, train_units
from stillhouse.train.config import load_config
from stillhouse.train.decode.beam import Beam
from stillhouse.train.decode.hotwords import Hotwords, read_hotwords, space_unit
from stillhouse.train.export.export import export_run
from stillhouse.train.export.graphs import JoinerGraph, SpreadJoinerGraph, search_graphs
from stillhouse.train.export.onnx import bpe_vocab
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.model.transducer import BLANK, Transducer
from stillhouse.train.run.load import load_run

from ..decode.test_beam import every_path, small_model
from .exported import LETTERS, our_text, sherpa_texts, untrained_run

ONE_UNIT = {"kind": "tdt", "durations": [1]}
LINES = ["the old mill", "a new mill by the water", "they walk"]


@torch.no_grad()
def our_beam(model: Transducer, units: Units, samples: np.ndarray, hotwords: Hotwords | None = None) -> str:
    """The best of 16 by the score per unit, as sherpa-onnx chooses, whose units begin with two blanks."""
    features = torch.from_numpy(fbank(samples))
    search = Beam(model, 1, width=16, fusion=hotwords)
    search.feed(*model.encode(features[None], torch.tensor([len(features)])))
    return units.decode(max(search.finish()[0], key=lambda e: e.score / (len(e.units) + 2)).units)


def test_a_model_of_one_unit_a_state_is_the_same_in_sherpa_onnx(tmp_path: Path) -> None:
    pytest.importorskip("sherpa_onnx")
    torch.manual_seed(1)
    run = untrained_run(tmp_path / "run", LETTERS, loss=ONE_UNIT)
    found = export_run(run, tmp_path / "onnx", "onnx")
    assert (found.symbols_per_frame, found.unfit_for_sherpa) == (1, None)
    assert "bpe.vocab" in found.files and "joiner.beam.onnx" not in found.files
    rng = np.random.default_rng(4)
    audio = [speak(text, rng) for text in ("abc dd a", "bad cab", "d")]
    texts = [our_text(load_run(run)[0], LETTERS, samples) for samples in audio]
    assert sherpa_texts(tmp_path / "onnx", audio) == texts and any(texts)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [{"kind": "tdt", "durations": [1]}, {}])
def test_beam_search_and_hotwords_of_a_trained_recogniser(tmp_path: Path, tones: Path, loss: dict[str, Any]) -> None:
    """A model of one unit in a state, and one of several over copies of its states, with and without hotwords."""
    pytest.importorskip("sherpa_onnx")
    changes = ["model.subsampling=2", "optim.steps=160", "run.eval_every=80", "run.checkpoint_every=80"]
    changes += [f"loss.{name}={value}" for name, value in loss.items()]
    Trainer(load_config(tones / "run.toml", changes), tmp_path / "run", lambda _: None).run()
    export_run(tmp_path / "run", tmp_path / "onnx", "onnx")
    model, units, *_ = load_run(tmp_path / "run")
    dev = read_manifest(tones / "corpus.jsonl").select("dev").utterances
    audio = [read_audio(tones / str(u.audio)) for u in dev]
    joiner = str(tmp_path / "onnx" / ("joiner.onnx" if loss else "joiner.beam.onnx"))
    beam = {"decoding_method": "modified_beam_search", "max_active_paths": 16, "joiner": joiner}
    ours = [our_beam(model, units, samples) for samples in audio]
    theirs = sherpa_texts(tmp_path / "onnx", audio, **beam)
    assert sum(a == b for a, b in zip(ours, theirs)) >= 11  # of 12
    assert jiwer.cer([u.text for u in dev], theirs) < 0.35

    def with_hotwords(words: list[str], score: float) -> tuple[list[str], list[str]]:
        """What our beam and sherpa-onnx hear then."""
        path = tmp_path / "hotwords.txt"
        path.write_text("".join(f"{word}\n" for word in words))
        hotwords = Hotwords(read_hotwords(path, units, score), units.size, space_unit(units))
        options = {"hotwords_file": str(path), "modeling_unit": "bpe", "hotwords_score": score}
        vocabulary = str(tmp_path / "onnx" / "bpe.vocab")
        return (
            [our_beam(model, units, samples, hotwords) for samples in audio],
            sherpa_texts(tmp_path / "onnx", audio, **beam, **options, bpe_vocab=vocabulary),
        )

    # Most words that were said and not heard are found again.
    missed = [
        {w for u, text in zip(dev, texts) for w in u.text.split() if w not in text.split()} for texts in (ours, theirs)
    ]
    lost = sorted(word for word in set.intersection(*missed) if len(word) > 1)

    def found_again(texts: list[str]) -> int:
        return sum(word in text.split() for u, text in zip(dev, texts) for word in u.text.split() if word in lost)

    spoken = sum(word in lost for u in dev for word in u.text.split())
    assert spoken >= (2 if loss else 8), missed
    for before, after in zip((ours, theirs), with_hotwords(lost, 2.0)):
        assert found_again(after) >= max(0.6 * spoken, found_again(before) + 1), (lost, before, after)
        if not loss:  # The other model has missed two words alone, and finds one of them where it was not said.
            assert jiwer.wer([u.text for u in dev], after) < jiwer.wer([u.text for u in dev], before)

    # Words that sound like the last ones, and that nobody said
    heard = {word for text in (*theirs, *ours, *(u.text for u in dev)) for word in text.split()}
    likes = {u.text[:-1] + letter for u in dev for letter in "abcd"}
    wanted = sorted({text.split()[-1] for text in likes} - heard)
    for found in with_hotwords(wanted, 4.0):
        assert sum(any(word in wanted for word in text.split()) for text in found) >= 4, (wanted, found)


def test_copies_are_for_models_of_several_units(tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "run", loss=ONE_UNIT)
    with pytest.raises(UsageError, match="this one has one at most"):
        export_run(run, tmp_path / "onnx", "onnx", symbols=2)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
def test_bpe_vocab_spells_words_as_the_units_do(kind: str) -> None:
    """By the likeliest pieces, as sherpa-onnx does, found by trying them all."""
    units = train_units(LINES, kind, size=40)
    scores = {piece: float(score) for piece, score in (line.split() for line in bpe_vocab(units).splitlines())}
    assert len(scores) == units.size - 2

    def best(text: str) -> tuple[float, list[str]]:
        found = [(0.0, [])] if not text else []
        for piece, score in scores.items():
            if text.startswith(piece):
                rest, pieces = best(text[len(piece) :])
                found.append((score + rest, [piece, *pieces]))
        return max(found, default=(-np.inf, []))

    for word in ("mill", "water", "the", "walk", "low"):
        spelled = [units.pieces[k] for k in units.encode(word).ids]
        assert best("▁" + word)[1] == (["▁"] if kind == "characters" else []) + spelled
    assert bpe_vocab(train_units(["語音識別"], "characters", transform="none")) == ""


def test_copies_have_the_probabilities_of_the_state_together() -> None:
    torch.manual_seed(0)
    encoder = {"dim": 16, "layers": 1, "heads": 2, "inner": 16, "kernel": 3}
    model = Transducer(5, encoder, predictor_dim=16, joint_dim=16).eval()
    with torch.no_grad():
        model.joint.output.weight.mul_(4.0)
        e, p = 3 * torch.randn(50, 16), 3 * torch.randn(50, 16)
        plain = JoinerGraph(model)(e, p).log_softmax(-1).double()
        for repeat in (2, 8):
            spread = SpreadJoinerGraph(model, repeat)(e, p).double()
            torch.testing.assert_close(spread.exp().sum(-1), torch.ones(50).double())
            torch.testing.assert_close(spread[:, BLANK] * repeat, plain[:, BLANK].clamp(max=-1e-6), atol=1e-5, rtol=0)
            others = [x[:, 1:].log_softmax(-1) for x in (spread, plain)]
            torch.testing.assert_close(*others, atol=1e-4, rtol=0)
        graphs = search_graphs(model, symbols=8)
        assert [graph.name for graph in graphs] == ["decoder", "joiner", "joiner.beam"]
        assert torch.isfinite(SpreadJoinerGraph(model, 8)(100 * e, 100 * p)).all()


@torch.no_grad()
def over_copies(model: Transducer, joiner: JoinerGraph, states: torch.Tensor) -> dict[tuple[int, ...], float]:
    """P of all sequences of up to four units, if each of eight copies of a state emits one of them or blank."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for state in model.joint.encoder(states):
        after = {}
        for units in itertools.chain(*(itertools.product((1, 2), repeat=n) for n in range(5))):
            predicted = model.predictor(torch.tensor([units], dtype=torch.int64).reshape(1, -1))[0, -1:]
            after[units] = joiner(state[None], model.joint.predictor(predicted))[0].softmax(-1).tolist()
        for _ in range(8):
            longer = {units: share * after[units][BLANK] for units, share in found.items()}
            for units, share in found.items():
                for unit in (1, 2) if len(units) < 4 else ():
                    longer[*units, unit] = longer.get((*units, unit), 0.0) + share * after[units][unit]
            found = longer
    return found


def test_a_search_over_copies_finds_what_the_model_does() -> None:
    model = small_model(3, sharp=3.0)
    with torch.no_grad():
        model.joint.output.bias[BLANK] += 3.0  # seldom more than two units in a state
    for seed in range(4):
        torch.manual_seed(seed)
        states = 2 * torch.randn(2, 16)
        exact = {units: np.exp(score) for units, score in every_path(model, states, 3).items()}
        spread = over_copies(model, SpreadJoinerGraph(model, 8), states)
        plain = over_copies(model, JoinerGraph(model), states)
        assert max(spread, key=spread.__getitem__) == max(exact, key=exact.__getitem__)
        wrong, before = (sum(abs(found.get(u, 0.0) - exact[u]) for u in exact) / 2 for found in (spread, plain))
        assert wrong < 0.1 and wrong < before / 5
