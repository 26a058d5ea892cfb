"""A study that decodes with a language model as well, as `stillhouse decode` does by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import stillhouse

from stillhouse.data.errors import ConfigError
from stillhouse.data.manifest import read_manifest
from stillhouse.train.decode.lm.tuned import read_tuned
from stillhouse.train.score.hypotheses import read_hypotheses
from stillhouse.train.study.definition import load_study
from stillhouse.train.study.runs import done
from stillhouse.train.study.table import tabulate

STUDY = """
base = "run.toml"
seeds = [1]
test = ["train"]
[settings]
optim.steps = 150
run.eval_every = 1000
run.log_every = 50
[arms.none]
[fusion]
lm = "LM"
beam = 3
"""


@pytest.fixture(scope="module")
def language_model(tones: Path) -> Path:
    """Every word of the corpus, the first one of the alphabet ten times as likely as the others."""
    words = sorted({word for u in read_manifest(tones / "corpus.jsonl").utterances for word in u.text.split()})
    lines = ["\\data\\", f"ngram 1={len(words) + 3}", "", "\\1-grams:", "-99 <s>", "-1 </s>", "-4 <unk>"]
    lines += [f"{-1.0 if word == words[0] else -2.0} {word}" for word in words]
    path = tones / "words.arpa"
    path.write_text("\n".join([*lines, "", "\\end\\", ""]))
    return path


def test_each_run_chooses_its_weights_on_dev_and_is_decoded_a_second_time(
    tones: Path, language_model: Path, tmp_path: Path
) -> None:
    path, out = tones / "fused.toml", tmp_path / "out"
    path.write_text(STUDY.replace("LM", str(language_model)))
    stillhouse("study", path, "--out", out)
    study = load_study(path, out)
    (run,) = study.runs
    assert done(run, study) and [row.split for row in tabulate(study).rows] == ["train", "train with lm"]
    (choice,) = read_tuned(run.folder)
    assert (choice.split, choice.beam, sorted(choice.weights)) == ("dev", 3, ["ilm-weight", "lm-weight"])
    corpus, features = run.config.data.corpus, run.config.data.features
    own = ["--split", "train", "--checkpoint", "last", "--beam", "3", "--lm", language_model]
    by_hand = stillhouse("decode", run.folder, corpus, features, *own)
    assert choice.words in by_hand.stderr
    theirs = {h["id"]: h["hyp"] for h in map(json.loads, by_hand.stdout.splitlines())}
    assert len(set(theirs.values())) > 3
    assert {id: hyp for id, _, hyp in read_hypotheses(run.hypotheses("train with lm"))} == theirs
    greedy = {id: hyp for id, _, hyp in read_hypotheses(run.hypotheses("train"))}
    assert greedy.keys() == theirs.keys()
    # Without the result, the run decodes again, and the weights stay those beside it.
    kept = (run.folder / "tuned.json").stat().st_mtime_ns
    (run.folder / "result.json").unlink()
    stillhouse("study", path, "--out", out)
    assert (run.folder / "tuned.json").stat().st_mtime_ns == kept and done(run, study)
    # Another language model is another result.
    language_model.write_text(language_model.read_text().replace("-2.0", "-2.1"))
    (tones / "other.arpa").write_bytes(language_model.read_bytes())
    path.write_text(STUDY.replace("LM", str(tones / "other.arpa")))
    assert not done(run, load_study(path, out))


def test_weights_are_not_chosen_on_a_test(tones: Path, tmp_path: Path) -> None:
    path = tones / "fused-wrong.toml"
    path.write_text(STUDY.replace('"train"', '"dev"'))
    with pytest.raises(ConfigError, match=r"\[fusion\] chooses weights on dev, which is a test"):
        load_study(path, tmp_path)
