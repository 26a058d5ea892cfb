"""Marks that are no words, and differences that nobody sees, are named with their counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.corpus.check import Finding, check_corpus
from stillhouse.data.manifest import Utterance, write_manifest
from stillhouse.data.text import transform
from stillhouse.data.units import load_units, train_units


def found(tmp_path: Path, *texts: str) -> dict[str, Finding]:
    write_manifest(tmp_path / "c.jsonl", [Utterance(id=f"u{k}", text=text) for k, text in enumerate(texts)])
    findings = check_corpus(tmp_path / "c.jsonl").findings
    assert all(f.what and f.remedy and f.line for f in findings)
    return {f"{f.kind} {f.what}": f for f in findings}


MARKS = ("<unk>", "<NOISE>", "[noise]", "[[cough]]", "(laughter)", "((unclear))", "{um}", "%hes", "++breath++", "!SIL")


@pytest.mark.parametrize("mark", [*MARKS, "[background noise]", "*laughs*"])
def test_marks_are_named(tmp_path: Path, mark: str) -> None:
    ((what, finding),) = found(tmp_path, "hello", f"oh {mark} no {mark}", f"{mark} yes").items()
    assert finding.kind == "mark" and (finding.line, finding.id) == (2, "u1")
    assert "3 marks" in what and "in 2 transcripts" in what and f"{mark!r} (3)" in what
    assert "--marks drop" in finding.remedy
    assert transform(f"oh {mark} no", "drop_marks+squeeze").text == "oh no"


def test_plain_texts_have_no_marks(tmp_path: Path) -> None:
    plain = ("50% of it, or 3 < 4", "well (he said so at last) no", "a + b", "c++ and c#", "wow! OK", "5 * 3 * 2")
    assert found(tmp_path, *plain, "naïve café", "привет", "\u3000日本", "می\u200cخواهم") == {}


@pytest.mark.parametrize(
    "text, kind, words",
    [
        ("zero\u200bwidth", "invisible", "U+200B"),
        ("no\u00a0break", "invisible", "U+00A0 (NO-BREAK SPACE)"),
        ("soft\u00adhyphen", "invisible", "U+00AD"),
        ("c\u0430t", "script", "'c\u0430t' (1)"),
    ],
)
def test_what_nobody_sees_is_named(tmp_path: Path, text: str, kind: str, words: str) -> None:
    ((what, finding),) = found(tmp_path, "plain", text).items()
    assert finding.kind == kind and finding.line == 2 and words in what


def test_two_spellings_of_one_word(tmp_path: Path) -> None:
    ((what, finding),) = found(tmp_path, "caf\u00e9", "cafe\u0301 noir").items()
    assert finding.kind == "unicode" and finding.line == 2 and "c.jsonl:1" in what and "nfc" in finding.remedy
    assert found(tmp_path, "cafe\u0301 noir", "plain") == {}


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
def test_marks_are_dropped_or_kept_as_units(tmp_path: Path, kind: str) -> None:
    texts = ["Hello <unk> world", "so [noise] long<noise>", "the fish and the world", "[noise]"] * 3
    write_manifest(tmp_path / "c.jsonl", [Utterance(id=f"u{k}", text=text) for k, text in enumerate(texts)])

    def learn(*options: str) -> tuple[str, list[str]]:
        words = [
            "corpus",
            "tokenizer",
            str(tmp_path / "c.jsonl"),
            str(tmp_path / "units"),
            "--kind",
            kind,
            "--size",
            "60",
        ]
        result = CliRunner().invoke(cli, [*words, *options], catch_exceptions=False)
        assert result.exit_code == 0
        units = load_units(tmp_path / "units")
        return result.stderr, [units.decode(units.encode(text).ids) for text in texts[:4]]

    said, decoded = learn()
    assert "3 marks" in said and "--marks keep" in said and decoded[0] == "hello unk world"
    said, decoded = learn("--marks", "drop")
    assert "3 marks" not in said and decoded == ["hello world", "so long", "the fish and the world", ""]
    said, decoded = learn("--marks", "keep")
    assert decoded == ["hello <unk> world", "so [noise] long <noise>", "the fish and the world", "[noise]"]
    assert "transcripts hold" not in said
    write_manifest(tmp_path / "c.jsonl", [Utterance(id="a", text="so [loud noise] long [noise] the fish")])
    said, _ = learn("--marks", "keep")
    assert "1 marks that become words or symbols: [loud noise]. --marks drop" in said


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
def test_a_mark_is_one_unit_with_its_place(kind: str) -> None:
    text = "So,  [Noise]long <unk>"
    units = train_units([text, "so long and long"], kind, 40, marks=["[Noise]", "<unk>"])
    encoded = units.encode(text)
    spans = {units.pieces[k]: text[begin:end] for k, (begin, end) in zip(encoded.ids, encoded.spans, strict=True)}
    assert spans["[Noise]"] == "[Noise]" and spans["<unk>"] == "<unk>"
    starts = encoded.spans[:, 0].tolist()
    assert starts == sorted(starts) and encoded.spans.min() >= 0 and encoded.spans.max() <= len(text)
    assert units.decode(encoded.ids) == "so [Noise] long <unk>"
    assert units.fingerprint != train_units([text, "so long and long"], kind, 40).fingerprint
