"""The reader of ARPA files: numbers worked by hand, a plain reader beside it, and files that are refused by line."""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.errors import CorpusError
from stillhouse.train.decode.ngram import LN10, read_arpa

# P(b | a) = 10^-0.5; P(c | a) = 10^(-0.2 - 1.1), by back-off; "b c" is pruned though "b c a" is there
SMALL = """made by hand

\\data\\
ngram 1=5
ngram 2=3
ngram 3=2

\\1-grams:
-1.5\t<s>\t-0.3
-1.2\t</s>
-0.7\ta\t-0.2
-0.9\tb\t-0.4
-1.1 c -0.6

\\2-grams:
-0.6\t<s> a\t-0.1
-0.5\ta b\t-0.25
-0.8\tc a

\\3-grams:
-0.35\t<s> a b
-0.45\tb c a

\\end\\
"""


def written(tmp_path: Path, text: str, name: str = "lm.arpa") -> Path:
    path = tmp_path / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_probabilities_by_hand(tmp_path: Path, name: str) -> None:
    lm = read_arpa(written(tmp_path, SMALL, name))
    w = lm.words
    assert (lm.order, lm.size, lm.unknown) == (3, 5, None)
    assert lm.start == (w["<s>"],)
    by_hand = {
        ((), "a"): -0.7,
        (("a",), "b"): -0.5,
        (("a",), "c"): -0.2 - 1.1,
        (("<s>", "a"), "b"): -0.35,
        (("<s>", "a"), "c"): -0.1 - 0.2 - 1.1,
        (("a", "b"), "c"): -0.25 - 0.4 - 1.1,  # b c has no probability of its own
        (("b", "c"), "a"): -0.45,
        (("b", "c"), "b"): -0.6 - 0.9,  # nor a back-off weight
        (("b", "b"), "</s>"): -0.4 - 1.2,
    }
    for (context, word), expected in by_hand.items():
        ids = tuple(w[c] for c in context)
        assert lm.score(ids, w[word]) == pytest.approx(expected * LN10), (context, word)
        assert lm.row(ids)[w[word]] == pytest.approx(expected * LN10), (context, word)
    assert lm.floor == pytest.approx(-1.5 * LN10)
    assert lm.score((), None) == lm.floor
    assert lm.shortened((w["a"], w["c"])) == (w["c"],)
    assert lm.shortened((w["a"], w["b"])) == (w["a"], w["b"])
    assert lm.shortened((w["</s>"], w["b"], w["c"])) == (w["b"], w["c"])


def plain(text: str) -> dict[tuple[str, ...], tuple[float, float]]:
    """{n-gram: (log10 probability, log10 back-off weight)}; tabs between fields."""
    found = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) >= 2:
            found[tuple(fields[1].split())] = float(fields[0]), float(fields[2]) if len(fields) > 2 else 0.0
    return found


def katz(table: dict, context: tuple[str, ...], word: str) -> float:
    if (*context, word) in table:
        return table[(*context, word)][0]
    return table.get(context, (0.0, 0.0))[1] + katz(table, context[1:], word)


@pytest.mark.parametrize("pruned", [False, True])
def test_against_a_plain_reader(tmp_path: Path, pruned: bool) -> None:
    rng = random.Random(pruned)
    vocabulary = ["<s>", "</s>", "<unk>", *(f"w{k}" for k in range(9))]
    orders: list[list[tuple[str, ...]]] = [[(w,) for w in vocabulary]]
    for _ in range(3):
        grown = {(*rng.choice(orders[-1]), rng.choice(vocabulary)) for _ in range(60)}
        orders.append(sorted(grown, key=lambda _: rng.random()))
    if pruned:
        orders[1] = orders[1][::3]
        orders[2] = orders[2][::2]
    text = "\\data\\\n" + "".join(f"ngram {n}={len(rows)}\n" for n, rows in enumerate(orders, 1))
    for n, rows in enumerate(orders, 1):
        text += f"\n\\{n}-grams:\n"
        for row in rows:
            backoff = f"\t{rng.uniform(-1, 0.2):.4f}" if n < 4 and rng.random() < 0.8 else ""
            text += f"{-rng.uniform(0.1, 3):.4f}\t{' '.join(row)}{backoff}\n"
    text += "\n\\end\\\n"
    table, lm = plain(text), read_arpa(written(tmp_path, text))
    contexts = [tuple(rng.choices(vocabulary, k=rng.randrange(4))) for _ in range(150)]
    contexts += [row[:3] for row in orders[3]]
    for context in contexts:
        ids = lm.shortened(tuple(lm.words[c] for c in context))
        expected = np.array([katz(table, context, word) for word in lm.words]) * LN10
        assert lm.row(ids) == pytest.approx(expected)
        assert [lm.score(ids, k) for k in lm.words.values()] == pytest.approx(expected.tolist())


REFUSED = {
    "no data": (SMALL.replace("\\data\\", "data"), None, "no \\data\\ section"),
    "cut off": (SMALL.replace("\\end\\\n", ""), 22, "ends before \\end\\"),
    "a gram too few": (SMALL.replace("-0.8\tc a\n", ""), 19, "2 2-grams before this line"),
    "a gram too many": (SMALL.replace("ngram 2=3", "ngram 2=2"), 20, "3 2-grams before this line"),
    "no section": (SMALL.replace("ngram 3=2", "ngram 3=2\nngram 4=1"), 25, "no 4-grams"),
    "section order": (SMALL.replace("\\2-grams:", "\\3-grams:"), 15, "out of order"),
    "count order": (SMALL.replace("ngram 2=3\n", ""), 5, "out of order"),
    "not a count": (SMALL.replace("ngram 2=3", "ngrams two"), 5, "not a count"),
    "not a number": (SMALL.replace("-0.5\ta b", "half\ta b"), 17, "'half' is not a log10 probability"),
    "nan": (SMALL.replace("-0.5\ta b", "nan\ta b"), 17, "not a log10 probability"),
    "above 0": (SMALL.replace("-0.5\ta b", "0.5\ta b"), 17, "a log10 probability of 0.5"),
    "words missing": (SMALL.replace("-0.8\tc a", "-0.8\tc"), 18, "2 fields in the section of 2-grams"),
    "too many words": (SMALL.replace("-0.8\tc a", "-0.8\tc a b b"), 18, "5 fields in the section of 2-grams"),
    "bad back-off": (SMALL.replace("a b\t-0.25", "a b\tb"), 17, "'b' is not a back-off weight"),
    "a strange word": (SMALL.replace("\tc a", "\tc z"), 18, "'z' is not among the 1-grams"),
    "a word twice": (SMALL.replace("-1.1 c -0.6", "-1.1 b -0.6"), 13, "'b' occurs twice"),
    "a gram twice": (SMALL.replace("\tc a", "\ta b"), 18, "2-gram of this line occurs twice"),
    "not utf-8": (SMALL.replace("<s> a b", "<s> a \udcff"), 21, "not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    text, line, words = REFUSED[name]
    path = tmp_path / "lm.arpa"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorpusError) as e:
        read_arpa(path)
    assert words in e.value.what
    assert str(e.value.where) == (f"{path}:{line}" if line else str(path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="No such file"):
        read_arpa(tmp_path / "none.arpa")
    (tmp_path / "lm.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(100))
    with pytest.raises(CorpusError, match="a KenLM binary"):
        read_arpa(tmp_path / "lm.bin")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(SMALL.encode())[:60])
    with pytest.raises(CorpusError, match="cannot read"):
        read_arpa(tmp_path / "cut.gz")


def test_a_probability_of_0_is_written_in_two_ways(tmp_path: Path) -> None:
    text = SMALL.replace("-1.5\t<s>", "-inf\t<s>").replace("-0.9\tb", "-99\tb")
    lm = read_arpa(written(tmp_path, text))
    assert lm.score((), lm.words["<s>"]) == lm.score((), lm.words["b"]) == pytest.approx(-99 * LN10)
    assert lm.floor == pytest.approx(-1.2 * LN10)
    assert math.isfinite(lm.row((lm.words["a"],)).min())
