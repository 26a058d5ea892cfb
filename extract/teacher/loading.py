"""Read a model's folder or a model of the Hugging Face hub, and say in words what is wrong with it.

Guarantees: whatever a folder, the hub, or transformers objects to becomes a TeacherError. A hub that cannot be reached
costs seconds, and models in the cache still load. No pickle is read.
Try: `pytest tests/extract/teacher/test_loading.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...data.errors import StillhouseError, TeacherError
from .text.judge import require_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLED = "load and save_pretrained it on a machine where you trust the file: pickled weights are never read here"
HUB_SECONDS = 5.0  # to wait for the hub's first answer
_CONVERT = "stillhouse teacher convert SOURCE OUT makes such a folder"
_TRUST = "read that code, then allow it by name: --trust-remote-code MODEL"
_SAVE = "copy a folder that save_pretrained of transformers wrote"


def first_line(e: BaseException) -> str:
    """Return the kind of an exception and the first line of its message."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0]:.300}" if lines else type(e).__name__


def check_folder(source: str) -> None:
    """Raise TeacherError for a file, a folder that is missing, or one whose files cannot be those of a model."""
    folder = Path(source)
    if folder.is_file():
        raise TeacherError("this is a file", where=source, expected="a folder with safetensors", remedy=_CONVERT)
    if not folder.is_dir() or not source.strip():
        if _is_path(source):
            raise TeacherError("there is no such folder", where=source, expected="a model's folder", remedy=_SAVE)
        return
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and any(folder.glob("*.gguf")):
        raise TeacherError("this folder has no weights", where=source, expected="*.safetensors", remedy=_CONVERT)
    if not (folder / "config.json").is_file():
        raise TeacherError("this folder has no config.json", where=source, expected="a model's folder", remedy=_SAVE)
    if not weights:
        raise TeacherError("this folder has no weights", where=source, expected="*.safetensors", remedy=PICKLED)
    _check_weights(folder, weights)


def _is_path(source: str) -> bool:
    """Whether a name can only be meant as a path. A name on the hub has at most one slash, inside it."""
    parts = Path(source).parts
    return not source.strip() or source[0] in "./~\\" or source[-1] in "/\\" or len(parts) > 2 or "\\" in source


def _check_weights(folder: Path, weights: list[Path]) -> None:
    """Raise TeacherError for a file of weights that is cut or damaged, or that is missing."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as e:
            what = f"this file of weights is damaged or cut: {first_line(e)}"
            raise TeacherError(what, where=path, remedy="copy it again, and compare its size with the source's") from e
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise TeacherError(f"this index of weights is damaged: {first_line(e)}", where=index, remedy=_SAVE) from e
    missing = sorted(str(name) for name in names if not (folder / str(name)).is_file())
    if missing:
        what = f"files of weights are missing: {', '.join(missing[:3])} ({len(missing)} in all)"
        raise TeacherError(what, where=folder, remedy="copy the whole folder")


def read_pretrained(source: str, *, dtype: Any, use_safetensors: bool | None = None, **options: Any) -> Any:
    """Return (backbone, tokenizer) as transformers reads them, without progress bars and advice on stderr.

    `source` is a local path or a hub name. Of an encoder-decoder, the backbone is its encoder. Raises TeacherError as
    `load_teacher` does.
    """
    gguf = "gguf_file" in options
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with objections(source, options):
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(source, **options)
        if Path(source).is_dir() and not gguf:
            require_tokenizer(Path(source))
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        kind = _model_class(config)
        model, info = kind.from_pretrained(
            source, config=config, use_safetensors=use_safetensors, dtype=dtype, output_loading_info=True, **options
        )
        if config.is_encoder_decoder and hasattr(model, "get_encoder"):
            model = model.get_encoder()
            model.config = config  # not every encoder has its own
    refuse_missing([k for k in info["missing_keys"] if "pooler" not in k], source)
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def objections(source: str, options: dict[str, Any]) -> Iterator[None]:
    """Raise TeacherError for whatever transformers objects to inside, without progress bars and advice on stderr.

    If the hub cannot be reached, `options` get local_files_only.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf = "gguf_file" in options
    try:
        if not Path(source).is_dir() and not _hub_answers(source, options.get("revision")):
            options["local_files_only"] = True
        yield
    except StillhouseError:
        raise
    except Exception as e:
        where = str(Path(source) / options["gguf_file"]) if gguf else source
        raise _in_words(e, where, gguf, "trust_remote_code" in options) from e


def refuse_missing(names: Iterable[str], source: str) -> None:
    """Raise TeacherError if there are weights that the model has and its file lacks. They would be random."""
    if missing := sorted(names):
        shown = f"{', '.join(missing[:3])} ({len(missing)} in all)"
        raise TeacherError(f"its file lacks weights of the model: {shown}", where=source)


def read_config(source: str, revision: str | None = None) -> Any:
    """Return the configuration of a model, or None if it cannot be read without running code of its repository.

    Raises TeacherError if the hub cannot be reached, and the model is not in the cache either.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        if not Path(source).is_dir():
            options |= {"revision": revision, "local_files_only": not _hub_answers(source, revision)}
        return AutoConfig.from_pretrained(source, **options)
    except StillhouseError:
        raise
    except Exception:  # What a configuration can be is as various as models are.
        return None


def _model_class(config: Any) -> Any:
    """The class to load: the model's backbone, or the encoder alone where transformers has a class for it."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    named = (getattr(config, "architectures", None) or [""])[0]
    encoder = str(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, ""))
    for name in (named, encoder):
        if name.endswith("EncoderModel") and hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _hub_answers(source: str, revision: str | None) -> bool:
    """Whether the hub can be reached. Raises TeacherError if not, and the model is not in the cache either."""
    from huggingface_hub import constants, get_session, try_to_load_from_cache
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(source)
    if constants.is_offline_mode():
        return True  # transformers reads the cache only
    url = f"{constants.ENDPOINT}/{source}/resolve/{revision or 'main'}/config.json"
    try:
        get_session().head(url, timeout=HUB_SECONDS)
    except Exception as e:
        if not isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
            raise _unreachable(source, f"{constants.ENDPOINT} does not answer ({first_line(e)})") from e
        return False
    return True


def commit_of(source: str, revision: str | None) -> str | None:
    """Return the commit of a model of the hub that has just been read; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    path = None if Path(source).is_dir() else try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _unreachable(source: str, why: str) -> TeacherError:
    return TeacherError(
        f"there is no folder of this name, the cache of the hub does not have it, and {why}",
        where=source,
        expected="a model's folder, or a name on the Hugging Face hub that can be reached",
        remedy=f"where there is internet, run `hf download {source} --local-dir FOLDER`, copy FOLDER here and give "
        "--teacher FOLDER, or --encoder FOLDER for features. If you copied the cache instead (HF_HOME), set "
        "HF_HUB_OFFLINE=1",
    )


def _chain(e: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while e is not None and e not in found:
        found.append(e)
        e = e.__cause__ or e.__context__
    return found


def _in_words(e: Exception, where: str, gguf: bool, may_trust: bool) -> TeacherError:
    """What an exception of transformers or of the hub's client means."""
    from huggingface_hub import constants, errors

    chain = _chain(e)

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(c, kinds) for c in chain)

    text = " ".join(str(c) for c in chain)
    page = f"{constants.ENDPOINT}/{where}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if found(errors.GatedRepoError) or "trying to access a gated repo" in text:
        remedy = f"accept its conditions at {page}, then {login}"
        return TeacherError("this model is gated: its makers must grant you access", where=where, remedy=remedy)
    if found(errors.RepositoryNotFoundError) or "is not a local folder and is not a valid model" in text:
        what = "there is no folder and no public model on the hub of this name"
        return TeacherError(what, where=where, remedy=f"check the name. If the model is private, {login}")
    if found(errors.RevisionNotFoundError) or "is not a valid git identifier" in text:
        what, remedy = "the model has no such revision", f"choose one of {page}/tree/main"
        return TeacherError(what, where=where, expected="a branch, a tag or a commit", remedy=remedy)
    if found(errors.OfflineModeIsEnabled) or (constants.is_offline_mode() and found(errors.LocalEntryNotFoundError)):
        return _unreachable(where, "HF_HUB_OFFLINE=1 forbids to ask the hub")
    if found(errors.LocalEntryNotFoundError) or "couldn't connect to" in text:
        return _unreachable(where, "the hub cannot be reached")
    if "trust_remote_code" in text:
        return TeacherError("it needs its own code to run", where=where, remedy=_TRUST if may_trust else None)
    if "does not recognize this architecture" in text:
        remedy = "pip install -U transformers, or use another teacher"
        return TeacherError(f"cannot be loaded: {first_line(e)}", where=where, remedy=remedy)
    remedy = PICKLED if "safetensors" in str(e) else "give a folder with config.json, or a name on the hub"
    if isinstance(e, ImportError):
        remedy = "install the package that it names"
    elif isinstance(e, MemoryError) or "not enough memory" in text or "out of memory" in text:
        remedy = "use a smaller model, or --model-dtype bfloat16"
    return TeacherError(f"cannot be loaded: {first_line(e)}", where=where, remedy=None if gguf else remedy)
