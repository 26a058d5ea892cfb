"""`stillhouse decode` of a small trained run: formats, beam and language model, pipes, Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import StillhouseError
from stillhouse.data.features.compute import compute_features
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.train.config import load_config
from stillhouse.train.decode import align as align_module
from stillhouse.train.decode.lm import tune as tune_module
from stillhouse.train.decode.lm.tune import Axis
from stillhouse.train.export.export import export_run
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run.load import load_run

SETTINGS = ("model.chunk_frames=32", "optim.steps=100", "run.eval_every=50", "run.checkpoint_every=50")


@pytest.fixture(scope="module")
def hearing(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that streams and has learnt something."""
    out = tmp_path_factory.mktemp("hearing") / "run"
    Trainer(load_config(tones / "run.toml", SETTINGS), out, lambda _: None).run()
    return out


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "stillhouse.cli", *map(str, args)]


def stillhouse(*args: object, stdin: bytes = b"", error: str = "") -> tuple[str, str]:
    """(standard output, standard error); `error`: words of the error that it has to end in."""
    result = CliRunner().invoke(cli, list(map(str, args)), input=stdin)
    if error:
        assert isinstance(result.exception, StillhouseError) and error in str(result.exception)
    else:
        assert result.exception is None, result.exception
    return result.stdout, result.stderr


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def language_model(tones: Path, path: Path) -> Path:
    """The words of the dev split and how often they stand there."""
    lines = [json.loads(line) for line in (tones / "corpus.jsonl").read_text().splitlines()]
    texts = [r["text"] for r in lines if r.get("split") == "dev"]
    counts = Counter(word for text in texts for word in text.split())
    total = sum(counts.values()) + len(texts)
    rows = [f"{math.log10(n / total):.5f}\t{word}" for word, n in counts.items()]
    head = f"\\data\\\nngram 1={len(rows) + 2}\n\n\\1-grams:\n-99\t<s>\n{math.log10(len(texts) / total):.5f}\t</s>\n"
    path.write_text(head + "\n".join(rows) + "\n\n\\end\\\n")
    return path


def test_beam_and_language_model_make_fewer_errors(hearing: Path, tones: Path, tmp_path: Path) -> None:
    dev = (tones / "corpus.jsonl", tones / "features.h5", "--split", "dev")
    lm = language_model(tones, tmp_path / "dev.arpa")
    found = {}
    for name, options in {"greedy": [], "fused": ["--beam", 8, "--lm", lm, "--lm-weight", 0.5, "--nbest", 3]}.items():
        out, said = stillhouse("decode", hearing, *dev, *options)
        assert "x real time" in said and "12 utterances" in said
        (tmp_path / name).write_text(out)
        found[name] = json.loads(stillhouse("score", tmp_path / name, "--json")[0])["wer"]["rate"]
    assert found["fused"] < 0.7 * found["greedy"]
    for record in records((tmp_path / "fused").read_text()):
        scores = [r["score"] for r in record["nbest"]]
        assert scores == sorted(scores, reverse=True) and len({r["hyp"] for r in record["nbest"]}) == len(scores)
        assert (record["hyp"], record["score"]) == (record["nbest"][0]["hyp"], scores[0])
        assert record["nbest"][0]["fused"] < 0
    rates = []
    for kind in ("trn", "ctm", "text"):  # every format is scored alike
        (tmp_path / kind).write_text(stillhouse("decode", hearing, *dev, "--format", kind)[0])
        told = stillhouse("score", tmp_path / kind, "--corpus", tones / "corpus.jsonl", "--json")[0]
        rates.append(json.loads(told)["wer"]["rate"])
    assert rates == [found["greedy"]] * 3


def test_hotwords_are_recovered_in_a_corpus_and_in_a_stream(hearing: Path, tones: Path, tmp_path: Path) -> None:
    dev = (tones / "corpus.jsonl", tones / "features.h5", "--split", "dev", "--beam", 8)
    (tmp_path / "names.txt").write_text("acc\nDAA :1\n")
    hotwords = ("--hotwords", tmp_path / "names.txt", "--hotwords-score", 1)

    def counted(found: list[dict]) -> tuple[int, int]:
        """(how often a hotword was found where it was said, and where it was not)"""
        said = [(set(r["ref"].split()), w) for r in found for w in r["hyp"].split() if w in ("acc", "daa")]
        return sum(w in words for words, w in said), sum(w not in words for words, w in said)

    plain = records(stillhouse("decode", hearing, *dev)[0])
    found = records(stillhouse("decode", hearing, *dev, *hotwords, "--nbest", 2)[0])
    assert counted(plain) == (0, 0)
    right, wrong = counted(found)
    assert right == 2 and wrong <= 4  # of 2 that were said, and of 22 other words
    for best in (r["nbest"][0] for r in found):  # a space and three letters, each time
        assert best["fused"] == 4 * sum(w.startswith(("acc", "daa")) for w in best["hyp"].split())
    lm = language_model(tones, tmp_path / "dev.arpa")
    both = records(stillhouse("decode", hearing, *dev, *hotwords, "--lm", lm, "--ilm-weight", 0.1)[0])
    assert counted(both)[0] == 2 and [r["score"] for r in both] != [r["score"] for r in found]
    piped, _ = stillhouse("decode", hearing, tones / "67.wav", "--beam", 8, *hotwords, "--no-partial")
    assert [r["hyp"] for r in records(piped)] == [r["hyp"] for r in found if r["id"] == "u67"]

    (tmp_path / "names.txt").write_text("da\ndaa\n")
    told = stillhouse("decode", hearing, *dev, *hotwords)[1]
    assert "only the beginning of 'daa' (line 2) gets a score" in told
    (tmp_path / "names.txt").write_text("da\ndab e\n")
    stillhouse("decode", hearing, *dev, *hotwords, error="names.txt:2: the model's units cannot write 'dab e'")


def test_tuned_weights_are_kept_for_their_language_model(
    hearing: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_module, "AXES", {"lm-weight": Axis(0.5, 2, 0.5), "ilm-weight": Axis(0.1, 2, 0.1)})
    monkeypatch.setattr(tune_module, "FINER", 0)
    corpus, features = tones / "corpus.jsonl", tones / "features.h5"
    lm = language_model(tones, tmp_path / "dev.arpa")
    fused = ("decode", hearing, corpus, features, "--beam", 4, "--lm", lm)
    table, said = stillhouse(*fused, "--tune", "lm-weight,ilm-weight")  # of dev, the run's own
    grid = {tuple(map(float, line.split()[:2])): line.split()[2:] for line in table.splitlines()[1:]}
    assert list(grid) == [(0, 0), (0, 0.1), (0.5, 0), (0.5, 0.1)] and "of 12 utterances" in said
    best = min(grid, key=lambda point: tuple(float(rate.rstrip("%")) for rate in grid[point]))
    assert best[0] == 0.5

    def rates(*options: object) -> tuple[list[str], str]:
        out, said = stillhouse(*fused, "--split", "dev", *options)
        (tmp_path / "hyp").write_text(out)
        facts = json.loads(stillhouse("score", tmp_path / "hyp", "--json")[0])
        return [f"{facts[name]['rate']:.2%}" for name in ("wer", "cer")], said

    for weights, expected in grid.items():
        assert rates("--lm-weight", weights[0], "--ilm-weight", weights[1])[0] == expected
    again, said = rates()
    assert again == grid[best]
    assert f"--lm-weight {best[0]:g} --ilm-weight {best[1]:g}, tuned with --beam 4 on split dev" in said
    # Any weight of the command line takes the place of all kept ones, and another file or kind has none.
    assert "tuned.json is not used, because the command line has --lm-weight" in rates("--lm-weight", 0.3)[1]
    other = language_model(tones, tmp_path / "other.arpa")
    other.write_text(other.read_text() + "\n")
    plain = ("decode", hearing, corpus, features, "--split", "dev")
    stillhouse(*plain, "--lm", other, error="tuned with another language model")
    stillhouse(*plain, "--lm", lm, "--lm-unit", "unit", error="tuned with --lm-unit word")
    assert stillhouse(*plain, "--lm", other, "--lm-weight", 0.1)[0]
    stillhouse(*plain)  # Without a language model there are no weights.
    # A choice for the other file does not replace the first one.
    fixed = ("--lm-weight", 0.4, "--lm-unknown", 5)  # They hold for all points, so that they are kept as well.
    stillhouse("decode", hearing, corpus, features, "--lm", other, *fixed, "--tune", "ilm-weight")
    assert "--lm-weight 0.4 --lm-unknown 5 --ilm-weight" in stillhouse(*plain, "--lm", other)[1]
    assert rates()[0] == grid[best]
    export_run(hearing, tmp_path / "export", "safetensors")  # takes the weights along
    exported = ("decode", tmp_path / "export", corpus, features, "--split", "dev")
    assert "--ilm-weight" in stillhouse(*exported, "--lm", other)[1]
    (hearing / "tuned.json").write_text("{}")
    stillhouse(*plain, "--lm", lm, error="the tuned weights cannot be read")
    (hearing / "tuned.json").unlink()


def test_points_that_were_measured_before_a_kill_are_kept(
    hearing: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hotwords, which each point decodes with as `decode` does. A process is killed behind its third point."""
    lm = language_model(tones, tmp_path / "dev.arpa")
    (tmp_path / "names.txt").write_text("ab :0.5\n")
    options = ("--beam", 2, "--lm", lm, "--hotwords", tmp_path / "names.txt")
    of = ("decode", hearing, tones / "corpus.jsonl", tones / "features.h5", *options)
    tune = (*of, "--tune", "lm-weight,blank-penalty")
    with subprocess.Popen(command(*tune), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(4)]
        process.kill()
    # The rest of the grid is smaller here.
    monkeypatch.setattr(tune_module, "AXES", {"lm-weight": Axis(0.25, 2, 0.25), "blank-penalty": Axis(1.0, 3, 2.0)})
    monkeypatch.setattr(tune_module, "FINER", 0)
    (kept,) = hearing.glob("tuning-*.jsonl")
    points = records(kept.read_text())
    assert len(points) >= 3 and not (hearing / "tuned.json").exists()
    points[0] |= {"wer": 0.0, "cer": 0.0}  # so that it can be seen that it is not measured again
    kept.write_text("".join(json.dumps(point) + "\n" for point in points))
    table, said = stillhouse(*tune)
    assert f"{len(points)} points were measured by a call that did not end" in said and not kept.exists()
    lines = table.splitlines()
    assert lines[2:4] == [line.rstrip("\n") for line in first[2:]] and lines[1].split() == ["0", "0", "0.00%", "0.00%"]
    tuned = json.loads((hearing / "tuned.json").read_text())["choices"][-1]
    assert tuned["hotwords"] == str(tmp_path / "names.txt") and tuned["points"][: len(points)] == points
    out, said = stillhouse(
        *of, "--split", "dev", "--lm-weight", points[2]["weights"]["lm-weight"], "--blank-penalty", 2
    )
    (tmp_path / "hyp").write_text(out)
    rates = json.loads(stillhouse("score", tmp_path / "hyp", "--json")[0])
    assert points[2]["weights"]["blank-penalty"] == 2 and points[2]["wer"] == pytest.approx(rates["wer"]["rate"])
    assert "With the options of this call" not in stillhouse(*of, "--split", "dev")[1]
    assert "tuned with --beam 2 and --hotwords" in stillhouse(*of[:4], "--split", "dev", "--beam", 3, "--lm", lm)[1]
    # Points of another search, or a damaged file, do not count.
    kept.write_text("{")
    assert "did not end" not in stillhouse(*tune)[1] and not kept.exists()
    kept.write_text("".join(json.dumps(point) + "\n" for point in points))
    assert "did not end" not in stillhouse(*tune, "--max-symbols", 7)[1] and kept.exists()
    kept.unlink()
    (hearing / "tuned.json").unlink()


def test_weights_are_not_tuned_on_what_is_measured_or_learnt(hearing: Path, tones: Path, tmp_path: Path) -> None:
    lm = language_model(tones, tmp_path / "dev.arpa")
    found = read_manifest(tones / "corpus.jsonl")
    path = tmp_path / "corpus.jsonl"
    moved = [u.model_copy(update={"audio": str(found.audio_path(u))}) for u in found.utterances]
    write_manifest(path, [u.model_copy(update={"split": "test-x" if u.split == "dev" else "mine"}) for u in moved])

    def refused(words: str, *options: object, corpus: Path = path) -> None:
        stillhouse("decode", hearing, corpus, tones / "features.h5", "--lm", lm, *options, error=words)

    tune = ("--tune", "lm-weight")
    refused("test-x is named as a split to measure on", *tune, "--split", "test-x")
    refused("the run was trained on 60 of the 60 utterances: u0", *tune, "--split", "mine")
    refused("expected --split with one of mine, test-x", *tune)
    refused("'lm' cannot be tuned", "--tune", "lm", "--split", "dev")
    refused("expected no --lm-weight", *tune, "--lm-weight", 0.2)
    stillhouse("decode", hearing, path, tones / "features.h5", *tune, error="--tune needs a language model")
    stillhouse("decode", hearing, tones / "0.wav", "--lm", lm, *tune, error="--tune needs a corpus")
    assert not (hearing / "tuned.json").exists()


def test_long_utterances_are_cut_at_quiet_places(
    hearing: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"{k}" for k in range(60, 68)]
    silence = np.zeros(8_000, np.float32)
    joined = np.concatenate(
        [p for id in ids for p in (soundfile.read(tones / f"{id}.wav", dtype="float32")[0], silence)]
    )
    soundfile.write(tmp_path / "long.wav", joined + 1e-4, 16_000)
    texts = {u.id: u.text for u in read_manifest(tones / "corpus.jsonl").utterances}
    row = Utterance(id="a/b", text=" ".join(texts[f"u{id}"] for id in ids), audio="long.wav")
    write_manifest(tmp_path / "corpus.jsonl", [row])
    compute_features(read_manifest(tmp_path / "corpus.jsonl"), tmp_path / "features.h5", workers=0)

    def shorter(*args: object) -> tuple:
        model, units, config, step = load_run(*args)
        data = config.data.model_copy(update={"max_frames": 300})
        return model, units, config.model_copy(update={"data": data}), step

    monkeypatch.setattr("stillhouse.train.run.load.load_run", shorter)
    known = (tmp_path / "corpus.jsonl", tmp_path / "features.h5")
    out, said = stillhouse("decode", hearing, *known, "--nbest", 2, "--beam", 2)
    assert "1 utterances are cut at quiet places" in said and "at most 3 s" in said
    (found,) = records(out)
    assert (found["id"], found["ref"]) == ("a/b", row.text)
    assert [w["word"] for w in found["words"]] == found["hyp"].split()
    assert found["nbest"][0]["hyp"] == found["hyp"] and len(found["nbest"]) == 2
    times = [t for w in found["words"] for t in (w["start_s"], w["end_s"])]
    assert times == sorted(times) and times[-1] <= len(joined) / 16_000
    assert times[-2] > 6  # beyond two cuts, times still count from the start of the audio
    live, said = stillhouse("decode", hearing, tmp_path / "long.wav", "--no-partial")
    assert "The audio is cut at" in said
    (final,) = records(live)
    assert (
        final["id"] == "long"
        and final["start_s"] == 0
        and final["end_s"] == pytest.approx(len(joined) / 16_000, abs=0.05)
    )
    assert [w["word"] for w in final["words"]] == final["hyp"].split()
    assert final["words"][-1]["start_s"] > 6


def test_align_names_what_it_gives_no_times(
    hearing: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = (tones / "corpus.jsonl", tones / "features.h5", "--split", "dev")
    monkeypatch.setattr(align_module, "LONGEST", 150)
    out, said = stillhouse("align", hearing, *dev, "--textgrid", tmp_path)
    found = [line.split() for line in out.splitlines()]
    assert all(float(row[3]) >= 0.03 for row in found)
    long = 0
    for utterance in read_manifest(dev[0]).select("dev").utterances:
        own = [row[4] for row in found if row[0] == utterance.id]
        if len(soundfile.read(tones / utterance.audio)[0]) > 1.5 * 16_000:
            assert f"{utterance.id}: {len(utterance.text.split())} words have no times, because it lasts" in said
            assert not own and (tmp_path / f"{utterance.id}.TextGrid").exists()
            long += 1
        else:
            assert own == utterance.text.split() and f"{utterance.id}:" not in said
    assert 0 < long < 12
    assert "too few pauses" in said and "(--delay 0)" in said
    moved = stillhouse("align", hearing, *dev, "--delay", 0.3)[0]
    again, said = stillhouse("align", hearing, *dev, "--delay", 0.3)
    assert moved == again != out and "--delay" not in said


def test_a_pipe_gives_what_the_features_give(hearing: Path, tones: Path, tmp_path: Path) -> None:
    dev = (tones / "corpus.jsonl", tones / "features.h5", "--split", "dev")
    expected = {r["id"]: r for r in records(stillhouse("decode", hearing, *dev)[0])}
    for id in ("u61", "u66"):
        path = tones / f"{id[1:]}.wav"
        out, said = stillhouse("decode", hearing, "-", stdin=path.read_bytes())
        *partial, final = records(out)
        assert final["final"] and not any(r["final"] for r in partial)
        assert (final["hyp"], final["words"]) == (expected[id]["hyp"], expected[id]["words"])
        assert final["id"] == "stdin" and "real time" in said
    samples = (soundfile.read(path, dtype="int16")[0]).astype("<i2").tobytes()
    raw, _ = stillhouse("decode", hearing, "-", "--raw", "--format", "text", "--id", "u", stdin=samples)
    assert raw.split() == ["u", *final["hyp"].split()]
    assert stillhouse("decode", hearing, path, "--format", "text")[0].split() == ["66", *final["hyp"].split()]
    slow = tmp_path / "slow.wav"
    soundfile.write(slow, np.zeros(8_000), 8_000)
    stillhouse("decode", hearing, "-", stdin=slow.read_bytes(), error="-r 16000 -c 1")
    stillhouse("decode", hearing, "-", stdin=b"", error="the stream is empty")


def test_results_come_while_the_pipe_is_open_and_ctrl_c_keeps_them(hearing: Path, tones: Path) -> None:
    data = b"".join(soundfile.read(tones / f"{k}.wav", dtype="int16")[0].astype("<i2").tobytes() for k in range(60, 66))
    process = subprocess.Popen(
        command("decode", hearing, "-", "--raw"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(data)
    process.stdin.flush()
    first = json.loads(process.stdout.readline())  # while the other end is open
    assert not first["final"] and first["hyp"]
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate()
    assert process.returncode == 130 and b"interrupted" in said and b"Traceback" not in said
    last = records(rest.decode())[-1]
    assert last["final"] and last["hyp"].startswith(first["hyp"])


def test_a_reader_that_goes_away_is_no_error(hearing: Path, tones: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # as `| head` does
    done = subprocess.run(
        command("decode", hearing, tones / "60.wav"), stdout=write, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    os.close(write)
    assert done.returncode == -signal.SIGPIPE and b"Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--lm-weight", "--blank-penalty", "--ilm-weight", "--lm-unknown", "--segment"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_number_is_refused(option: str, value: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["decode", str(tmp_path), "-", option, value])
    assert result.exit_code == 2 and "is not a finite number" in result.output


@pytest.mark.parametrize(
    "options, words",
    [
        (["corpus.jsonl"], "FEATURES is missing"),
        (["corpus.jsonl", "features.h5", "--raw"], "--raw is for audio"),
        (["corpus.jsonl", "features.h5", "--nbest", 2], "--beam 2 or more"),
        (["corpus.jsonl", "features.h5", "--beam", 2, "--nbest", 2, "--format", "trn"], "--format jsonl"),
        (["corpus.jsonl", "features.h5", "--hotwords", "names.txt"], "--hotwords needs a beam search"),
        (["corpus.jsonl", "features.h5", "--beam", 4, "--hotwords-score", 2], "--hotwords names.txt --hotwords-score"),
        (["corpus.jsonl", "features.h5", "--beam", 4, "--hotwords", "no.txt"], "no.txt: cannot read"),
        (["60.wav", "--split", "dev"], "--split is for a corpus"),
        (["60.wav", "--format", "trn", "--id", "a b"], "white space"),
        (["60.wav", "--chunk", 30], "chunk_frames = 30"),
    ],
)
def test_what_cannot_be_meant_is_refused(hearing: Path, tones: Path, options: list, words: str) -> None:
    args = [str(tones / o) if str(o).endswith((".jsonl", ".h5", ".wav")) else str(o) for o in options]
    stillhouse("decode", hearing, *args, error=words)


def test_two_ids_share_no_textgrid_and_edited_ones_stay(hearing: Path, tones: Path, tmp_path: Path) -> None:
    corpus = read_manifest(tones / "corpus.jsonl").select("dev")
    features = tones / "features.h5"
    grids = tmp_path / "grids"
    command = ("align", hearing, tones / "corpus.jsonl", features, "--split", "dev", "--textgrid", grids)
    for _ in range(2):  # its own files are replaced
        stillhouse(*command)
    edited = grids / f"{corpus.utterances[0].id}.TextGrid"
    assert len(list(grids.iterdir())) == len(corpus)
    edited.write_text(edited.read_text().replace("\n", " \n"))
    before = edited.read_text()
    stillhouse(*command, error="--force")
    assert edited.read_text() == before
    stillhouse(*command, "--force")
    assert edited.read_text() != before
