from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from commands import stillhouse

from stillhouse.data.errors import CorpusError, PartialError, StaleError, UsageError
from stillhouse.data.features.compute import FeatureFile
from stillhouse.data.manifest import Corpus, read_manifest
from stillhouse.data.units import load_units


def test_from_a_table_to_features_and_units(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make_corpus(30)
    root = corpus.path.parent
    rows = [f"{u.id},{u.audio},{u.text},p{k // 2},s{k % 3}" for k, u in enumerate(corpus.utterances)]
    (root / "t.csv").write_text("\n".join(["id,audio,text,prompt,session", *rows]))
    manifest = root / "c.jsonl"
    made = stillhouse("corpus", "import", "csv", root / "t.csv", manifest)
    assert made.stdout == ""
    assert "30 utterances" in made.stderr
    stillhouse("corpus", "import", "csv", root / "t.csv", manifest)  # the same again is no harm

    split = stillhouse("corpus", "split", manifest, "--by", "prompt", "--dev", "20%", "--test", "20%", "--json")
    splits = json.loads(split.stdout)["splits"]
    assert sum(s["utterances"] for s in splits.values()) == 30
    assert set(splits) == {"train", "dev", "test"}
    stillhouse("corpus", "import", "csv", root / "t.csv", manifest, error=UsageError, match="--force")

    out = tmp_path / "elsewhere" / "corpus.jsonl"
    stillhouse("corpus", "split", manifest, out, "--by", "prompt", "--dev", "20%", "--test", "20%")
    moved = read_manifest(out)
    assert all(moved.audio_path(u).is_file() for u in moved.utterances)
    assert [u.split for u in moved.utterances] == [u.split for u in read_manifest(manifest).utterances]

    stillhouse("corpus", "check", manifest)
    info = json.loads(stillhouse("corpus", "info", manifest, "--json").stdout)
    assert info["total"]["utterances"] == 30
    assert info["total"]["sessions"] == 3
    assert info["meta"] == {"prompt": 15}
    text = stillhouse("corpus", "info", manifest).stdout
    assert "dev" in text
    assert "prompt (15 values)" in text

    features = tmp_path / "f.h5"
    done = stillhouse("corpus", "features", manifest, features, "--speeds", "0.9,1.1", "--split", "dev", "--json")
    assert json.loads(done.stdout)["rows_computed"] == 2 * splits["dev"]["utterances"]
    more = stillhouse("corpus", "features", manifest, features, "--speeds", "0.9,1.1")
    assert f"{2 * splits['dev']['utterances']} rows present" in more.stderr
    assert len(FeatureFile(features).ids) == 30
    facts = json.loads(stillhouse("corpus", "info", features, "--json").stdout)
    assert (facts["rows"], facts["speeds"]) == (60, [0.9, 1.1])
    assert "rate_hz 16000" in stillhouse("corpus", "info", features).stdout
    stillhouse("corpus", "features", manifest, features, "--bins", 40, error=StaleError, match="bins is 80 there")
    stillhouse("corpus", "features", manifest, features, "--speeds", "fast", error=UsageError, match="'fast'")

    made = stillhouse("corpus", "tokenizer", manifest, tmp_path / "units", "--kind", "characters", "--split", "train")
    assert "units, fingerprint" in made.stderr
    units = load_units(tmp_path / "units")
    assert units.decode(units.encode("Tone 1!").ids) == "tone 1"
    asked = stillhouse("corpus", "tokenizer", manifest, tmp_path / "spm", "--size", 400, "--json")
    assert json.loads(asked.stdout)["size"] == load_units(tmp_path / "spm").size < 400


def test_problems_and_findings_set_the_exit_code(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make_corpus(3)
    corpus.audio_path(corpus.utterances[1]).unlink()
    found = stillhouse("corpus", "check", corpus.path, code=1)
    assert found.stdout.startswith(f"{corpus.path}:2: u001: ")
    assert "1 findings" in found.stderr
    as_json = json.loads(stillhouse("corpus", "check", corpus.path, "--json", code=1).stdout)
    assert [f["kind"] for f in as_json["findings"]] == ["missing"]
    stillhouse("corpus", "features", corpus.path, tmp_path / "f.h5", error=PartialError, match="u001")
    (tmp_path / "t.tsv").write_text("id\ttext\na\tone\nb\n")
    left_out = stillhouse(
        "corpus",
        "import",
        "csv",
        tmp_path / "t.tsv",
        tmp_path / "c.jsonl",
        error=PartialError,
        match="1 findings",
    )
    assert "t.tsv:3: 1 columns, expected 2" in left_out.stderr
    assert [u.id for u in read_manifest(tmp_path / "c.jsonl").utterances] == ["a"]
    (tmp_path / "t.tsv").write_text("id\ttext\n\tone\n")
    stillhouse("corpus", "import", "csv", tmp_path / "t.tsv", tmp_path / "d.jsonl", error=CorpusError, match="nothing")
    assert not (tmp_path / "d.jsonl").exists()


def test_text_and_librispeech(corpora: Path, tmp_path: Path) -> None:
    pattern = r"(?P<session>\d+-\d+)-(?P<order>\d+)"
    source = corpora / "text" / "librispeech-dev-clean.tsv"
    stillhouse("corpus", "import", "text", source, tmp_path / "t.jsonl", "--session-pattern", pattern)
    assert len(read_manifest(tmp_path / "t.jsonl").sessions()) == 97
    stillhouse("corpus", "import", "librispeech", corpora / "librispeech-subset", tmp_path / "c.jsonl")
    stillhouse("corpus", "check", tmp_path / "c.jsonl", "--rate", 16000)
    chosen = ["--only", "train-clean-100", "--by", "speaker", "--dev", "15%", "--test", "0%"]
    stillhouse("corpus", "split", tmp_path / "c.jsonl", *chosen)
    assert set(read_manifest(tmp_path / "c.jsonl").splits()) == {"train", "dev", "test-other"}


def test_exit_codes_of_the_program(tmp_path: Path) -> None:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stillhouse.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    (tmp_path / "c.jsonl").write_text('{"id": "x"}\n')
    bad = run("corpus", "info", tmp_path / "c.jsonl")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert f"error: {tmp_path / 'c.jsonl'}:1: text: Field required" in bad.stderr
    (tmp_path / "t.tsv").write_text("id\ttext\na\tone\nb\n")
    assert run("corpus", "import", "csv", tmp_path / "t.tsv", tmp_path / "d.jsonl").returncode == 3
    assert run("corpus", "tokenizer", tmp_path / "d.jsonl", tmp_path / "u", "--transform", "x").returncode == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from stillhouse.cli import cli\n"
        "names = 'features import@csv import@kaldi import@huggingface tokenizer split check info'.split()\n"
        "for c in [[], *(n.split('@') for n in names)]:\n"
        "    assert CliRunner().invoke(cli, ['corpus', *c, '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'numpy', 'h5py', 'pydantic', 'soundfile') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


PEERS = Path(__file__).parents[1] / "peers"


def test_every_kind_of_corpus_comes_in(tmp_path: Path) -> None:
    """The same recordings out of the files of five toolkits, by the command line, checked afterwards."""
    peers = Path(shutil.copytree(PEERS, tmp_path / "peers"))
    audio = peers / "audio"
    data = peers / "data" / "dev"
    data.mkdir(parents=True)
    (data / "wav.scp").write_text(f"one flac -c -d -s {audio}/one.flac |\ntalk {audio}/talk.flac\n")
    (data / "segments").write_text("one-1 one 0 -1\ntalk-a talk 0 0.5 0\ntalk-b talk 0.6 1.7 1\n")
    (data / "text").write_text("one-1 The kettle sings.\ntalk-a Is it raining?\ntalk-b Not yet.\n")
    (data / "utt2spk").write_text("one-1 anna\ntalk-a ben\ntalk-b clara\n")
    nemo = peers / "nemo.json"
    nemo.write_text(
        "".join(json.dumps({"audio_filepath": f"audio/{n}.flac", "text": n}) + "\n" for n in ("one", "talk"))
    )
    cuts = peers / "lhotse" / "cuts.jsonl.gz"
    kinds: list[tuple[list[object], int, int, list[str]]] = [
        (["kaldi", peers / "data"], 3, 2, ["dev"]),
        (["espnet", f"eval={data}"], 3, 2, ["eval"]),
        (["nemo", f"train={nemo}"], 2, 0, ["train"]),
        (["lhotse", f"dev={cuts}", "--audio-root", peers], 3, 2, ["dev"]),
    ]
    if find_spec("pyarrow") is not None:
        kinds.append((["huggingface", f"dev={peers / 'huggingface' / 'dict' / 'train'}"], 2, 0, ["dev"]))
    for words, utterances, sessions, splits in kinds:
        manifest = tmp_path / f"{words[0]}.jsonl"
        done = stillhouse("corpus", "import", *words[:2], manifest, *words[2:], "--json", "--root", tmp_path)
        facts = json.loads(done.stdout)
        assert (facts["utterances"], facts["sessions"], facts["splits"]) == (utterances, sessions, splits), words
        assert facts["findings"] == [] and facts["manifest"] == str(manifest)
        assert ("sessions are unknown" in done.stderr) == (sessions == 0)
        assert stillhouse("corpus", "check", manifest, "--full", "--root", tmp_path).stdout == ""
        assert len(read_manifest(manifest)) == utterances
    with_pattern = ["--session-pattern", "(?P<session>.)(?P<order>.*)", "--force"]
    named = stillhouse("corpus", "import", "nemo", nemo, tmp_path / "nemo.jsonl", *with_pattern)
    assert "sessions" not in named.stderr
    stillhouse(
        "corpus", "import", "nemo", tmp_path / "none.json", tmp_path / "x.jsonl", error=UsageError, match="no such"
    )
    stillhouse("corpus", "import", "nemo", f"={nemo}", tmp_path / "x.jsonl", error=UsageError, match="without a name")


def test_a_damaged_feature_file_is_found(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make_corpus(3)
    stillhouse("corpus", "features", corpus.path, tmp_path / "f.h5")
    assert stillhouse("corpus", "check", tmp_path / "f.h5").stdout == ""
    data = bytearray((tmp_path / "f.h5").read_bytes())
    data[FeatureFile(tmp_path / "f.h5").open()._offset + 3] ^= 8
    (tmp_path / "f.h5").write_bytes(data)
    facts = json.loads(stillhouse("corpus", "check", tmp_path / "f.h5", "--json", code=1).stdout)
    assert [(f["kind"], f["id"]) for f in facts["findings"]] == [("damaged", "u000")]
