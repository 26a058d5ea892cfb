"""Start, end and duration of a segment, from the columns of a table or the keys of a line.

Guarantees: a time of 0 counts as given. End and duration must agree if both are given. A column that looks like a time
and is not read is named.
Try: `stillhouse corpus import csv segments.csv corpus.jsonl --start-column from --end-column to`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ...errors import CorpusError

AGREE_S = 0.02  # Times are often rounded to hundredths.
# The usual names of a column, folded by `fold`. The first that a source has counts.
TIMES: dict[str, tuple[str, ...]] = {
    "start": (
        *("start_s", "start", "offset", "begin", "start_time", "starttime", "begin_time", "onset", "start_sec"),
        *("start_seconds", "start_secs", "begin_s", "offset_s", "offset_sec", "offset_seconds", "t_start", "tmin"),
        *("xmin", "segment_start", "start_ms", "begin_ms", "offset_ms", "start_time_ms"),
    ),
    "end": (
        *("end_s", "end", "stop", "end_time", "endtime", "stop_time", "end_sec", "end_seconds", "end_secs", "stop_s"),
        *("t_end", "tmax", "xmax", "segment_end", "end_ms", "stop_ms", "end_time_ms"),
    ),
    "duration": (
        *("duration_s", "duration", "seconds", "dur", "duration_sec", "duration_seconds", "duration_secs", "dur_s"),
        *("segment_duration", "duration_ms", "dur_ms"),
    ),
}
# Words of other names that may be such times.
_WORDS = {
    "start": {"start", "begin", "beginning", "onset", "offset", "from", "starts", "begins", "tmin", "xmin"},
    "end": {"end", "stop", "finish", "to", "until", "till", "ends", "stops", "tmax", "xmax"},
    "duration": {"duration", "dur", "seconds", "secs", "length", "len", "milliseconds", "samples"},
    "time": {"time", "times", "timestamp", "timestamps"},
}
_MILLISECONDS = re.compile(r"(?:.*_)?(?:ms|msec|msecs|millis|milliseconds)")


class SegmentError(CorpusError):
    """A segment is not inside its recording, or its times do not agree."""


def fold(name: str) -> str:
    """Return the name of a column in small letters, with "_" for anything else but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "_", name.strip().casefold()).strip("_")


def seconds(value: Any, name: str) -> float | None:
    """Return a time of column `name` in seconds, and None if it is empty. Columns named …_ms hold milliseconds.

    Raises CorpusError if it is not a time.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise CorpusError(f"{name} is {str(value)[:40]!r}", expected="seconds")
    try:
        number = float(value)
    except ValueError as e:
        raise CorpusError(f"{name}: {str(e)[:80]}", expected="seconds, with a point before decimals") from None
    if _MILLISECONDS.fullmatch(fold(name)):
        number /= 1000
    if not abs(number) < 1e9:
        raise CorpusError(f"{name} is {str(value)[:40]!r}", expected="seconds")
    return number


def segment(start: float | None, end: float | None, duration: float | None) -> tuple[float, float | None]:
    """Return (start, duration) in seconds. A start of None is 0, and a duration of None reaches to the end.

    Raises SegmentError if the end is not behind the start, or if end and duration do not agree.
    """
    begin = 0.0 if start is None else start
    if end is None:
        return begin, duration
    if end <= begin:
        raise SegmentError(f"the end, {end:g} s, is not behind the start, {begin:g} s", remedy="correct the times")
    span = round(end - begin, 6)
    if duration is not None and abs(span - duration) > AGREE_S:
        what = f"from {begin:g} to {end:g} s are {span:g} s, but the duration is {duration:g} s"
        raise SegmentError(what, expected="times that agree", remedy="correct one, or leave one column out")
    return begin, span


def unread(names: Iterable[str], read: Iterable[str], chosen: Iterable[str], is_number: Callable[[str], bool]) -> dict:
    """Return {column: field of TIMES that it may be, or "time"} of columns that look like times and are not read.

    Arguments:
        names: all columns that no field uses.
        read: the fields that have a column.
        chosen: the fields whose column the user chose, or switched off. Columns like those are left alone.
        is_number: whether a column holds numbers. Others are no times.
    """
    found, known = {}, set(read)
    for name in names:
        parts = set(fold(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).split("_"))
        fields = [field for field, words in _WORDS.items() if parts & words]
        # "offset" is a start in most lists, but the end beside an "onset".
        field = "end" if fields == ["start"] and parts & {"offset"} and "start" in known else next(iter(fields), None)
        if field is not None and field not in chosen and is_number(name):
            found[name] = field
    return found
