"""What fails in requests to an object store: which kind of failure it is, and the words for it.

Guarantees: what another attempt cannot change is told from what it can, and each kind names what helps.
Try: `pytest tests/extract/store/test_remote_faults.py -k words`.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile

from ..disk.checksums import checksum_error, has_checksum

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_KINDS = {
    "missing": {"FileNotFoundError", "NotFoundError"},
    "exists": {"AlreadyExistsError", "PreconditionError", "NotModifiedError"},
    "denied": {"PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError"},
}
_CODES = {
    "NoSuchBucket": "bucket",
    "ExpiredToken": "denied",
    "InvalidToken": "denied",
    "RequestTimeTooSkewed": "clock",
    "AuthorizationHeaderMalformed": "region",
    "PermanentRedirect": "region",
    "IllegalLocationConstraintException": "region",
}
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_TRANSIENT = {408, 409, 429}
# what is wrong, what was expected, and what helps, by kind
WORDS = {
    "bucket": ("there is no such bucket: {}", "a bucket that exists", "see the URL and AWS_ENDPOINT_URL"),
    "clock": ("the object store refuses: {}", "a clock that is right", "set the clock of this machine"),
    "region": ("the object store refuses: {}", "the region of the bucket", "set AWS_REGION"),
    "credentials": (
        "there are no credentials for the object store: {}",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "set both (aws configure export-credentials --format env prints them), or AWS_SKIP_SIGNATURE=true for a "
        "public bucket",
    ),
    "denied": (
        "the object store refuses: {}",
        "credentials that may read it",
        "see AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    "refused": ("the object store refuses: {}", "an answer", "see AWS_ENDPOINT_URL and AWS_REGION"),
    "unreachable": ("the object store cannot be reached: {}", "an answer", "see AWS_ENDPOINT_URL and AWS_REGION"),
    "damaged": (
        "the bytes that come are not those of the object: {}",
        "bytes with the MD5 that its etag is, or with their own checksum",
        "look for what changes them on the way: a proxy, or the server of AWS_ENDPOINT_URL",
    ),
    "failed": (
        "the object store does not answer: {}",
        "an answer",
        "see AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; what was committed is safe, "
        "the same command resumes",
    ),
}


class RequestFailed(Exception):
    """A request had no success. `kind` is missing, exists (a condition was not met), or a key of `WORDS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DamagedAnswer(Exception):
    """Other bytes came than the object has."""


def kind_of(e: Exception, answered: bool) -> str:
    """Return the kind of a failure (see RequestFailed)."""
    if isinstance(e, DamagedAnswer):
        return "damaged"
    text = str(e)
    code, status = _CODE.search(text), _STATUS.search(text)
    names = {c.__name__ for c in type(e).__mro__}
    if code is not None and code[1] in _CODES:
        return _CODES[code[1]]
    if "redirect without LOCATION" in text:
        return "region"
    bare = not any(os.environ.get(name) for name in _CREDENTIALS)
    if bare and ("/latest/" in text or (not answered and isinstance(e, TimeoutError))):
        return "credentials"  # The service of a cloud's machines, which was asked for credentials, has none.
    kind = next((kind for kind, errors in _KINDS.items() if names & errors), None)
    if kind is not None:
        return "credentials" if kind == "denied" and bare else kind
    if isinstance(e, TimeoutError) or "kind: Connect" in text or "dns error" in text:
        return "unreachable"
    if status is not None and 400 <= int(status[1]) < 500 and int(status[1]) not in _TRANSIENT:
        return "refused"
    return "failed"


def in_one_line(e: Exception) -> str:
    """Return what a failure says, in one line: the server's code and message where it gives them."""
    text = str(e)
    lines = [line for line in text.splitlines() if line.strip()] or ["no answer came in time"]
    first = lines[0].strip().split("<?xml")[0].rstrip(" :")[:300]
    said = [m[1] for m in (_CODE.search(text), _MESSAGE.search(text)) if m is not None]
    cause = re.search(r'"(tcp connect error|dns error)"', text)
    return ": ".join([first, *said, *([cause[1]] if cause else [])])


def proves_itself(key: str, data: bytes) -> bool | None:
    """Whether an object is what was written, by a checksum of its own; None where it has none."""
    name = key.rsplit("/", 1)[-1]
    if name.endswith(".npz"):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return archive.testzip() is None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
            return False
    if not name.endswith(".json"):
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if checksum_error(value, name) is not None:
        return False
    return True if has_checksum(value, name) else None
