"""Small real teachers built here (random weights, trained tokenizers), corpora, and one extracted store."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3
import torch

from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store.remote import client as objects_module
from stillhouse.extract.teacher.model import Teacher, load_teacher


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bytes are compared across processes here, and a matrix product's last bits depend on its number of threads."""
    torch.set_num_threads(1)


TEXTS = [
    "the old kettle sang while the rain fell on the roof",
    "she would not wear it there",
    "a knight rode through the night",
    "",
    "their boat was over there by the weir",
    "naïve café owners say 你好 to 😀 every morning",
    "I saw a sore seal sealed in a sea of sighs",
    "we",
    "the whole of the hole was full of the flour and the flower and the flow of it all went on and on until the tea "
    "was cold and the bread was old and the tale was told and the bell had tolled and all the gold was sold",
    "it's done",
]


@functools.cache
def sentences() -> list[str]:
    return [f"{a} {b}" for a in TEXTS if a for b in TEXTS if b]


def make_corpus(texts: list[str] | None = None, per_session: int = 4, path: str = "corpus.jsonl") -> Corpus:
    """Utterances u0, u1, … in sessions of `per_session`."""
    texts = TEXTS * 3 if texts is None else texts
    return Corpus(
        Path(path), [Utterance(id=f"u{i}", text=t, session=f"s{i // per_session}") for i, t in enumerate(texts)]
    )


def byte_bpe() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tok.train_from_iterator(sentences(), trainer)
    return tok


def metaspace_bpe() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    plain = [s.encode("ascii", "ignore").decode() for s in sentences()]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special)
    tok.train_from_iterator(plain, trainer)
    return tok


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with absolute positions, a final norm, byte-level BPE and no BOS of its own."""
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2Model(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=byte_bpe(), eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with rotary positions, a final RMS norm, and sentencepiece-style BPE with byte fallback."""
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=420,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    LlamaModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=metaspace_bpe(), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT over wordpieces, for tests in which the weights do not matter and time does."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    from tokenizers import BertWordPieceTokenizer

    wordpieces = BertWordPieceTokenizer(lowercase=True)
    wordpieces.train_from_iterator(sentences(), vocab_size=300)
    wordpieces.save_model(str(folder))
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=wordpieces.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        initializer_range=0.2,  # so that context matters to it
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@functools.cache
def loaded(folder: Path, window: int | None = None) -> Teacher:
    return load_teacher(str(folder), device="cpu", window=window)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A store of the tiny BERT: layers 0, 1 and 2, alone and both:4, float16."""
    root = tmp_path_factory.mktemp("stores") / "small"
    extract(root, make_corpus(), loaded(bert), Request("bert", [0, 1, 2], ["alone", "both:4"]))
    return root


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3.moto() as port:
        yield port


@pytest.fixture(scope="module")
def through(server: int) -> Iterator[s3.Proxy]:
    proxy = s3.Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(through: s3.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    """A cache of its own, and an endpoint that this test may harm."""
    through.reset()
    for name, value in s3.settings(through.url, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    yield through
    objects_module.close_all()
