"""Names of channels: A and B, left and right, or numbers that count from 0 or from 1.

Guarantees: a name that could mean two channels is an error.
Try: `stillhouse corpus import kaldi data/calls corpus.jsonl`, with reco2file_and_channel.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import AudioError

WORDS = {"a": 0, "b": 1, "c": 2, "d": 3, "l": 0, "r": 1, "left": 0, "right": 1}
MIXES = {"", "mix", "mono", "average", "all", "both", "-1"}  # the mean of all channels


class ChannelNames:
    """The names that one list has for channels.

    Arguments:
        names: all names of the list. Numbers count from 0 if a 0 is among them, and from 1 if they are 1 and more.
        first: the number of the first channel, if the kind of list defines it.
        ones: what it is if all numbers are 1. None: unknown, which is an error.
    """

    def __init__(self, names: Iterable[str], first: int | None = None, ones: int | None = None) -> None:
        names = list(names)
        self.known = all(_is_name(_plain(name)) for name in names)  # whether all names can mean a channel
        numbers = {int(name) for name in map(_plain, names) if _is_name(name) and name.isdecimal()}
        if first is None and numbers:
            first = 0 if 0 in numbers else 1 if max(numbers) > 1 else ones
        self._first = first

    def channel(self, name: str | int | None, channels: int, where: object = None) -> int | None:
        """Return the channel from 0 of a file that has so many. None: the file has one, or no channel is named.

        Raises AudioError if the file lacks the channel, or if the name means none or could mean two.
        """
        plain = _plain("" if name is None else str(name))
        if channels == 1 or plain in MIXES:
            return None
        if plain in WORDS:
            channel = WORDS[plain]
        elif not _is_name(plain):
            raise AudioError(f"the channel is {str(name)[:40]!r}", where=where, expected="A, B, or a number")
        elif self._first is None:
            what = f"channel {name} of {channels}: no other line says whether channels count from 0 or from 1"
            raise AudioError(what, where=where, expected="A or B", remedy="name the channels A and B in the list")
        else:
            channel = int(plain) - self._first
        if not 0 <= channel < channels:
            what = f"no channel {name}: the audio has {channels}"
            raise AudioError(what, where=where, remedy="correct the channel in the list")
        return channel


def _is_name(plain: str) -> bool:
    return plain in WORDS or plain in MIXES or (plain.isdecimal() and len(plain) < 4)


def _plain(name: str) -> str:
    name = name.strip().casefold()
    for word in ("channel", "chan", "ch", "side"):
        name = name.removeprefix(word).strip(" _-:")
    return name.removesuffix(".0")
