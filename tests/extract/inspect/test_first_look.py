"""info, ls, show and verify on whole, partial and damaged stores: facts against what is known, and the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from stillhouse.extract.inspect.facts import store as facts
from stillhouse.extract.inspect.facts import utterance as showing
from stillhouse.extract.inspect.show.terminal import pairs, share, size, table, tables, width, wrap
from stillhouse.extract.store import Store, View


def test_info_of_a_complete_store(store):
    found = facts.store_facts(store)
    assert (found.utterances, found.sessions, found.complete) == (6, 2, True)
    [teacher] = found.teachers
    assert (teacher.name, teacher.width, teacher.depth, teacher.dtype) == ("known", 12, 4, "float16")
    assert teacher.contexts == ["alone", "both:8"] and teacher.layers == [0, 2, 4]
    # 26 words in all; 26 rows in one chunk of 64, 12 wide, 2 bytes, and 2048/64 index entries with their crc
    assert teacher.tokens == 26 and teacher.hidden_bytes == 6 * (64 * 12 * 2 + 32 * 16 + 4)
    assert teacher.vocabulary == 19
    assert found.bytes == sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file())
    assert (teacher.units, teacher.units_planned, teacher.views) == (6, 6, 6)


def test_info_and_ls_of_an_unfinished_store(partial, stillhouse):
    views = facts.view_facts(partial, partial.planned_views)
    alone, both = views[0], views[-1]
    assert (alone.view, alone.tokens, alone.utterances, alone.units) == ("known/alone/0", 9000, 450, 5)
    assert not alone.complete  # its norms wait for the end of the run
    # A writer may have made another unit before it was interrupted
    assert 2 <= both.units < both.units_planned == 5 and 0 < both.tokens < both.tokens_planned == 9000
    assert not facts.store_facts(partial).complete
    share = f"{10 * (5 + both.units):.1f} % of the work items"
    assert f"not finished: {share}; 0 of 6 views" in stillhouse("inspect", "info", partial.path).out
    listed = stillhouse("inspect", "ls", partial.path, "known/both:8/*", "--jsonl").out.splitlines()
    assert [json.loads(x)["view"] for x in listed] == ["known/both:8/0", "known/both:8/2", "known/both:8/4"]
    assert json.loads(listed[0])["tokens"] == both.tokens
    held = {u.utterance: u.views for u in facts.utterance_facts(partial)}
    assert set(held.values()) == {3, 6} and sum(v == 6 for v in held.values()) == both.utterances
    # what is there can be shown, what is not is said not to be
    missing = next(u for u, v in held.items() if v == 3)
    found = showing.show(partial, missing, partial.planned_views)
    assert [v.held for v in found.teachers[0].views] == [True] * 3 + [False] * 3
    assert "not extracted yet: known/both:8/0" in stillhouse("inspect", "show", partial.path, missing).out
    assert stillhouse("inspect", "verify", partial.path, "--data").code == 0


def test_numbers_of_unfinished_views(partial, store, stillhouse, tmp_path):
    """No view is complete. Every command uses the extracted part, and prints a line about it."""
    both, held = "known/both:8/0", partial.available(partial.planned_views[-1])
    utterance = partial.index.id(int(np.flatnonzero(held)[0]))
    missing = partial.index.id(int(np.flatnonzero(~held)[0]))
    for command in (
        ["stats", "--json"],
        ["similarity"],
        ["neighbours", f"{utterance}:0", "--view", both],
        ["compare", utterance, "--views", "*/*/0"],
        ["plot", tmp_path / "norms.png", "--kind", "norms"],
    ):
        done = stillhouse("inspect", command[0], partial.path, *command[1:])
        assert done.code == 0 and done.out and "not complete yet: known/" in done.err, command
    told = stillhouse("inspect", "neighbours", partial.path, f"{missing}:0", "--view", both)
    assert told.code == 10 and f"{missing} is not extracted yet" in told.err and told.out == ""
    assert "not complete" not in stillhouse("inspect", "stats", store.path).err


def test_a_store_without_states_is_an_error(known, tmp_path, stillhouse):
    begun = known.build(tmp_path, ["A BANK", "BANK"], stop_after=0)
    for command in (["stats"], ["similarity"], ["export", tmp_path / "x.npz"]):
        done = stillhouse("inspect", command[0], begun.path, *command[1:])
        assert done.code == 10 and "nothing is extracted yet" in done.err and done.out == ""
    assert not (tmp_path / "x.npz").exists()


def test_show_counts_the_context_that_the_teacher_saw(store, known):
    utterance = "s00-0001"  # HE SAT ON THE BANK, second of three
    view = View("known", "both:8", 2)
    found = showing.show(store, utterance, [View("known", "alone", 2), view], values=True)
    [teacher] = found.teachers
    assert [t.piece for t in teacher.tokens] == ["he", "sat", "on", "the", "bank"]
    assert [(t.begin, t.end) for t in teacher.tokens] == [(0, 2), (3, 6), (7, 9), (10, 13), (14, 18)]
    assert (found.text, found.text_from) == ("he sat on the bank", "tokens")
    assert (found.session_row, found.session_utterances) == (1, 3)
    seen = {c.context: (c.left, c.right) for c in teacher.contexts}
    assert seen == {"alone": (0, 0), "both:8": (5, 4)}  # all of the neighbours there are
    states = store.gather([utterance], [view]).states[view].astype(np.float32)
    np.testing.assert_array_equal(teacher.views[1].values, states)
    np.testing.assert_allclose(teacher.views[1].norms, np.sqrt((states**2).sum(1)), rtol=1e-6)


def test_sessions_need_not_lie_together(store, monkeypatch):
    rows = store.rows(["s00-0000", "s00-0001", "s00-0002"]).tolist()
    session = np.array([7] * 6)
    session[rows[0]] = session[rows[2]] = 3
    monkeypatch.setattr(store.index, "session", session)
    found = showing.show(store, "s00-0002", store.planned_views[:1])
    assert (found.session, found.session_row, found.session_utterances) == (3, 1, 2)


def test_show_takes_the_transcript_from_the_manifest_and_refuses_another(store, stillhouse, tmp_path):
    corpus = store.path.parent / "corpus.jsonl"
    shown = stillhouse("inspect", "show", store.path, "s01-0005", "--corpus", corpus, "--view", "*/alone/0")
    assert shown.code == 0 and "MONEY IN THE BANK IS 😀 SAFE" in shown.out and "spelt from" not in shown.out
    found = json.loads(stillhouse("inspect", "show", store.path, "s01-0005", "--corpus", corpus, "--json").out)
    assert [t["text"] for t in found["teachers"][0]["tokens"]] == ["MONEY", "IN", "THE", "BANK", "IS", "😀", "SAFE"]
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("MONEY IN", "HONEY IN"))
    refused = stillhouse("inspect", "show", store.path, "s01-0005", "--corpus", other)
    assert refused.code == 12 and "has changed" in refused.err and refused.out == ""
    other.write_text('{"id": "s01-0005", "text"\n')
    assert "other.jsonl:1" in stillhouse("inspect", "show", store.path, "s01-0005", "--corpus", other).err
    assert stillhouse("inspect", "show", store.path, "s01-0005", "--corpus", tmp_path / "no").code == 1


def test_an_utterance_without_tokens_can_be_shown(store, stillhouse):
    shown = stillhouse("inspect", "show", store.path, "s01-0004")
    assert shown.code == 0 and "0 tokens" in shown.out


def test_ls_utterances(store, stillhouse):
    found = stillhouse("inspect", "ls", store.path, "s01-*", "--utterances", "--json")
    entries = json.loads(found.out)["utterances"]
    assert [e["utterance"] for e in entries] == ["s01-0003", "s01-0004", "s01-0005"]
    assert [e["tokens"]["known"] for e in entries] == [5, 0, 7] and {e["views"] for e in entries} == {6}
    nothing = stillhouse("inspect", "ls", store.path, "x*", "--utterances")
    assert nothing.code == 10 and "no utterance matches x*" in nothing.err


@pytest.fixture
def copy(store, tmp_path):
    """Return a copy that tests may damage, and its file of known/both:8/2."""
    path = tmp_path / "copy.zarr"
    shutil.copytree(store.path, path)
    return path, path / "data.zarr" / "known" / "hidden" / "c" / "1" / "1" / "0" / "0"


def test_verify_finds_a_flipped_bit_only_in_the_data(copy, stillhouse):
    path, shard = copy
    row = Store.open(path).rows(["s01-0003"])[0]
    start = np.asarray(Store.open(path)._teacher_rows("known").start)[row]
    data = bytearray(shard.read_bytes())
    data[start * 24 + 5] ^= 1
    shard.write_bytes(data)
    assert stillhouse("inspect", "verify", path).code == 0
    found = stillhouse("inspect", "verify", path, "--data", "--json")
    assert found.code == 1
    [finding] = json.loads(found.out)["findings"]
    assert finding["where"] == "known/both:8/2 shard 0 utterance s01-0003"
    assert "--repair" in finding["remedy"]
    text = stillhouse("inspect", "verify", path, "--data")
    assert text.code == 1 and "s01-0003" in text.out and "1 finding" in text.out


def test_verify_finds_a_missing_and_a_short_file_without_reading_states(copy, stillhouse):
    path, shard = copy
    data = shard.read_bytes()
    shard.unlink()
    assert stillhouse("inspect", "verify", path).code == 1
    shard.write_bytes(data[:24] + data[48:])
    found = stillhouse("inspect", "verify", path)
    assert found.code == 1 and "known/both:8/2 shard 0" in found.out


def test_a_damaged_view_does_not_hide_the_others(copy, stillhouse, tmp_path):
    path, shard = copy
    shard.unlink()
    shown = stillhouse("inspect", "show", path, "s00-0001")
    assert shown.code == 0 and "damaged: known/both:8/2: " in shown.out and "both:8/4" in shown.out
    for command in ("stats", "similarity"):
        found = stillhouse("inspect", command, path, "--json")
        assert found.code == 0 and "left out: known/both:8/2" in found.err
        assert "known/both:8/4" in found.out and "known/both:8/2" not in found.out
    assert stillhouse("inspect", "report", path, tmp_path / "page.html").code == 0
    assert "1 findings" in (tmp_path / "page.html").read_text(encoding="utf-8")
    alone = stillhouse("inspect", "stats", path, "--view", "known/both:8/2")
    assert alone.code == 1 and "all of these views are damaged" in alone.err and alone.out == ""


def test_a_sample_reads_that_share_of_the_utterances(partial, tmp_path):
    """All utterances but one are damaged: a tenth of them is found, the same tenth at every call."""
    path = tmp_path / "copy.zarr"
    shutil.copytree(partial.path, path)
    shard = path / "data.zarr" / "known" / "hidden" / "c" / "0" / "0" / "1" / "0"
    data = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    rows = Store.open(path).plan.latest("known").shards[1].rows
    data[: rows * 24] ^= 1
    shard.write_bytes(data.tobytes())
    count = rows // 20
    found = facts.verified(Store.open(path), 0.1).findings
    assert 0 < len(found) < count / 4
    assert found == facts.verified(Store.open(path), 0.1).findings
    assert len(facts.verified(Store.open(path), 1.0).findings) == count


@pytest.mark.parametrize("command", [["info"], ["ls"], ["show", "x"], ["verify"]])
def test_no_store_is_exit_code_10(command, stillhouse, tmp_path):
    found = stillhouse("inspect", command[0], tmp_path / "none", *command[1:])
    assert found.code == 10 and found.out == "" and "there is no store" in found.err


@pytest.mark.parametrize("value", ["0", "-5%", "120%", "few"])
def test_shares_that_are_none(store, stillhouse, value):
    assert stillhouse("inspect", "verify", store.path, f"--sample={value}").code == 2


def test_json_is_data_alone_on_stdout(store, stillhouse):
    for arguments in (["info"], ["ls"], ["ls", "--utterances"], ["show", "s00-0000"], ["verify", "--sample", "50%"]):
        found = stillhouse("inspect", arguments[0], store.path, *arguments[1:], "--json")
        assert found.code == 0 and found.err == ""
        assert json.loads(found.out)["schema"].startswith("stillhouse.inspect.")


def test_neither_torch_nor_zarr_is_imported(store):
    program = (
        "import sys; from stillhouse.cli import main\n"
        "for command in (['info'], ['ls'], ['ls', '--utterances'], ['show', 's00-0000'], ['verify', '--data']):\n"
        "    try: main(['inspect', command[0], sys.argv[1], *command[1:]])\n"
        "    except SystemExit as e: assert not e.code, command\n"
        "heavy = {'torch', 'zarr', 'pydantic', 'h5py', 'numba', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, store.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_count_terminal_columns():
    assert width("ab") == 2 and width("你好") == 4 and width("😀") == 2 and width("e\u0301") == 1
    drawn = table([("你好", 5), ("abc", None)], header=("a", "n"), right="lr")
    assert drawn == "a     n\n你好  5\nabc   -"
    assert table([("a\tb\x1b[2J",)]) == "a\\tb\\x1b[2J"
    assert table([]) == ""


def test_what_a_teacher_does_not_know_takes_the_room_of_its_characters():
    pieces = [("[UNK]", 0, 1), ("天", 1, 2), ("[UNK]", 2, 4), ("[x]", 5, 8)]
    assert showing.spelt([showing.TokenFacts(0, p, b, e, None) for p, b, e in pieces]) == "\ufffd天\ufffd\ufffd [x]"
    damaged = [("the", 0, 3), ("ox", 2_000_000_000, 2_000_000_002), ("[UNK]", 5, 2**31 - 1)]
    assert showing.spelt([showing.TokenFacts(0, p, b, e, None) for p, b, e in damaged]) == "\ufffd" * 100


def test_sizes_and_shares():
    assert [size(n) for n in (0, 999, 1000, 1_500_000, 2 * 10**9, 3 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB", "3.0 TB",
    ]  # fmt: skip
    assert [share(a, b) for a, b in ((0, 5), (5, 5), (1, 10**6), (999_999, 10**6), (0, 0), (1, 3))] == [
        "0 %", "100 %", "0.1 %", "99.9 %", "100 %", "33.3 %",
    ]  # fmt: skip


def test_help_of_every_command_imports_nothing_heavy(stillhouse):
    from stillhouse.extract.commands.inspect import inspect

    program = (
        "import sys; from stillhouse.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    try: main(['inspect', command, '--help'])\n"
        "    except SystemExit as e: assert not e.code, command\n"
        "heavy = {'torch', 'zarr', 'numpy', 'jinja2', 'matplotlib', 'pydantic', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *inspect.commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example: stillhouse inspect ") == len(inspect.commands) == 13


def test_a_pipe_that_closes_is_quiet(store):
    done = subprocess.run(
        f"{sys.executable} -m stillhouse.cli inspect show {store.path} s00-0001 --values | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("s00-0001: number 2 of 3") and done.stderr == ""


@pytest.fixture(scope="module")
def wide(known, tmp_path_factory):
    """Twenty views."""
    contexts = ("alone", "both:8", "past:8", "future:16")
    return known.build(tmp_path_factory.mktemp("wide"), layers=(0, 1, 2, 3, 4), contexts=contexts)


@pytest.mark.parametrize("columns", [None, 80, 140, 64])
def test_lines_for_people_fit_the_columns(wide, stillhouse, monkeypatch, columns):
    """Lines fit unless paths or names are longer. Ids and findings stay on one line, for grep."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    utterance = "s00-0000"
    looks = [["info"], ["ls"], ["show", utterance], ["similarity"], ["tree"], ["verify"]]
    looks += [["compare", utterance, "--views", "*/*/*"], ["neighbours", f"{utterance}:bank", "--view", "*"]]
    for command in looks if columns == 64 else [*looks, ["stats"]]:
        out = stillhouse("inspect", command[0], wide.path, *command[1:]).out.replace(str(wide.path), "STORE")
        assert max(map(len, out.splitlines())) <= (columns or 80) + (35 if command == ["info"] else 0), out
        if command == ["similarity"]:  # every pair is there, however many tables it takes
            assert len(re.findall(r"-?\d\.\d\d", out)) == 20 * 21 // 2


def test_what_is_too_long_stays_in_its_row(known, tmp_path, stillhouse):
    rows = [("x" * 150, 1), ("ab", 2)]
    assert table(rows, header=("id", "n")) == f"id  n\n{'x' * 150}  1\nab  2"
    drawn = tables([(1, "a", 0.5, 0.25)], header=("#", "t", "first", "second"), right="rlrr", keep=2, most=12)
    assert drawn == ["#  t  first\n1  a    0.5", "#  t  second\n1  a    0.25"]
    assert tables([(1, "a")], header=("#", "t"), right="rl", keep=2, most=9) == ["#  t\n1  a"]


def test_wrapping():
    assert wrap("aa bb cc", 5) == "aa bb\ncc" and wrap("aa bb cc", 5, 2) == "aa bb\n  cc"
    assert wrap("日本 語", 5) == "日本\n語"
    long = "/" + "x" * 90
    assert pairs([("  from", long), ("a", "b c")]) == f"  from  {long}\na       b c"
