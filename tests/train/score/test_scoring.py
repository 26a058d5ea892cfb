"""What is scored depends on the words of the files, never on their formats, and nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import CorpusError, StillhouseError, UsageError
from stillhouse.data.manifest import Utterance, write_manifest
from stillhouse.train.decode.decode import Hypothesis, ScoredText
from stillhouse.train.decode.emissions import Word
from stillhouse.train.decode.write import FORMATS, hypothesis_lines
from stillhouse.train.score.networks import HESITATION, best_reading, parse_network
from stillhouse.train.score.scoring import Scoring

# Their hypotheses are those of a recogniser of lower-case words.
TEXTS = {"u1": "Hello, world again.", "u2": "Good morning!", "u3": "", "u4": "So long, and thanks for the fish."}
HEARD = {"u1": "hello word again", "u2": "good morning", "u3": ""}


def corpus(tmp_path: Path, texts: dict[str, str] = TEXTS, **fields: dict[str, Any]) -> Path:
    path = tmp_path / "corpus.jsonl"
    write_manifest(path, [Utterance(id=id, text=text, **fields.get(id, {})) for id, text in texts.items()])
    return path


def written(tmp_path: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    return path


def score(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["score", *map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def errors(facts: dict[str, Any]) -> tuple[int, int, int, int]:
    return tuple(facts["wer"][name] for name in ("substitutions", "deletions", "insertions", "reference"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_decode_has_one_score_whatever_its_format(tmp_path: Path, kind: str) -> None:
    lines = []
    for id, text in HEARD.items():
        words = [Word(w, 0.1 * k, 0.1 * k + 0.05, 0.9) for k, w in enumerate(text.split())]
        spelled = TEXTS[id].lower().strip(".!").replace(",", "")  # as decode writes a reference
        lines += hypothesis_lines(Hypothesis(id, text, spelled, [ScoredText(text, -1.0, -1.0, 0.0, words)]), kind)
    hyp = written(tmp_path, f"hyp.{kind}", "\n".join(lines) + "\n")
    facts = score(hyp, "--corpus", corpus(tmp_path))
    # u4 has no hypothesis: seven deletions.
    assert errors(facts) == (1, 7, 0, 12)
    assert facts["transform"] == "lower+no_punct+squeeze"
    assert (facts["missing"], facts["missing_ids"]) == (1, ["u4"])
    assert "count as deleted: u4" in facts["notes"][0] and "--transform none" in facts["notes"][1]
    allowed = score(hyp, "--corpus", tmp_path / "corpus.jsonl", "--allow-missing")
    assert errors(allowed) == (1, 0, 0, 5) and allowed["missing"] == 1
    assert "are left out: u4" in allowed["notes"][0]
    assert errors(score(hyp, "--corpus", tmp_path / "corpus.jsonl", "--transform", "none"))[0] == 5
    if kind == "jsonl":
        assert errors(score(hyp)) == (1, 0, 0, 5)


def test_the_transform_of_a_run(tmp_path: Path) -> None:
    from stillhouse.data.units import train_units

    train_units(["hello world"], "characters", transform="lower+no_punct+squeeze").save(tmp_path / "run" / "units")
    hyp = written(tmp_path, "h.trn", "hello world again (u1)\n")
    facts = score(hyp, "--corpus", corpus(tmp_path), "--transform", tmp_path / "run", "--allow-missing")
    assert errors(facts) == (0, 0, 0, 3) and facts["transform"] == "lower+no_punct+squeeze"


def test_splits_that_were_not_decoded_are_not_missing(tmp_path: Path) -> None:
    texts = {"a": "one two", "b": "three", "c": "four five six"}
    path = corpus(tmp_path, texts, a={"split": "test"}, b={"split": "test"}, c={"split": "train"})
    hyp = written(tmp_path, "h.trn", "one two (a)\n")
    facts = score(hyp, "--corpus", path)
    assert errors(facts) == (0, 1, 0, 3) and facts["missing_ids"] == ["b"]
    assert errors(score(hyp, "--corpus", path, "--split", "test,train")) == (0, 4, 0, 6)
    both = written(tmp_path, "b.trn", "one two (a)\nfour five six (c)\n")
    facts = score(both, "--corpus", path, "--split", "train")
    assert errors(facts) == (0, 0, 0, 3) and "1 hypotheses of other splits are left out" in facts["notes"]


def test_errors_name_their_lines(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    twice = written(tmp_path, "t.trn", ";; made by hand\na (u1)\nb (u2)\nc (u1)\n")
    with pytest.raises(CorpusError, match=r"t\.trn:4: this is a second hypothesis of 'u1', after that of .*t\.trn:2"):
        score(twice, "--corpus", path)
    unknown = written(tmp_path, "u.trn", "a (u1)\nb (x)\nc (y)\n")
    with pytest.raises(CorpusError, match=r"u\.trn:2: the corpus has no utterance 'x', and 1 more") as e:
        score(unknown, "--corpus", path)
    assert "for example u1" in str(e.value)
    with pytest.raises(CorpusError, match="no reference has a word"):
        score(written(tmp_path, "e.jsonl", '{"id": "a", "hyp": "x", "ref": ""}\n'))
    channels = written(tmp_path, "c.ctm", "u1 A 0 1 hello\nu1 B 0 1 world\n")
    with pytest.raises(CorpusError, match="two channels"):
        score(channels, "--corpus", path)


def test_comments_and_alternatives_of_trn(tmp_path: Path) -> None:
    path = corpus(tmp_path, {"u1": "hello world again", "u2": "good morning"})
    odd = written(tmp_path, "odd.trn", ";; made by us\nhello {world / word} again (u1)\ngood (%hes) morning (u2)\n")
    assert errors(score(odd, "--corpus", path)) == (0, 0, 0, 5)
    reference = written(tmp_path, "ref.trn", "{ i am / i'm / @ } { going to / gonna } go (uh) now (a)\n")
    for text, expected in (
        # An absent "uh" is right, so that it counts among the reference words, as sclite 2.4.10 -D says.
        ("i'm gonna go now", (0, 0, 0, 5)),
        ("i am going to go uh now", (0, 0, 0, 7)),
        ("gonna go now", (0, 0, 0, 4)),
        ("i'm gone go now", (1, 0, 0, 5)),
    ):
        assert errors(score(written(tmp_path, "h.trn", f"{text} (a)\n"), "--reference", reference)) == expected
    one, two = written(tmp_path, "1.trn", "i am gonna go now (a)\n"), written(tmp_path, "2.trn", "gone go now (a)\n")
    facts = score(one, "--reference", reference, "--against", two)
    assert facts["comparison"]["better"] == 1 and facts["comparison"]["stretches"] == 1


@pytest.mark.parametrize(
    "reference, hypothesis, chosen",
    [
        ("a { b { c / d } / e } f", "a b d f", ("a b d f", "a b d f")),
        ("a {b/c} d", "a c d", ("a c d", "a c d")),
        ("a {um} b", "a b", ("a {um} b", "a b")),  # no alternatives: words as they are
        ("a { b / c", "a b", ("a { b / c", "a b")),
        ("{ a / b }", "{ b / c }", ("b", "b")),
        # As sclite 2.4.10 -D scores them: absent words are right, and a word in their place is substituted.
        ("(uh) a", "a", ("uh a", "uh a")),
        ("the (uh) (um) cat", "the er cat", ("the uh um cat", "the uh er cat")),
        ("(%hes)", "foo", ("%hes", "foo")),
        ("a (b c) d", "a d", ("a (b c) d", "a d")),
        ("the { um / @ } cat @", "the cat", ("the cat", "the cat")),
        ("the cat", "@ the (%hes)", ("the cat", "the")),
        ("me @ home", "me @ home", ("me @ home", "me @ home")),
        ("a", "(%hes) a (b)", ("a", "a (b)")),
        ("", "", ("", "")),
    ],
)
def test_readings_by_hand(reference: str, hypothesis: str, chosen: tuple[str, str]) -> None:
    assert best_reading(parse_network(reference), parse_network(hypothesis, optional=HESITATION)) == chosen


def test_ctm_in_any_order_with_alternatives(tmp_path: Path) -> None:
    path = corpus(tmp_path, {"u1": "hello world again", "u2": "oh no"})
    lines = [
        ";; a comment",
        "u1 1 0.50 0.5 world 0.9",
        "u2 1 * * <ALT_BEGIN>",
        "u2 1 0.1 0.2 uh",
        "u2 1 * * <ALT>",
        "u2 1 0.1 0.2 oh NA",
        "u2 1 * * <ALT_END>",
        "u1 1 0.0 0.5 hello 0.9",
        "u2 1 0.4 0.2 no 1.0 lex spk1",
        "u1 1 1.0 0.3 again 1.0",
    ]
    assert errors(score(written(tmp_path, "h.ctm", "\n".join(lines)), "--corpus", path)) == (0, 0, 0, 5)
    cut = written(tmp_path, "cut.ctm", "\n".join(lines[:5]))
    with pytest.raises(CorpusError, match="alternatives without an end"):
        score(cut, "--corpus", path)
    with pytest.raises(CorpusError, match=r"w\.ctm:1: <ALT> in the wrong place"):
        score(written(tmp_path, "w.ctm", "u2 1 * * <ALT>\n"), "--corpus", path)


STM = """;; comment
r1 A spk1 0.0 2.0 <o,f0,male> hello world
r1 A inter_segment_gap 2.0 3.0 <o,,> ignore_time_segment_in_scoring
r1 A spk1 3.0 5.0 { good / god } morning
r1 A spk1 5.0 6.0 IGNORE_TIME_SEGMENT_IN_SCORING
r1 A spk2 7.0 8.0 bye
"""


def test_stm_by_times(tmp_path: Path) -> None:
    stm = written(tmp_path, "ref.stm", STM)
    ctm = "r1 1 3.1 0.5 god\nr1 1 0.1 0.5 hello\nr1 1 1.9 0.4 cough\nr1 1 0.7 0.5 word\nr1 1 3.7 0.5 morning\n"
    ctm += "r1 1 5.2 0.2 mumble\nr1 1 6.2 0.2 um\nr1 1 7.2 0.2 bye\n"
    facts = score(written(tmp_path, "h.ctm", ctm), "--reference", stm)
    # "cough" and "mumble" are in times that do not count. "um" is between two references and counts in the next one.
    assert errors(facts) == (1, 0, 1, 5) and facts["utterances"] == 3
    assert any("2 words are in times that do not count" in note for note in facts["notes"])
    assert any("1 words are outside" in note for note in facts["notes"])
    whole = written(tmp_path, "h.txt", "r1 hello world good morning bye\n")
    with pytest.raises(CorpusError, match="its words have no times"):
        score(whole, "--reference", stm)
    two = written(tmp_path, "two.stm", "r1 A s 0 2 hello\nr1 B s 0 2 bye\n")
    heard = written(tmp_path, "two.ctm", "r1 B 0.1 1 bye\nr1 A 0.1 1 hello\n")
    assert errors(score(heard, "--reference", two)) == (0, 0, 0, 2)
    with pytest.raises(CorpusError, match=r"no channel 1 \(expected one of A, B\)"):
        score(written(tmp_path, "one.ctm", "r1 1 0.1 1 bye\n"), "--reference", two)
    sides = written(tmp_path, "sides.ctm", "r1 2 0.1 1 bye\nr1 1 0.1 1 hello\n")
    assert errors(score(sides, "--reference", two)) == (0, 0, 0, 2)
    labels = written(tmp_path, "labels.stm", "r1 A s 0 2 <NA> hello world\nr1 A s 3 8 <unk> bye\n")
    heard_all = written(tmp_path, "all.ctm", "r1 1 0.1 1 hello\nr1 1 1.1 0.5 world\nr1 1 3.1 1 bye\n")
    assert errors(score(heard_all, "--reference", labels)) == (0, 0, 0, 3)  # sclite takes each <…> there for a label
    with pytest.raises(CorpusError, match=r"bad\.stm:1: this is not a line of stm"):
        score(heard, "--reference", written(tmp_path, "bad.stm", "r1 A s 2 1 hello\n"))


def test_ctm_of_recordings_against_a_manifest(tmp_path: Path) -> None:
    fields = {"a": {"session": "r1", "start_s": 0.0, "duration_s": 2.0}}
    fields["b"] = {"session": "r1", "start_s": 2.0, "duration_s": 2.0}
    path = corpus(tmp_path, {"a": "one two", "b": "three"}, **fields)
    ctm = written(tmp_path, "h.ctm", "r1 1 2.5 0.5 three\nr1 1 0.2 0.5 one\nr1 1 1.4 0.9 two\n")
    facts = score(ctm, "--corpus", path)
    assert errors(facts) == (0, 0, 0, 3) and facts["missing"] == 0
    assert "by their times" in facts["notes"][0]


def test_ctm_of_the_sides_of_a_call_against_a_manifest(tmp_path: Path) -> None:
    side: dict = {"audio": "call.wav", "session": "call", "duration_s": 2.0}
    fields = {"a": {**side, "channel": 0}, "b": {**side, "channel": 1, "start_s": 1.0}}
    path = corpus(tmp_path, {"a": "hello there", "b": "hi"}, **fields)
    for one, two in ("AB", "12", "01"):
        ctm = f"call {one} 0.1 0.2 hello\ncall {two} 1.2 0.2 hi\ncall {one} 1.3 0.2 there\n"
        assert errors(score(written(tmp_path, "h.ctm", ctm), "--corpus", path)) == (0, 0, 0, 3)
    mixed = written(tmp_path, "m.ctm", "call 1 0.1 0.2 hello\ncall 1 1.2 0.2 hi\ncall 1 1.3 0.2 there\n")
    with pytest.raises(CorpusError, match=r"call has no channel 1 \(expected one of A, B\)"):
        score(mixed, "--corpus", path)


def test_an_empty_file_has_no_hypothesis(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"e\.txt: the file has no hypothesis"):
        score(written(tmp_path, "e.txt", ""), "--reference", written(tmp_path, "r.txt", "a line of text\n"))


def test_pairs_of_text_files(tmp_path: Path) -> None:
    ref, hyp = (
        written(tmp_path, "r.txt", "the cat sat\n\nso long\n"),
        written(tmp_path, "h.txt", "the hat sat\n\nlong\n"),
    )
    facts = score(hyp, "--reference", ref)
    assert errors(facts) == (1, 1, 0, 5) and "line by line" in facts["notes"][0]
    ids = (
        written(tmp_path, "ri.txt", "u1 the cat sat\nu2 so long\n"),
        written(tmp_path, "hi.txt", "u2 long\nu1\tthe hat sat\n"),
    )
    facts = score(ids[1], "--reference", ids[0])
    assert errors(facts) == (1, 1, 0, 5) and facts["notes"] == []
    assert errors(score(ids[1], "--reference", ids[0], "--pair", "lines"))[3] == 7
    with pytest.raises(UsageError, match="only one of the two files"):
        score(ids[1], "--reference", ref)
    with pytest.raises(CorpusError, match="3 lines do not pair with the 2"):
        score(hyp, "--reference", ids[0], "--pair", "lines")
    with pytest.raises(UsageError, match="--pair needs --reference"):
        score(hyp, "--pair", "lines")


@pytest.mark.parametrize("form", ["lines", "array"])
def test_predictions_of_nemo(tmp_path: Path, form: str) -> None:
    rows = [
        {"audio_filepath": "a/1.wav", "duration": 1.0, "text": "good morning", "pred_text": "good mourning"},
        {"audio_filepath": "a/2.wav", "duration": 1.0, "text": "bye", "pred_text": "bye"},
    ]
    text = json.dumps(rows, indent=1) if form == "array" else "\n".join(map(json.dumps, rows))
    path = written(tmp_path, "pred.json", text)
    assert errors(score(path)) == (1, 0, 0, 3)
    assert errors(score(path, "--corpus", corpus(tmp_path, {"1": "good morning", "2": "bye bye"}))) == (1, 1, 0, 4)


@pytest.mark.parametrize("text, encoding", [("u1\thello\nu2 no\n", "utf-8"), ("u1 hello\r\nu2 no", "utf-8-sig")])
def test_tabs_and_marks_of_editors(tmp_path: Path, text: str, encoding: str) -> None:
    path = corpus(tmp_path, {"u1": "hello", "u2": "no"})
    assert errors(score(written(tmp_path, "h.txt", text, encoding), "--corpus", path)) == (0, 0, 0, 2)


def test_what_nobody_sees_makes_no_difference(tmp_path: Path) -> None:
    row = {"id": "a", "ref": "un caf\u00e9 no\u00adir", "hyp": "un cafe\u0301 noir\u200b"}
    assert errors(score(written(tmp_path, "h.jsonl", json.dumps(row)))) == (0, 0, 0, 3)


def test_one_sided_texts_beside_each_other_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "h.jsonl", json.dumps({"id": "a", "ref": "Hello, World", "hyp": "hello world"}))
    facts = score(path)
    assert errors(facts) == (2, 0, 0, 2) and facts["transform"] == "none"
    assert "--transform lower+no_punct+squeeze" in facts["notes"][0]
    assert Scoring("lower").read(path).triples == [("a", "hello, world", "hello world")]
    with pytest.raises(StillhouseError, match="unknown text transform"):
        score(path, "--transform", "lowr")


@pytest.mark.parametrize("transform", ["auto", "sentence_case", "no_punct", "drop_marks+lower"])
def test_signs_of_nist_in_plain_words_change_no_score(tmp_path: Path, transform: str) -> None:
    path = corpus(tmp_path, {"u1": "Me @ home (quietly) at 5. It is", "u2": "THE NASA PROBE"})
    heard = {"u1": "ME @ HOME QUIETLY AT 5. IT WAS", "u2": "the nasa probe"}
    found = []
    for kind in ("text", "trn", "jsonl"):
        lines = {"text": "{0} {1}", "trn": "{1} ({0})", "jsonl": '{{"id": "{0}", "hyp": "{1}"}}'}[kind]
        file = written(tmp_path, f"h.{kind}", "".join(lines.format(*pair) + "\n" for pair in heard.items()))
        facts = score(file, "--corpus", path, "--transform", transform)
        found.append((facts["wer"], facts["cer"], facts["transform"]))
    assert found[0] == found[1] == found[2]


def test_marks_are_no_punctuation_of_a_side(tmp_path: Path) -> None:
    path = corpus(tmp_path, {"u1": "we're sure of it"})
    facts = score(written(tmp_path, "h.txt", "u1 were <UNK> of it [noise]\n"), "--corpus", path)
    assert errors(facts) == (2, 0, 1, 4) and facts["transform"] == "none"


RECOGS = """u1-0:\tref=['HELLO', 'WORLD']
u1-0:\thyp=['HELLO', 'WORD']
u2-1:\tref=["IT'S", 'SO']
u2-1:\thyp=[]
"""
PER_UTT = """u1-0 ref  HELLO  WORLD  ***
u1-0 hyp  HELLO  WORD  NOW
u1-0 op   C      S     I
u1-0 #csid 1 1 1 0
u2-1 ref IT'S SO
u2-1 hyp *** ***
u2-1 op D D
u2-1 #csid 0 0 0 2
"""


def test_references_and_hypotheses_under_each_other(tmp_path: Path) -> None:
    recogs = written(tmp_path, "recogs-test-clean.txt", RECOGS)
    assert errors(score(recogs)) == (1, 2, 0, 4)
    timed = written(tmp_path, "recogs-timed.txt", RECOGS + "u1-0:\ttimestamp_hyp=[0.1, 0.5]\n")
    assert errors(score(timed)) == (1, 2, 0, 4)
    assert errors(score(written(tmp_path, "per_utt", PER_UTT))) == (1, 2, 1, 4)
    path = corpus(tmp_path, {"u1-0": "hello word", "u2-1": "it's so"})
    facts = score(recogs, "--corpus", path)
    assert errors(facts) == (0, 2, 0, 4) and facts["transform"] == "lower"
    hyp = written(tmp_path, "h.txt", "u1-0 hello world\nu2-1 it's so\n")
    assert errors(score(hyp, "--reference", recogs)) == (0, 0, 0, 4)
    for text, what in (
        (RECOGS + RECOGS, r"r\.txt:5: this is a second ref of 'u1-0', after that of .*r\.txt:1"),
        (RECOGS[: RECOGS.rindex("u2-1")], r"r\.txt:3: u2-1 has no hyp"),
        (RECOGS.replace("[]", "[print(1)]"), r"r\.txt:4: the words are no list of texts"),
    ):
        with pytest.raises(CorpusError, match=what):
            score(written(tmp_path, "r.txt", text))


def test_text_without_audio_beside_speech_is_not_missing(tmp_path: Path) -> None:
    texts = {"a": "one two", "b": "three", "c": "four five six"}
    path = corpus(tmp_path, texts, a={"audio": "a.wav"}, b={"audio": "b.wav"})
    hyp = written(tmp_path, "h.trn", "one two (a)\n")
    facts = score(hyp, "--corpus", path)
    assert errors(facts) == (0, 1, 0, 3) and facts["missing_ids"] == ["b"]
    # Without any audio, the corpus is a list of references.
    assert score(hyp, "--corpus", corpus(tmp_path, texts))["missing_ids"] == ["b", "c"]
