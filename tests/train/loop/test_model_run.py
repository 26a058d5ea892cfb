"""A run with everything at once (tokens and durations, a joint that multiplies, chunks, intermediate CTC): it learns,
goes on where it was stopped, bit by bit, and hears in a stream what it hears in whole utterances.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import UsageError
from stillhouse.data.features.compute import FeatureFile
from stillhouse.data.manifest import read_manifest
from stillhouse.train.config import load_config
from stillhouse.train.decode.decode import decoding_loader, transcribe
from stillhouse.train.decode.greedy import greedy_search
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.model.streaming import EncoderStream
from stillhouse.train.run.load import load_run

CHANGES = ["loss.kind=tdt", "loss.durations=[0, 1, 2]", "loss.inter_ctc_layers=[1]", "model.joint=multiplicative"]
CHANGES += ["model.predictor=lstm", "model.chunk_frames=32", "model.left_chunks=2", "model.chunk_choices=[16, 32, 0]"]
CHANGES += ["optim.steps=60", "run.eval_every=1000", "run.checkpoint_every=30", "run.log_every=10"]


@pytest.fixture(scope="module")
def run(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "run"
    Trainer(load_config(tones / "run.toml", CHANGES), out).run()
    return out


def test_all_losses_fall(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    for name in ("rnnt", "ctc", "inter_ctc"):
        assert steps[-1][name] < 0.8 * steps[0][name], name


def test_it_goes_on_bit_by_bit(tones: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000060")
    Trainer(load_config(tones / "run.toml", CHANGES), tmp_path / "again").run()
    ours, again = (load_run(path, "last")[0].state_dict() for path in (run, tmp_path / "again"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_a_stream_of_any_pieces_gives_the_words_of_the_whole(tones: Path, run: Path) -> None:
    model, units, _, _ = load_run(run, "last")
    corpus = read_manifest(tones / "corpus.jsonl").select("dev")
    loader = decoding_loader(corpus, tones / "features.h5", units)
    whole = {found.id: found.hyp for found in transcribe(model, loader, device=torch.device("cpu"))}
    features = FeatureFile(tones / "features.h5")
    spoken = 0
    for number, utterance in enumerate(corpus.utterances):
        frames = torch.from_numpy(features.gather([utterance.id], [1.0])[0]).float()
        stream, search = EncoderStream(model.encoder), greedy_search(model, 1)
        for part in frames.split(number + 3):
            states = stream.push(part)
            search.feed(states[None], torch.tensor([len(states)]))
        states = stream.finish()
        search.feed(states[None], torch.tensor([len(states)]))
        ((found,),) = search.finish()
        assert units.decode(found.units) == whole[utterance.id]
        spoken += len(found.units)
    assert spoken > len(whole)


def test_its_words_have_times(tones: Path, run: Path) -> None:
    arguments = [str(v) for v in (run, tones / "corpus.jsonl", tones / "features.h5")]
    found = CliRunner().invoke(cli, ["align", *arguments, "--split", "dev", "--checkpoint", "last"])
    assert found.exit_code == 0, found.output
    words = [line.split()[4] for line in found.stdout.splitlines()]
    texts = [u.text for u in read_manifest(tones / "corpus.jsonl").select("dev").utterances]
    assert sorted(words) == sorted(word for text in texts for word in text.split())


@pytest.mark.parametrize("option", [("--beam", "4"), ("--lm", "words.arpa"), ("--blank-penalty", "1")])
def test_tokens_and_durations_have_no_beam_and_it_says_so(tones: Path, run: Path, option: tuple[str, str]) -> None:
    arguments = [str(v) for v in (run, tones / "corpus.jsonl", tones / "features.h5", *option)]
    found = CliRunner().invoke(cli, ["decode", *arguments])
    assert isinstance(found.exception, UsageError) and "--beam 1, without --lm" in str(found.exception)
    assert not found.stdout
