"""Text without sound: what it trains, its perplexity against counts by hand, and that nothing else changes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from stillhouse.cli import cli
from stillhouse.data.errors import ConfigError, CorpusError, NoStoreError, StaleError, StillhouseError
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.data.units import BLANK, Units
from stillhouse.train.config import learning_rate, load_config, transfer_weights
from stillhouse.train.loop.text import perplexity
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.model.build import build_model
from stillhouse.train.model.transducer import Transducer
from stillhouse.train.report.run import read_run, render, run_curves
from stillhouse.train.run.load import load_run
from stillhouse.train.run.ranks import ALONE

CLOCK = {"time", "seconds", "realtime", "share", "memory"}
QUIET = ["run.loggers=['jsonl']", "run.eval_every=1000", "run.checkpoint_every=1000"]


def text(texts: Path, *changes: str) -> list[str]:
    return [*QUIET, f"data.corpus={texts}", "text.split=text", "text.lines=16", *changes]


def run(tones: Path, out: Path, changes: list[str]) -> list[dict]:
    Trainer(load_config(tones / "run.toml", changes), out).run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_run(out, "last")[0].state_dict()


def equal(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def by_hand(model: Transducer, units: Units, texts: list[str]) -> float:
    """The perplexity of a unit: step by step as in decoding, and a softmax in NumPy without the blank."""
    log_p, count = 0.0, 0
    for written in texts:
        state = model.predictor.initial(1, torch.device("cpu"))
        for unit in units.encode(written).ids.tolist():
            hidden = torch.tanh(model.joint.predictor(model.predictor.step(state)))
            scores = model.joint.output(hidden)[0].double().numpy()
            assert unit != BLANK
            log_p += scores[unit] - np.log(np.exp(np.delete(scores, BLANK)).sum())
            count += 1
            state = model.predictor.advance(state, torch.tensor([unit]), torch.tensor([True]))
    return math.exp(-log_p / count)


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
def test_the_perplexity_of_dev_is_that_counted_by_hand(
    tones: Path, texts: Path, tmp_path: Path, predictor: str
) -> None:
    changes = text(texts, "text.pretrain_steps=6", "optim.steps=2", f"model.predictor={predictor}", "text.lines=5")
    lines = [line for line in run(tones, tmp_path / "run", changes) if line["kind"] == "dev"]
    assert [sorted(line) for line in lines] == [
        ["kind", "step", "text_perplexity"],
        ["cer", "kind", "rnnt", "step", "text_perplexity", "wer"],
    ]
    model, units, _, step = load_run(tmp_path / "run", "last")
    dev = [u.text for u in read_manifest(texts).select("dev").utterances]
    assert step == lines[-1]["step"] == 8
    assert lines[-1]["text_perplexity"] == pytest.approx(by_hand(model, units, dev), rel=1e-5)
    with torch.no_grad():
        model.joint.output.weight.zero_()
        model.joint.output.bias.zero_()
    assert by_hand(model, units, dev) == pytest.approx(units.size - 1)


@torch.no_grad()
def test_unknown_symbols_of_dev_are_context_and_do_not_count(tones: Path, texts: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_config(tones / "run.toml", text(texts)), tmp_path / "run")

    def found(*written: str) -> float:
        encoded = [trainer.units.encode(t) for t in written]
        return perplexity(trainer.model, encoded, trainer.config, trainer.device, ALONE)

    both, first = found("ab7cd"), found("ab")
    state = trainer.model.predictor(torch.tensor([trainer.units.encode("ab7cd").ids.tolist()]))
    scores = trainer.model.joint.internal(trainer.model.joint.predictor(state[:, 3:5]))[0]
    cost = -sum(float(row[unit]) for row, unit in zip(scores, trainer.units.encode("cd").ids.tolist()))
    assert both == pytest.approx(math.exp((2 * math.log(first) + cost) / 4), rel=1e-5)
    assert math.isnan(found("77"))


def test_text_alone_teaches_the_counts_of_its_bigrams(tones: Path, tmp_path: Path) -> None:
    """A predictor of one unit can learn nothing else: 3 of 4 words are ab, 1 of 4 is cd."""
    words = ["ab", "ab", "ab", "cd"]
    lines = [" ".join(np.random.default_rng(i).permutation(words * 3).tolist()) for i in range(40)]
    corpus = read_manifest(tones / "corpus.jsonl")
    spoken = [u.model_copy(update={"audio": str(corpus.audio_path(u))}) for u in corpus.utterances]
    held = spoken[-1].model_copy(update={"text": " ".join(lines), "split": "held"})  # the texts, as if they were one
    silent = [Utterance(id=f"t{i}", text=t, split="text") for i, t in enumerate(lines)]
    write_manifest(tmp_path / "corpus.jsonl", [*spoken[:-1], held, *silent])
    changes = text(tmp_path / "corpus.jsonl", "model.predictor_context=1", "text.lines=64", "optim.steps=0")
    changes += ["text.pretrain_steps=150", "data.dev=held", "optim.lr=0.03", "model.dropout=0", "run.log_every=50"]
    lines_of_run = run(tones, tmp_path / "run", changes)
    follow: dict[str, Counter] = {}
    for first, second in zip(" " + held.text, held.text):
        follow.setdefault(first, Counter())[second] += 1
    cost = [n * math.log(sum(after.values()) / n) for after in follow.values() for n in after.values()]
    expected = math.exp(sum(cost) / len(held.text))
    assert lines_of_run[-1]["text_perplexity"] == pytest.approx(expected, rel=0.01)
    assert lines_of_run[-1]["text_perplexity"] > expected * (1 - 1e-6)  # no model of one unit does better


def test_text_alone_leaves_the_encoder_and_the_blank_is_no_unit_of_it(tones: Path, texts: Path, tmp_path: Path) -> None:
    lines = run(
        tones, tmp_path / "run", text(texts, "text.pretrain_steps=12", "optim.steps=0", "optim.weight_decay=0.1")
    )
    assert lines[-2]["text"] < 0.9 * lines[0]["text"] and "rnnt" not in lines[-2]
    assert lines[-2]["loss"] == lines[-2]["text"] and lines[-2]["step"] == 12
    model, units, config, _ = load_run(tmp_path / "run")
    first = build_model(config, units.size).state_dict()
    now = {k: v for k, v in model.state_dict().items() if "feature_" not in k}
    changed = {k for k, v in now.items() if not torch.equal(v, first[k])}
    assert changed == {k for k in now if k.startswith(("predictor.", "joint.predictor.", "joint.output."))}
    assert torch.equal(now["joint.output.bias"][BLANK], first["joint.output.bias"][BLANK])
    scores = model.joint.internal(torch.randn(3, config.model.joint_dim))
    assert scores[:, BLANK].isneginf().all() and torch.allclose(scores.exp().sum(-1), torch.ones(3))


def test_weight_0_is_a_run_without_text_bit_by_bit(tones: Path, texts: Path, tmp_path: Path) -> None:
    run(tones, tmp_path / "none", [*QUIET, "optim.steps=6"])
    zero = run(tones, tmp_path / "zero", text(texts, "text.weight=0", "optim.steps=6"))
    some = run(tones, tmp_path / "some", text(texts, "text.weight=0.5", "optim.steps=6"))
    assert equal(tmp_path / "none", tmp_path / "zero") and not equal(tmp_path / "none", tmp_path / "some")
    assert "text" not in zero[0] and "text_perplexity" in zero[-1]
    first = some[0]
    assert first["loss"] == pytest.approx(first["rnnt"] + 0.3 * first["ctc"] + 0.5 * first["text"], rel=1e-5)
    # The first step's speech, its masks and its dropout, are those of the run without text.
    assert (first["rnnt"], first["ctc"]) == (zero[0]["rnnt"], zero[0]["ctc"])
    identities = [json.loads((tmp_path / n / "identity.json").read_text()) for n in ("none", "some")]
    assert identities[0] == {k: v for k, v in identities[1].items() if k != "text"} and "text" in identities[1]


def test_a_run_resumes_bit_by_bit_also_within_the_steps_of_text(tones: Path, texts: Path, tmp_path: Path) -> None:
    """Stopped after each step, in the middle of windows and epochs of text."""
    changes = text(texts, "text.pretrain_steps=5", "optim.steps=4", "run.log_every=2", "run.checkpoint_every=1")
    changes += ["optim.ema=0.9", "run.eval_every=4", "text.lines=40", "text.batch_units=400"]
    whole = run(tones, tmp_path / "whole", changes)

    class Stop(Exception):
        pass

    for step in range(1, 10):
        trainer = Trainer(load_config(tones / "run.toml", changes), tmp_path / "parts")
        assert trainer.step == step - 1

        def stop_after(save=trainer.save, trainer=trainer, step=step) -> None:
            save()
            if trainer.step == step and trainer.saved == trainer._version() and not trainer.dev_due:
                raise Stop

        trainer.save = stop_after  # type: ignore[method-assign]
        with pytest.raises(Stop):
            trainer.run()
    Trainer(load_config(tones / "run.toml", changes), tmp_path / "parts").run()
    names = sorted(p.name for p in (tmp_path / "whole/checkpoints/step-00000009").iterdir())
    for name in names:
        a, b = (tmp_path / n / "checkpoints/step-00000009" / name for n in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes(), name
    last = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()][-1]
    assert {k: v for k, v in last.items() if k not in CLOCK} == whole[-1]


def test_schedules_begin_again_with_the_speech(texts: Path, tones: Path) -> None:
    lambdas = ["transfer.stores=x", "transfer.views=y", "transfer.weight=0.5", "transfer.warmup_steps=4"]
    changes = [*text(texts, "text.pretrain_steps=10", "optim.steps=20"), *lambdas]
    with_text, without = (load_config(tones / "run.toml", c) for c in (changes, ["optim.steps=20", *lambdas]))
    assert (with_text.steps, without.steps) == (30, 20)
    assert [learning_rate(10 + n, with_text) for n in range(20)] == [learning_rate(n, without) for n in range(20)]
    rates = [learning_rate(n, with_text) for n in range(10)]
    assert rates == pytest.approx([3e-3 * min(1, (n + 1) / 5) for n in range(10)])
    assert [transfer_weights(10 + n, with_text) for n in range(9)] == [transfer_weights(n, without) for n in range(9)]
    assert transfer_weights(3, with_text) == {"": 0.5}


def test_a_predictor_transfer_learns_from_text_and_no_other_does(
    tones: Path, texts: Path, states: Path, tmp_path: Path
) -> None:
    views = [f"transfer.stores={states}", "transfer.lm.views=minilm/alone/6", "transfer.lm.aligner=predictor"]
    views += ["transfer.lm.weight=0.5", "transfer.att.views=minilm/alone/6", "transfer.att.aligner=attention"]
    changes = text(texts, "text.pretrain_steps=12", "optim.steps=1", "text.weight=0.2", "optim.weight_decay=0.1")
    lines = run(tones, tmp_path / "run", [*changes, *views, "run.checkpoint_every=12"])
    *alone, both = [line for line in lines if line["kind"] == "train"]
    for line in alone:
        assert line["loss"] == pytest.approx(line["text"] + 0.5 * line["text_transfer.lm"], rel=1e-5)
        assert line["text_transfer_skipped.lm"] == 0 and "text_transfer.att" not in line
    assert alone[-1]["text_transfer.lm"] < 0.95 * alone[0]["text_transfer.lm"]
    speech = both["rnnt"] + 0.3 * both["ctc"] + 0.5 * both["transfer.lm"] + both["transfer.att"]
    assert both["loss"] == pytest.approx(speech + 0.2 * (both["text"] + 0.5 * both["text_transfer.lm"]), rel=1e-5)
    begun = Trainer(load_config(tones / "run.toml", [*changes, *views]), tmp_path / "other")
    after = tmp_path / "run/checkpoints/step-00000012"
    for name, module in begun.transfers.items():
        kept = load_file(after / f"transfer.{name}.safetensors")
        assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items()) == (name == "att")


def test_texts_that_the_store_lacks_are_named_or_skipped(
    tones: Path, texts: Path, states: Path, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.jsonl"
    write_manifest(path, [*read_manifest(texts).utterances, Utterance(id="new", text="ab cd", split="text")])
    views = [f"transfer.stores={states}", "transfer.views=minilm/alone/6", "transfer.aligner=predictor"]
    changes = [*text(path, "text.pretrain_steps=1", "optim.steps=0", "text.lines=500"), *views]
    with pytest.raises(NoStoreError, match="no states of new"):
        run(tones, tmp_path / "run", changes)
    line = run(tones, tmp_path / "skip", [*changes, "transfer.on_missing=skip"])[0]
    assert line["text_transfer_skipped"] == 1 and line["batch"] == 151


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["text.weight=0.2"], r"text\.weight needs text\.split"),
        (["text.pretrain_steps=9"], r"text\.pretrain_steps needs text\.split"),
        (["text.split=text", "model.joint=multiplicative"], r"text\.split needs model\.joint = additive"),
        (["text.split=text", "optim.steps=0"], r"optim\.steps: Input should be greater than 0"),
        (["text.split=text", "text.line=3"], r"text\.line: no such setting; did you mean text\.lines"),
    ],
)
def test_settings_that_cannot_be_are_refused(tones: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tones / "run.toml", changes)


def test_texts_that_cannot_be_learned_are_counted_and_named(tones: Path, texts: Path, tmp_path: Path) -> None:
    known = read_manifest(texts).utterances
    odd = {"empty": " ", "strange": "abc 7 d", "long": "ab " * 40}
    more = [Utterance(id=id, text=t, split="odd") for id, t in odd.items()]
    path = tmp_path / "corpus.jsonl"
    write_manifest(path, [*known, *more, Utterance(id="fine", text="ab", split="odd")])
    said: list[str] = []
    changes = [f"data.corpus={path}", "text.split=odd,dev", "text.max_units=100"]
    trainer = Trainer(load_config(tones / "run.toml", [*QUIET, *changes]), tmp_path / "run", said.append)
    assert trainer.text is not None and [u.id for u in trainer.text.loader.utterances] == ["fine"]
    assert said[0] == (
        "text: 1 texts without audio, 2 units (left out: 12 with audio: u60, u61, u62 and 9 more; 1 empty: empty; "
        "1 with symbols that the units lack: strange; 1 longer than 100 units: long)"
    )
    with pytest.raises(CorpusError, match="none of the 60 utterances of split train is a text without audio"):
        Trainer(load_config(tones / "run.toml", [*QUIET, "text.split=train"]), tmp_path / "other")
    with pytest.raises(CorpusError, match="no utterance has split nowhere"):
        Trainer(load_config(tones / "run.toml", [*QUIET, "text.split=nowhere"]), tmp_path / "other")


def test_a_text_without_a_finite_loss_changes_nothing_and_is_named(tones: Path, texts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    changes = text(texts, "text.pretrain_steps=2", "optim.steps=4", "run.bad_steps=2", "text.lines=2")
    trainer = Trainer(load_config(tones / "run.toml", changes), tmp_path / "run", said.append)
    with torch.no_grad():
        trainer.model.joint.output.bias.fill_(float("nan"))
    before = trainer.model.predictor.embedding.weight.clone()
    with pytest.raises(StillhouseError, match="2 steps in a row have no finite loss and gradient"):
        trainer.run()
    assert torch.equal(trainer.model.predictor.embedding.weight, before)
    named = next(line for line in said if line.startswith("step 0: skipped, no finite loss: t"))
    kept = load_file(tmp_path / "run/bad/step-0.safetensors")
    assert "step-0.safetensors" in named and kept["targets"].shape[0] == 2 and not kept["features"].numel()


def test_other_texts_than_the_run_began_with_are_refused_by_name(tones: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(texts.read_bytes())
    changes = text(path, "text.pretrain_steps=2", "optim.steps=2")
    run(tones, tmp_path / "run", changes)
    known = read_manifest(path).utterances
    write_manifest(path, [u.model_copy(update={"text": "dd"}) if u.id == "t7" else u for u in known])
    with pytest.raises(StaleError, match=r"text\.transcripts: .*other text: t7"):
        Trainer(load_config(tones / "run.toml", changes), tmp_path / "run")
    with pytest.raises(StaleError, match=r"text\.weight: 0\.3 in the run, 0\.7"):
        Trainer(load_config(tones / "run.toml", [*changes, "text.weight=0.7"]), tmp_path / "run")


def test_a_run_of_text_alone_gives_others_its_predictor(tones: Path, texts: Path, tmp_path: Path) -> None:
    run(tones, tmp_path / "lm", text(texts, "text.pretrain_steps=20", "optim.steps=0", "run.seed=9"))
    taken = [f"init.source={tmp_path / 'lm'}", "init.parts=predictor,joint"]
    run(tones, tmp_path / "run", [*QUIET, *taken, "optim.steps=1", "optim.lr=1e-9"])
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "lm")
    for name in ("predictor.embedding.weight", "joint.predictor.weight", "joint.output.weight"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-6)
    blocks = [name for name in ours if name.startswith("encoder.blocks.") and ours[name].dim() > 1]
    assert blocks and not any(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in blocks)
    for name, said in {"lm": True, "run": False}.items():
        decoded = [tmp_path / name, texts, tones / "features.h5", "--split", "dev", "--max-symbols", 1]
        result = CliRunner().invoke(cli, ["decode", *map(str, decoded)])
        assert result.exception is None and ("step 20 have learnt text alone" in result.stderr) == said
    frozen = text(texts, *taken, "init.freeze=predictor,joint")
    with pytest.raises(ConfigError, match=r"text\.split has no weight to train"):
        Trainer(load_config(tones / "run.toml", frozen), tmp_path / "frozen")


def test_the_page_of_a_run_shows_text_and_perplexity(tones: Path, texts: Path, tmp_path: Path) -> None:
    run(tones, tmp_path / "run", text(texts, "text.pretrain_steps=4", "optim.steps=4", "run.log_every=2"))
    page = read_run(tmp_path / "run")
    assert page.facts.steps == page.facts.step == 8 and page.facts.last is not None
    assert page.facts.last["text_perplexity"] > 1 and page.facts.best == page.facts.last
    captions = [caption for caption, _ in run_curves(page.metrics)]
    assert "Text without sound: loss per unit" in captions and "Perplexity of a unit on dev" in captions
    assert "text.pretrain_steps" in render(page) or "pretrain_steps" in render(page)
    run(tones, tmp_path / "lm", text(texts, "text.pretrain_steps=4", "optim.steps=0"))
    assert read_run(tmp_path / "lm").facts.best is None and render(read_run(tmp_path / "lm"))
