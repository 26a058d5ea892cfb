"""Writing ARPA files, plain or gzipped.

Guarantees: `read_arpa` reads the model back, to seven digits, and the same model gives the same bytes.
Try: `stillhouse corpus ngram corpus.jsonl words.arpa.gz --order 3`.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from ....data.files.atomic import draft_of
from ..ngram import LN10, NGram

BLOCK = 1 << 16  # n-grams that become text at once


def is_arpa(head: bytes) -> bool:
    """Return whether a file begins like those of `write_arpa`, plain or gzipped: with <s>, which other tools do not."""
    if head.startswith(b"\x1f\x8b"):
        with suppress(zlib.error):
            head = zlib.decompressobj(wbits=31).decompress(head, 4096)
    return re.match(rb"\\data\\\n(ngram \d+=\d+\n)+\n\\1-grams:\n-99\t<s>[\t\n]", head) is not None


def write_arpa(path: Path, lm: NGram) -> None:
    """Write a model, whole or not at all. The file is gzipped if its name ends with .gz."""
    with draft_of(path) as draft, draft.open("wb") as plain:
        if path.suffix == ".gz":
            # Neither the time nor the name of the draft may be in the file.
            with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0, compresslevel=6) as packed:
                _write(packed, lm)
        else:
            _write(plain, lm)


def _write(binary: gzip.GzipFile | io.BufferedWriter, lm: NGram) -> None:
    out = io.TextIOWrapper(binary, encoding="utf-8", newline="\n", write_through=True)  # type: ignore[arg-type]
    out.write("\\data\\\n" + "".join(f"ngram {n}={len(table[0])}\n" for n, table in enumerate(lm.tables, start=1)))
    words: np.ndarray = np.array(sorted(lm.words, key=lm.words.__getitem__), object)
    for n, (keys, logp, backoff) in enumerate(lm.tables, start=1):
        out.write(f"\n\\{n}-grams:\n")
        for begin in range(0, len(keys), BLOCK):
            part = slice(begin, begin + BLOCK)
            texts = words[_grams(lm, n, keys[part])]
            scores, weights = (logp[part] / LN10).tolist(), (backoff[part] / LN10).tolist()
            for row, score, weight in zip(texts.tolist(), scores, weights):
                tail = f"\t{weight:.7g}\n" if weight else "\n"
                out.write(f"{score:.7g}\t{' '.join(row)}{tail}")
    out.write("\n\\end\\\n")
    out.detach()


def _grams(lm: NGram, n: int, keys: np.ndarray) -> np.ndarray:
    """Return the words of n-grams, int64 [G, n]."""
    columns = []
    for below in range(n - 2, -1, -1):
        columns.append(keys % lm.size)
        keys = lm.tables[below][0][keys // lm.size]
    return np.stack([keys, *reversed(columns)], axis=1)
