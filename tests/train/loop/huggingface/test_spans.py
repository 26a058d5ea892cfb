"""The characters of a transcript that each label of a Hugging Face tokenizer stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.data.errors import CorpusError
from stillhouse.train.loop.huggingface.spans import unit_spans


def pieces(tokenizer: Any, text: str, spelled: str | None = None) -> list[str]:
    """The text of each label's span, for labels of `spelled`, which is the text itself if it is None."""
    labels = tokenizer(text if spelled is None else spelled, add_special_tokens=False).input_ids
    spans = unit_spans(tokenizer, labels, text)
    assert len(spans) == len(labels) and (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 0]).all() and spans.min(initial=0) >= 0 and spans.max(initial=0) <= len(text)
    return [text[begin:end] for begin, end in spans]


def made(kind: str, texts: list[str]) -> Any:
    """A tokenizer of another kind: bytes of characters, WordPiece, Unigram with fallback to bytes, characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        it = Tokenizer(models.BPE())
        it.pre_tokenizer, it.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "wordpiece":
        it = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        it.pre_tokenizer, it.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    elif kind == "fallback":
        vocabulary = [("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz")]
        vocabulary += [(f"<0x{b:02X}>", -9.0) for b in range(256)]
        it = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
        it.pre_tokenizer = pre_tokenizers.Metaspace()
        it.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=it, unk_token="<unk>")
    it.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=it, unk_token="[UNK]" if kind == "wordpiece" else None)


def test_labels_of_the_transcript_itself(hf: SimpleNamespace) -> None:
    assert pieces(hf.tokenizer, "the bank was wet") == ["the", "bank", "w", "as", "w", "e", "t"]


def test_labels_of_a_normalised_transcript(hf: SimpleNamespace) -> None:
    found = pieces(hf.tokenizer, "“The  BANK,” WAS – wet!", "the bank was wet")
    assert found == ["The", "BANK", "W", "AS", "w", "e", "t"]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("wordpiece", "na 银行 wet", "na 银行 wet"),
        ("fallback", "é 银!", "é é _ 银 银 银 !"),
        ("fallback", "a\u0301 Ａ", "a \u0301 \u0301 _ Ａ Ａ Ａ"),
        ("bytes", "is ﬁne", "i s _ ﬁ ﬁ ﬁ n e"),
        ("bytes", "银 😀!", "银 银 银 _ 😀 😀 😀 😀 !"),
    ],
)
def test_labels_that_are_bytes_have_their_whole_character(kind: str, text: str, expected: str) -> None:
    found = pieces(made(kind, ["the bank was wet", text if kind == "wordpiece" else "it rained all day"]), text)
    if kind == "fallback":
        assert found.pop(0) == ""  # the mark in front of the first word
    assert [piece or "_" for piece in found] == expected.split()


def test_numbers_that_were_spelled_out_share_their_digits(hf: SimpleNamespace) -> None:
    tokenizer = made("wordpiece", ["he lent nineteen eighty four", "in 1984 he lent"])
    labels = tokenizer("he lent nineteen eighty four").input_ids
    text = "He lent 1984."
    spans = unit_spans(tokenizer, labels, text)
    words = tokenizer.convert_ids_to_tokens(labels)
    first = words.index(next(w for w in words if w.startswith("n")))
    assert {text[b:e] for b, e in spans[first:]} == {"1984"} or {text[b:e] for b, e in spans[first:]} == {"1984."}


def test_an_unknown_label_has_what_its_neighbours_leave(hf: SimpleNamespace) -> None:
    text = "the Ωmega bank"
    labels = hf.tokenizer("the Ω bank", add_special_tokens=False).input_ids
    assert hf.tokenizer.unk_token_id in labels
    found = pieces(hf.tokenizer, text, "the Ω bank")
    assert found[0] == "the" and found[-1] == "bank" and "Ωmega" in found


def test_labels_without_characters_and_texts_without_labels(hf: SimpleNamespace) -> None:
    assert pieces(hf.tokenizer, "") == []
    assert pieces(hf.tokenizer, "the bank", "") == []
    assert set(pieces(hf.tokenizer, "...", "the bank")) <= {"", "..."}


def test_repeated_labels_are_not_joined(hf: SimpleNamespace) -> None:
    class Slow:
        """A tokenizer without a backend whose decoder joins equal neighbours unless it is asked not to."""

        def decode(self, ids: list[int], group_tokens: bool = True, **options: Any) -> str:
            letters = [chr(i) for i in ids]
            return "".join(c for k, c in enumerate(letters) if not (group_tokens and k and letters[k - 1] == c))

    spans = unit_spans(Slow(), [ord(c) for c in "hello"], "Hello")
    assert spans.tolist() == [[k, k + 1] for k in range(5)]


def test_labels_of_another_transcript_are_refused(hf: SimpleNamespace) -> None:
    labels = hf.tokenizer("the money was wet", add_special_tokens=False).input_ids
    with pytest.raises(CorpusError, match="the labels spell 'the money was wet', but the transcript is 'It rained"):
        unit_spans(hf.tokenizer, labels, "It rained all day.")
