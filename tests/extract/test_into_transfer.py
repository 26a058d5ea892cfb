"""Stores of real tokenisers (wordpiece, byte-level BPE, sentencepiece) as sources of one transfer: whatever is combined
steps; words that a transform parts, merges or lengthens find their tokens; damage is found.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stores
import torch

from stillhouse.data.errors import NoStoreError, StaleError, StoreError
from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.data.text import transform
from stillhouse.data.units import train_units
from stillhouse.distill import TargetReader, Transfer
from stillhouse.distill.aligners import ALIGNERS
from stillhouse.distill.spans import overlaps, pack, word_spans
from stillhouse.distill.targets import POSITIONS
from stillhouse.distill.views import resolve_views
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store

from .conftest import loaded, sentences

TRICKY = [
    "I'M NOT O'BRIEN'S CO-OP",
    "STRASSE IST STRAßE",
    "İSTANBUL'DA İYİ",  # lower-cased it is three characters longer
    "42 SHEEP AT 3.50",
    "CAFE\u0301 NAI\u0308VE",  # decomposed
    "我喜欢猫 OK",
    "WAIT 😀 WHAT",
    "",
    "...",
]
H, W = 12, 10


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, bert: Path, gpt2: Path, llama: Path) -> SimpleNamespace:
    """A store of an encoder and a decoder with contexts, and one of another decoder: three tokenisers and widths."""
    folder = tmp_path_factory.mktemp("mixed")
    texts = [*TRICKY, *(s.upper() for s in sentences()[:3])]
    corpus = Corpus(
        folder / "c.jsonl", [Utterance(id=f"u{i}", text=t, session=f"s{i // 5}") for i, t in enumerate(texts)]
    )
    extract(folder / "a", corpus, loaded(bert), Request("bert", [1, 2], ["alone", "both:4"], "sentence_case"))
    extract(folder / "a", corpus, loaded(gpt2), Request("gpt2", [1, -1], ["alone", "past:8"], "sentence_case"))
    extract(folder / "b", corpus, loaded(llama), Request("llama", [3], ["past:8"], "lower", dtype="bfloat16"))
    units = train_units(texts, "characters")
    return SimpleNamespace(
        stores=[Store.open(folder / name) for name in "ab"],
        corpus=corpus,
        ids=[u.id for u in corpus.utterances],
        texts=texts,
        units=[units.encode(t).spans for t in texts],
    )


@pytest.mark.parametrize("position", sorted({*POSITIONS} - {"state"}))  # which, like frames, is for speech teachers
@pytest.mark.parametrize("aligner", sorted({*ALIGNERS} - {"frames"}))
def test_whatever_is_combined_steps(mixed: SimpleNamespace, aligner: str, position: str) -> None:
    """Every aligner, position, distance, mixing and number of taps, over seven views of three teachers."""
    sources = resolve_views(mixed.stores, ["bert/*/1,last", "gpt2/past:8/*", "*/past:*/last"])
    assert [len(views) for _, views in sources] == [6, 1]
    generator = torch.manual_seed(0)
    lengths = torch.randint(1, 30, (len(mixed.ids),), generator=generator)
    most = max(len(u) for u in mixed.units)
    occupancy = torch.rand(len(lengths), most, 30, generator=generator)
    predictor = torch.randn(len(lengths), most + 1, W, generator=generator)
    for mixing in ("mean", "learned", "sample"):
        reader = TargetReader(sources, position, sample=2 if mixing == "sample" else None, corpus=mixed.corpus)
        batch = reader.read(mixed.ids, mixed.texts, mixed.units, step=3)
        assert len({v.width for v in reader.views}) == len({v.teacher for v in reader.views}) == 3
        for distance in ("cosine", "l1", "smooth_l1", "mse", "contrastive"):
            for taps in (1,) if aligner == "predictor" else (1, 3):
                options = {"aligner": aligner, "distance": distance, "mixing": mixing, "taps": taps}
                transfer = Transfer(reader.views, H, embeddings=reader.embeddings, predictor_dim=W, **options)
                encoder = [torch.randn(len(lengths), 30, H, generator=generator) for _ in range(taps)]
                found = transfer(encoder, lengths, batch, occupancy, predictor)
                found.loss.backward()
                assert found.loss.isfinite() and len(found.per_view) == len(batch.targets), options
                assert all(p.grad is not None and p.grad.isfinite().all() for p in transfer.parameters()), options
                drawn = [bool(head.weight.grad.any()) for head in transfer.heads]
                assert drawn == [view.address in batch.targets for view in reader.views], options


def test_codes_of_a_store_are_learned_or_decoded(mixed: SimpleNamespace, bert: Path, tmp_path: Path) -> None:
    """A pq store gives the codes to the distance `codes`, and decoded standardised states to the others."""
    request = Request("bert", [1], ["both:4"], "sentence_case", dtype="pq:4")
    extract(tmp_path / "s", mixed.corpus, loaded(bert), request)
    store = Store.open(tmp_path / "s")
    sources, lengths = [(store, store.views)], torch.full((len(mixed.ids),), 30)
    encoder = torch.randn(len(mixed.ids), 30, H, generator=torch.manual_seed(0))
    occupancy = torch.rand(len(mixed.ids), max(len(u) for u in mixed.units), 30)
    got = {}
    for distance in ("codes", "mse"):
        reader = TargetReader(sources, "token", codes=distance == "codes", corpus=mixed.corpus)
        batch = reader.read(mixed.ids, mixed.texts, mixed.units)
        transfer = Transfer(reader.views, H, aligner="occupancy", distance=distance)
        found = transfer(encoder, lengths, batch, occupancy)
        found.loss.backward()
        assert found.loss.isfinite() and all(p.grad is not None for p in transfer.parameters())
        got[distance] = batch.targets[store.views[0].address]
    codes, states = got["codes"][:, 0].long(), got["mse"]
    book = torch.from_numpy(store.codebooks(store.views[0]))
    decoded = torch.cat([book[m, codes[:, m]] for m in range(4)], 1)
    torch.testing.assert_close(decoded, states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lower", "upper", "sentence_case", "nfd", "nfkc", "casefold+no_punct+squeeze"])
@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_a_word_has_the_tokens_that_spell_it(which: str, name: str, request: pytest.FixtureRequest) -> None:
    """The pieces whose weight for a word is not 0 spell the transformed word, whatever the transform has done to it;
    their weights are the shares of the raw word's characters.
    """
    tokeniser = loaded(request.getfixturevalue(which)).tokeniser
    tokens = tokeniser.encode(TRICKY, name)
    words, word_lengths = pack([word_spans(t) for t in TRICKY])
    found = overlaps(words, word_lengths, tokens.span, tokens.length)
    assert found.covered.all() and np.allclose(found.dense().sum(1), 1)
    pieces = tokeniser.pieces(tokens.ids.tolist())
    row = 0
    for text, count in zip(TRICKY, word_lengths.tolist(), strict=True):
        mapped = transform(text, name)
        for begin, end in words[row : row + count].tolist():
            of = slice(int(found.start[row]), int(found.start[row + 1]))
            said = spelled([pieces[k] for k in found.column[of]], which)
            inside = [k for k, (a, b) in enumerate(mapped.source.tolist()) if a < end and b > begin]
            assert said.replace(" ", "") == "".join(mapped.text[k] for k in inside).replace(" ", ""), (text, said)
            shared = [min(end, b) - max(begin, a) for a, b in tokens.span[found.column[of]].tolist()]
            np.testing.assert_allclose(found.weight[of], np.array(shared) / sum(shared), rtol=1e-6)
            row += 1


def spelled(pieces: list[str], which: str) -> str:
    if which == "llama":  # <0x41>: a byte of what has no piece
        parts = [bytes([int(p[3:5], 16)]) if re.fullmatch("<0x..>", p) else p.encode() for p in pieces]
        return b"".join(parts).decode().replace("▁", " ")
    # The printable stand-ins of byte-level BPE, back to bytes (GPT-2's table)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    byte = {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(other)}
    return bytes(byte[c] for c in "".join(pieces)).decode()


def test_positions_are_those_of_the_transcript_whatever_the_tokeniser(mixed: SimpleNamespace) -> None:
    """Three tokenisers, one grid of words: rows, keys and places agree where all of them cover a word."""
    reader = TargetReader(resolve_views(mixed.stores, ["*/*/last"]), "word")
    batch = reader.read(mixed.ids, mixed.texts)
    grids = [{r: k for r, k in zip(p.row.tolist(), p.key.tolist())} for p in batch.positions.values()]
    assert all(p.lengths.tolist() == [len(word_spans(t)) for t in mixed.texts] for p in batch.positions.values())
    assert grids[0] == grids[1] == grids[2] and batch.positions["bert"].masked == 0


@pytest.mark.parametrize("which", ["bert", "gpt2"])
def test_missing_stale_and_damaged_are_named_or_counted(
    mixed: SimpleNamespace, bert: Path, gpt2: Path, which: str, tmp_path: Path
) -> None:
    corpus = Corpus(mixed.corpus.path, mixed.corpus.utterances[:8])
    teacher = loaded(bert if which == "bert" else gpt2)
    extract(tmp_path / "s", corpus, teacher, Request(which, [2], ["alone"], "sentence_case"))
    store = Store.open(tmp_path / "s", checksums=True)
    ids, texts = mixed.ids[:8], list(mixed.texts[:8])
    reader = TargetReader([(store, store.views)], "word")
    skipping = TargetReader([(store, store.views)], "word", "skip")
    assert skipping.read(ids, texts).skipped == 0
    with pytest.raises(NoStoreError, match="u9"):
        reader.read([*ids, "u9"], [*texts, "A"])
    assert skipping.read([*ids, "u9"], [*texts, "A"]).skipped == 1
    with pytest.raises(StaleError, match="u3"):
        reader.read(ids, [*texts[:3], "43 SHEEP AT 3.50", *texts[4:]])
    assert skipping.read(ids, [*texts[:3], "43 SHEEP AT 3.50", *texts[4:]]).skipped == 1
    stores.flip(tmp_path / "s", store.gather(["u1"], store.views).states[store.views[0]].tobytes())
    store = Store.open(tmp_path / "s", checksums=True)
    with pytest.raises(StoreError, match="u1"):
        TargetReader([(store, store.views)], "word").read(ids, texts)
    left = TargetReader([(store, store.views)], "word", "skip").read(ids, texts)
    assert left.skipped == 1 and left.positions[which].lengths[1] == 0 < left.positions[which].lengths[0]
