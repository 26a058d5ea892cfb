"""Lines of text and JSON: one object a line, or one array of objects."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from stillhouse.data.errors import CorpusError
from stillhouse.data.files.lines import headed_by_ids, scan_objects
from stillhouse.data.manifest import read_manifest

ROWS = [{"id": "a", "text": "one, [two]"}, {"id": "b", "text": "three"}]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_as_lines_are(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n" + json.dumps(ROWS, indent=indent) + "\n", "utf-8-sig")
    assert list(scan_objects(path)) == [(2, ROWS[0]), (2, ROWS[1])] if indent is None else [(3, ROWS[0]), (7, ROWS[1])]
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: a JSON array begins here .*jq -c"):
        read_manifest(path)


@pytest.mark.parametrize(
    "text, line, what",
    [
        ('[\n{"id": "a"},\n{"id": "b",}\n]', 3, "not JSON"),
        ('[{"id": "a"}\n', 1, "not JSON"),
        ('[\n{"id": "a"},\n7]', 3, "JSON, but a int"),
        ('[{"id": "a"}]\n{"id": "b"}', 2, "text behind the end"),
    ],
)
def test_damage_of_an_array_is_named_with_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    (tmp_path / "a.json").write_text(text)
    number, error = list(scan_objects(tmp_path / "a.json"))[-1]
    assert number == line and isinstance(error, CorpusError) and what in str(error)


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    for text in (json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        assert [row for _, row in scan_objects(pipe)] == ROWS
        writer.join()
        pipe.unlink()


@pytest.mark.parametrize(
    "lines, ids",
    [
        (["utt1 hello", "utt2 hello"], True),
        (["spk_a hello", "", "spk_b"], True),
        (["s/a hello", "s/b"], True),
        (["utt1 hello", "utt1 no"], False),
        (["hello world", "good morning"], False),
        (["u.s. forces", "well-known facts"], False),
        ([""], False),
    ],
)
def test_heads_that_are_ids(lines: list[str], ids: bool) -> None:
    assert headed_by_ids(lines) is ids
