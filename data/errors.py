"""The one hierarchy of errors; the CLI alone turns them into messages and exit codes.

Invariant: every error says what is wrong, where (utterance id, path, line), what was expected and what to do next.
Exercised by every command; see `stillhouse --help` for the exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence


class StillhouseError(Exception):
    """Base of all errors that a user can meet.

    `what` is a sentence without the full stop; `where` a path, `path:line` or an utterance id; `expected` what
    would have been right; `remedy` what to do, a command where there is one.
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
        # Exceptions pickle by positional arguments alone; ours cross process boundaries with their fields.
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.remedy))


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, for an error."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rebuild(cls: type, what: str, where: object, expected: str | None, remedy: str | None) -> StillhouseError:
    return cls(what, where=where, expected=expected, remedy=remedy)


class UsageError(StillhouseError):
    """A setting or an argument that cannot be meant."""

    exit_code = 2


class ConfigError(UsageError):
    """A TOML file or a --set that does not validate."""


class CorpusError(StillhouseError):
    """A manifest, transcript or audio file that is not what it should be."""


class AudioError(CorpusError):
    """Audio that is missing, unreadable or not where the manifest says."""


class FeatureError(StillhouseError):
    """A feature file that is missing, damaged or made with other settings."""


class PartialError(StillhouseError):
    """Some utterances failed; the others are done."""

    exit_code = 3


class StoreError(StillhouseError):
    """A store that is damaged or cannot be written."""


class NoStoreError(StoreError):
    """There is no store, view or utterance at that address."""

    exit_code = 10


class LockedError(StoreError):
    """Someone else is writing."""

    exit_code = 11


class StaleError(StoreError):
    """What is stored was made with other settings, or from another text."""

    exit_code = 12


class TeacherError(StillhouseError):
    """A language model that cannot be loaded or does not fit the request."""


class CheckpointError(StillhouseError):
    """A checkpoint that is missing, damaged or foreign."""


class ExportError(StillhouseError):
    """A model that cannot be written in a format, or does not say there what it says here."""
