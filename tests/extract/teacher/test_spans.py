"""Spans of tokenizers that normalise: what is in a span, normalised, is what its token says, for any kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stillhouse.extract.teacher.tokenizer import Tokeniser

WORDS = [
    "cafe\u0301", "e\u0301te\u0301", "n\u0303a\u0308\u0323", "a\u0323\u0308", "ﬁne", "ＦＵＬＬ",
    "ｗｉｄｔｈ", "İstanbul", "ß", "Ǆ",
    "한국", "\u1112\u1161\u11ab", "你好", "ภาษา", "น้ำ", "1984", "½", "…", "x\u200dy", "\u0301a", "क़", "naïve",
    "ক\u09c7\u09be",
    "A\u030a\u0327", "ﷺ", "㎏", "the", "old", "😀", "👨\u200d👩\u200d👧", "🇩🇪", "ΐ", "\u200bz", "q\u200b", "\x07b", "ẛ̣",
]  # fmt: skip
NORMALISERS: dict[str, Any] = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "nfkd": normalizers.NFKD(),
    "lower": normalizers.Lowercase(),
    "strip accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    "nmt": normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()]),
    "bert": normalizers.BertNormalizer(),
    "bert cased": normalizers.BertNormalizer(lowercase=False),
    "metaspace": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
}


def texts() -> list[str]:
    draw = random.Random(0)
    return ["", "  ", *(" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))) for _ in range(150)), *WORDS]


def byte_level() -> tuple[Any, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer, trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def byte_fallback() -> tuple[Any, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    )


def unigram() -> tuple[Any, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer, trainers.UnigramTrainer(vocab_size=250, unk_token="<unk>", special_tokens=["<unk>"])


def wordpiece() -> tuple[Any, Any]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=250, special_tokens=["<unk>"])


def spelt(kind: Callable[[], tuple[Any, Any]], normaliser: Any) -> Tokeniser:
    tokenizer, trainer = kind()
    if normaliser is not None:
        tokenizer.normalizer = normaliser
    tokenizer.train_from_iterator(texts(), trainer)
    unknown = None if kind is byte_level else "<unk>"
    return Tokeniser(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown), "encoder")


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, unigram, wordpiece])
@pytest.mark.parametrize("name", NORMALISERS)
def test_a_span_holds_what_its_token_says(kind: Callable[[], tuple[Any, Any]], name: str) -> None:
    normaliser, tokeniser = NORMALISERS[name], spelt(kind, NORMALISERS[name])
    tokens, at, seen = tokeniser.encode(texts(), "none"), 0, 0
    assert tokens.unread is not None and not tokens.unread.any()
    for text, n in zip(texts(), tokens.length.tolist(), strict=True):
        span, pieces = tokens.span[at : at + n], tokeniser.pieces(tokens.ids[at : at + n].tolist())
        at += n
        assert (np.diff(span[:, 0]) >= 0).all() and (span[:, 0] <= span[:, 1]).all() and (span <= len(text)).all()
        covered = np.zeros(len(text), dtype=bool)
        for (a, b), piece in zip(span.tolist(), pieces, strict=True):
            covered[a:b] = True
            if kind is byte_level or piece == "<unk>" or piece.startswith("<0x"):
                continue
            said = piece.removeprefix("##").replace("▁", "").strip()
            raw = text[a:b] if normaliser is None else normaliser.normalize_str(text[a:b])
            assert said in raw, (piece, text[a:b])  # a cluster that became several tokens is the span of each
            seen += said != ""
        if n:
            left = [c for c, inside in zip(text, covered, strict=True) if not inside and not c.isspace()]
            assert not left, (text, span.tolist(), pieces)
    assert seen > 500 or kind is byte_level


def raws(tokeniser: Tokeniser, text: str) -> list[tuple[str, str]]:
    tokens = tokeniser.encode([text], "none")
    return [(p, text[a:b]) for p, (a, b) in zip(tokeniser.pieces(tokens.ids.tolist()), tokens.span.tolist())]


def test_accents_of_decomposed_text_belong_to_their_letters() -> None:
    assert [r for _, r in raws(spelt(wordpiece, NORMALISERS["nfc"]), "cafe\u0301 old")] == ["cafe\u0301", "old"]
    assert [r for _, r in raws(spelt(wordpiece, NORMALISERS["bert"]), "cafe\u0301 old")] == ["cafe\u0301", "old"]
    assert [r for _, r in raws(spelt(wordpiece, NORMALISERS["none"]), "cafe\u0301 old")] == ["cafe\u0301", "old"]


def test_an_added_space_that_is_a_token_has_no_characters() -> None:
    """Also the space that a tokenizer adds by itself. A space of the text has its character."""
    for kind in (byte_level, unigram):
        found = raws(spelt(kind, None).with_space("yes"), "🇩🇪 🇩🇪")
        assert found[0] == ({byte_level: "Ġ", unigram: "▁"}[kind], "")
        assert {r for p, r in found[1:] if p in ("Ġ", "▁")} <= {" "}
        assert "".join(dict.fromkeys(r for _, r in found if r.strip())) == "🇩🇪"


def test_characters_that_a_vocabulary_drops_are_counted() -> None:
    """A BPE without an unknown token says nothing of what it leaves out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["the old"], trainers.BpeTrainer(vocab_size=50))
    tokens = Tokeniser(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "encoder").encode(
        ["the 你好 old", "好"], "none"
    )
    assert tokens.unread is not None and tokens.unread.tolist() == [2, 1]
    assert tokens.span.max() == 10


@pytest.mark.parametrize(
    "replaced", [normalizers.Nmt(), normalizers.Sequence([normalizers.Nmt(), normalizers.Strip()])]
)
def test_a_format_sign_that_is_a_space_to_the_tokenizer_does_not_join_words(replaced: Any) -> None:
    """Normalisers of SentencePiece make spaces of them. The word behind does not begin in the word before."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "zero": 1, "▁width": 2, "▁q": 3}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = replaced, pre_tokenizers.Metaspace(prepend_scheme="never")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    found = raws(Tokeniser(fast, "encoder"), "zero\u200bwidth\ufeffq")
    assert found == [("zero", "zero"), ("▁width", "\u200bwidth"), ("▁q", "\ufeffq")]
