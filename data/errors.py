"""The errors of the package. The command line turns them into messages and exit codes.

Guarantees: an error names what is wrong, where, what was expected and what to do.
Try: `stillhouse --help` shows the exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

STOPPED = 143  # the exit code after SIGTERM or SIGUSR1, of a command that resumes when it is repeated


class StillhouseError(Exception):
    """Base of all errors of the package.

    Arguments:
        what: what is wrong, a sentence without the full stop.
        where: a path, `path:line` or an utterance id.
        expected: what would have been right.
        remedy: what to do, with a command if there is one.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: object = None, expected: str | None = None, remedy: str | None = None
    ) -> None:
        self.what, self.where, self.expected, self.remedy = what, where, expected, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        if self.expected is not None:
            text += f" (expected {self.expected})"
        if self.remedy is not None:
            text += f"; {self.remedy}"
        return text

    def __reduce__(self) -> tuple:
        # By default exceptions pickle their positional arguments only. These cross processes with all fields.
        rebuild = partial(type(self), self.what, where=self.where, expected=self.expected, remedy=self.remedy)
        return rebuild, ()


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first few of many names, for an error."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class UsageError(StillhouseError):
    """A setting or an argument is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A TOML file or a --set is wrong."""


class CorpusError(StillhouseError):
    """A manifest, a transcript or an audio file is wrong."""


class AudioError(CorpusError):
    """Audio is missing or cannot be read, or it does not match the manifest."""


class FeatureError(StillhouseError):
    """A feature file is missing, damaged or made with other settings."""


class StoppedError(StillhouseError):
    """A signal stopped the work, which resumes when the command is repeated. The command has said so."""

    exit_code = STOPPED


class PartialError(StillhouseError):
    """Some utterances failed. The others are done."""

    exit_code = 3


class StoreError(StillhouseError):
    """A store is damaged or cannot be written."""


class NoStoreError(StoreError):
    """A store, view or utterance does not exist."""

    exit_code = 10


class LockedError(StoreError):
    """Another process is writing."""

    exit_code = 11


class StaleError(StoreError):
    """The stored data was made with other settings, or from another text."""

    exit_code = 12


class TeacherError(StillhouseError):
    """A language model cannot be loaded, or does not fit the request."""


class CheckpointError(StillhouseError):
    """A checkpoint is missing, damaged or from another run."""


class ExportError(StillhouseError):
    """A model cannot be written in a format, or the written model has other outputs."""
