"""Run a study, several runs at a time, each in a process of its own. A stopped study resumes.

Guarantees: a done run (trained to its last step, every test split decoded) never starts again, and no run outlives the
process that started it. Runs that cannot be compared stop the study.
Try: `stillhouse study STUDY --jobs 2`, killed and started again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ...data.errors import StaleError, StillhouseError
from ...data.files.atomic import read_plain, write_atomic
from ...data.files.stopping import StopNow, StopRequest
from ...data.files.trouble import in_words
from ..config import Config, load_config
from ..run import identity
from ..run.start import refuse_other_source
from .definition import Definition, Study, StudyRun
from .fusion import WITH_LM, fused_search, hypotheses


class StudyError(StillhouseError):
    """Some runs of a study failed, and the others are done."""


def done(run: StudyRun, study: Study) -> bool:
    """Return whether a run is trained and decoded as the study needs it."""
    try:
        result = json.loads(read_plain(run.folder / "result.json"))
        definition = study.definition
        same = definition.fusion is None or result["fusion"] == definition.fusion.facts
        return same and result["checkpoint"] == definition.checkpoint and set(definition.test) <= set(result["test"])
    except (OSError, ValueError, LookupError, TypeError):  # The file is missing, or no study wrote it.
        return False


def check(study: Study) -> None:
    """Raise StaleError if a folder holds a run with other settings, or if two runs cannot be compared."""
    for run in study.runs:
        settings = run.folder / "config.toml"
        if settings.exists():
            saved = load_config(settings, saved=True)
            identity.refuse_other_settings(saved, run.config, settings)
            if saved.init.source != run.config.init.source:
                origin = (identity.read(run.folder) or {}).get("init")
                refuse_other_source(run.config.init, origin, run.folder, lambda _: None)
    check_identities(study.runs)


def check_identities(runs: Iterable[StudyRun]) -> None:
    """Raise StaleError unless runs have equal identities for one seed, and equal budgets between seeds.

    Runs of all seeds that start from one source have to start from the same weights.
    """
    by_seed: dict[int, tuple[StudyRun, dict]] = {}
    began: dict[tuple[Path | None, str], tuple[StudyRun, str]] = {}
    for run in runs:
        own = identity.read(run.folder)
        if own is None:
            if (run.folder / "checkpoints" / f"step-{run.config.steps:08d}").is_dir():
                raise StaleError(
                    "the run has no identity.json with its data and first weights",
                    where=run.folder,
                    remedy="delete the run, and the study trains it again",
                )
            continue
        other, theirs = by_seed.setdefault(run.seed, (run, own))
        differ = identity.differences(theirs, own)
        if not differ:
            other, theirs = next(iter(by_seed.values()))
            differ = identity.differences({"budget": theirs["budget"]}, {"budget": own["budget"]})
        if not differ and "init" in own:
            init, weights = run.config.init, own["init"]["weights"]
            other, first = began.setdefault((init.source, init.checkpoint), (run, weights))
            differ = [f"{init.source} had the weights {first} and {weights}"] if first != weights else []
        if differ:
            raise StaleError(
                f"{other} and {run} cannot be compared: {'; '.join(differ)}",
                where=run.folder,
                expected="the same data in the same order, the same budget and the same first weights",
                remedy="delete the wrong run, or choose another --out",
            )


def run_study(
    study: Study,
    runs: Sequence[StudyRun],
    *,
    jobs: int,
    on_progress: Callable[[str], None],
    limits: Callable[[], Iterable[str]],
) -> list[str]:
    """Train and decode those of `runs` that are not done, `jobs` at a time. Return a line on each failed run.

    on_progress takes lines of text. `limits` returns lines on what the test sets can show, which go to on_progress as
    soon as the reference arm is done. Raises StaleError if two runs cannot be compared.
    """
    check(study)
    waiting = deque(run for run in runs if not done(run, study))
    on_progress(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done; {jobs} at a time")
    reference = list(study.of(study.against[0])) if waiting else []  # emptied when the limits are known
    working: dict[Connection, tuple[Any, StudyRun]] = {}

    def announce_limits() -> None:
        busy = [run for _, run in working.values()]
        if reference and all(done(run, study) and run not in busy for run in reference):
            reference.clear()
            for line in limits():
                on_progress(line)

    announce_limits()
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                sent = (run.config.model_dump_json(), run.folder, study.definition.model_dump_json())
                arguments = (theirs, *sent, threads)
                process = context.Process(target=_train_and_decode, args=arguments, name=str(run))
                process.start()
                theirs.close()
                working[ours] = (process, run)
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                process, run = working[ready]
                try:
                    message = json.loads(ready.recv_bytes())
                except EOFError:
                    process.join()
                    message = {"end": f"its process ended with exit code {process.exitcode}"}
                if "line" in message:
                    on_progress(f"[{run}] {message['line']}")
                if "begun" in message:
                    check_identities(study.runs)
                if "end" in message:
                    process.join()
                    ready.close()
                    del working[ready]
                    if message["end"] is None:
                        announce_limits()
                    else:
                        failures.append(f"{run}: {message['end']}")
                        on_progress(f"[{run}] failed: {message['end']}")
    finally:
        for process, _ in working.values():
            process.terminate()
        for pipe, (process, run) in working.items():
            with suppress(EOFError, ConnectionError):
                while "line" in (message := json.loads(pipe.recv_bytes())):
                    on_progress(f"[{run}] {message['line']}")
            process.join()
    return failures


def _train_and_decode(out: Connection, config: str, folder: Path, definition: str, threads: int) -> None:
    """Train a run and decode the test splits, in the process of the run."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def send(**message: Any) -> None:
        out.send_bytes(json.dumps(message).encode())

    try:
        settings = Config.model_validate_json(config)
        if threads and not settings.run.threads:
            settings.run.threads = threads
        with StopRequest() as stop:
            from ..loop.trainer import Trainer

            trainer = Trainer(settings, folder, lambda line: send(line=line), stop=stop)
            send(begun=True)
            trainer.run()
            del trainer
            how = Definition.model_validate_json(definition)
            _decode(settings, folder, how, lambda what: send(line=f"decoding {what}"))
            result: dict[str, Any] = {"checkpoint": how.checkpoint, "test": how.test}
            result |= {"fusion": how.fusion.facts} if how.fusion else {}
            write_atomic(folder / "result.json", json.dumps(result) + "\n")
            send(end=None)
    except StopNow:
        send(end=f"stopped by {stop.signal}")
    except StillhouseError as e:
        send(end=str(e))
    except KeyboardInterrupt:
        os._exit(130)  # The study reports it.
    except Exception as e:
        trouble = in_words(e, folder)
        send(end=traceback.format_exc() if trouble is None else str(trouble))


def _decode(config: Config, folder: Path, how: Definition, on_progress: Callable[[str], None]) -> None:
    """Decode every test split, greedily and, with fusion, in beam search."""
    from ...data.manifest import read_manifest
    from ..decode.decode import decoding_loader, transcribe
    from ..decode.greedy import greedy_search
    from ..model.build import resolve_device
    from ..run.load import load_run, trained_on
    from ..score.hypotheses import write_hypotheses

    device = resolve_device(config.run.device)
    model, units, _, step = load_run(folder, how.checkpoint)
    model, corpus = model.to(device), read_manifest(config.data.corpus)

    def loader(split: str) -> Any:
        return decoding_loader(corpus.select(split), config.data.features, units, trained=trained_on(folder))

    def decoded(of: Any, search: Any) -> Iterable[Any]:
        return transcribe(model, of, device=device, longest=config.data.max_frames, search=search)

    searches: dict[str, Any] = {"": greedy_search}
    if how.fusion is not None:
        on_progress(f"{how.fusion.dev} with {how.fusion.lm}, to choose its weights")
        of = {"checkpoint": how.checkpoint, "step": step, "corpus": str(config.data.corpus)}
        searches[WITH_LM] = fused_search(how.fusion, folder, of, model, loader(how.fusion.dev), decoded)
    for suffix, search in searches.items():
        for split in how.test:
            on_progress(split + suffix)
            triples = sorted((h.id, h.ref, h.hyp) for h in decoded(loader(split), search))
            write_hypotheses(hypotheses(folder, split + suffix), triples)


def _exit_with_parent() -> None:
    """End this process with the study's, because the next study would find a running run in its folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(130)
