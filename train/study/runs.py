"""The runs of a study, several at a time, each in a process of its own; stopped, the study goes on where it was.

Invariant: a run that is done (trained to its last step, every test split decoded) is never begun again, and no run
goes on after the process that began it is gone. Runs that cannot be compared stop the study.
Exercised by: `stillhouse study STUDY --jobs 2`, killed and started again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ...data.errors import StaleError, StillhouseError
from ...data.files.atomic import read_plain, write_atomic
from ..config import Config, load_config
from ..run import identity
from .definition import Study, StudyRun

Say = Callable[[str], None]


class StudyError(StillhouseError):
    """Some runs of a study failed; the others are done."""


def hypotheses(run: StudyRun, split: str) -> Path:
    return run.folder / f"hyp-{split}.jsonl"


def done(run: StudyRun, study: Study) -> bool:
    """Whether a run is trained and decoded as the study wants it."""
    try:
        result = json.loads(read_plain(run.folder / "result.json"))
        return result["checkpoint"] == study.definition.checkpoint and set(study.definition.test) <= set(result["test"])
    except (OSError, ValueError, LookupError, TypeError):  # a file that is not ours
        return False


def check(study: Study) -> None:
    """Raises StaleError where a folder holds another run than the study's, or runs cannot be compared."""
    refuse_other_settings(study.runs)
    refuse_unlike(study.runs)


def refuse_other_settings(runs: Iterable[StudyRun]) -> None:
    """Raises StaleError for a folder that holds a run with other settings than the study's."""
    from ..run.identity import refuse_other_settings as refuse

    for run in runs:
        settings = run.folder / "config.toml"
        if settings.exists():
            refuse(load_config(settings, saved=True), run.config, settings)


def refuse_unlike(runs: Iterable[StudyRun]) -> None:
    """Raises StaleError where runs that have begun differ in data, budget or first weights, naming what differs.

    Of one seed everything must be equal; between seeds, the budget.
    """
    first: dict[int, tuple[StudyRun, dict]] = {}
    for run in runs:
        found = identity.read(run.folder)
        if found is None:
            if done_training(run):
                raise StaleError(
                    "a run that says nothing of its data and first weights",
                    where=run.folder,
                    remedy="delete it; the study makes it again",
                )
            continue
        other, theirs = first.setdefault(run.seed, (run, found))
        differ = identity.differences(theirs, found)
        if not differ and first:
            other, theirs = next(iter(first.values()))
            differ = identity.differences({"budget": theirs["budget"]}, {"budget": found["budget"]})
        if differ:
            raise StaleError(
                f"{other} and {run} cannot be compared: {'; '.join(differ)}",
                where=run.folder,
                expected="the same data in the same order, the same budget and the same first weights",
                remedy="delete the run that is not meant, or give --out another folder",
            )


def done_training(run: StudyRun) -> bool:
    return (run.folder / "checkpoints" / f"step-{run.config.optim.steps:08d}").is_dir()


def run_study(
    study: Study, runs: Sequence[StudyRun], *, jobs: int, say: Say, limits: Callable[[], Iterable[str]]
) -> list[str]:
    """Make those of `runs` that are not done, `jobs` at a time. Returns what went wrong, a line a failed run.

    limits   lines on what the test sets can show, said as soon as the arm that tells it, the first, is done
    Errors: StaleError as soon as two runs cannot be compared.
    """
    check(study)
    waiting = deque(run for run in runs if not done(run, study))
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done; {jobs} at a time")
    unsaid = list(study.of(study.against[0])) if waiting else []
    working: dict[Connection, tuple[Any, StudyRun]] = {}

    def foretell() -> None:
        busy = [run for _, run in working.values()]
        if unsaid and all(done(run, study) and run not in busy for run in unsaid):
            unsaid.clear()
            for line in limits():
                say(line)

    foretell()
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                config = run.config.model_dump_json()
                arguments = (theirs, config, run.folder, study.definition.test, study.definition.checkpoint, threads)
                process = context.Process(target=_work, args=arguments, name=str(run))
                process.start()
                theirs.close()
                working[ours] = (process, run)
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                process, run = working[ready]
                try:
                    message = json.loads(ready.recv_bytes())
                except EOFError:
                    message = {"end": f"its process ended with exit code {_ended(process)}"}
                if "line" in message:
                    say(f"[{run}] {message['line']}")
                if "begun" in message:
                    refuse_unlike(study.runs)
                if "end" in message:
                    process.join()
                    ready.close()
                    del working[ready]
                    if message["end"] is None:
                        foretell()
                    else:
                        failures.append(f"{run}: {message['end']}")
                        say(f"[{run}] failed: {message['end']}")
    finally:
        for process, _ in working.values():
            process.terminate()
        for process, _ in working.values():
            process.join()
    return failures


def _ended(process: Any) -> int | None:
    process.join()
    return process.exitcode


def _work(out: Connection, config: str, folder: Path, test: list[str], checkpoint: str, threads: int) -> None:
    """In the process of a run: train it, decode the test splits."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    def tell(**message: Any) -> None:
        out.send_bytes(json.dumps(message).encode())

    try:
        settings = Config.model_validate_json(config)
        if threads and not settings.run.threads:
            settings.run.threads = threads
        from ..loop.trainer import Trainer

        trainer = Trainer(settings, folder, lambda line: tell(line=line))
        tell(begun=True)
        trainer.run()
        del trainer
        for split in test:
            tell(line=f"decoding {split}")
            _decode(settings, folder, split, checkpoint)
        write_atomic(folder / "result.json", json.dumps({"checkpoint": checkpoint, "test": test}) + "\n")
        tell(end=None)
    except StillhouseError as e:
        tell(end=str(e))
    except KeyboardInterrupt:
        os._exit(130)  # the study says so
    except Exception:
        tell(end=traceback.format_exc())


def _decode(config: Config, folder: Path, split: str, checkpoint: str) -> None:
    from ...data.manifest import read_manifest
    from ..decode.decode import decoding_loader, transcribe
    from ..model.build import resolve_device
    from ..run.load import load_run
    from ..score.hypotheses import write_hypotheses

    device = resolve_device(config.run.device)
    model, units, _, _ = load_run(folder, checkpoint)
    loader = decoding_loader(read_manifest(config.data.corpus).select(split), config.data.features, units)
    triples = sorted((h.id, h.ref, h.hyp) for h in transcribe(model.to(device), loader, device=device))
    write_hypotheses(folder / f"hyp-{split}.jsonl", triples)


def _leave_with_parent() -> None:
    """A study that is killed must not leave runs behind, which the next one would meet in their folders."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(130)
