"""Which texts a space before the first word belongs to: those in scripts that write spaces between words.

Guarantees: the answer depends on the text alone.
Try: `pytest tests/extract/teacher/test_leading_space.py`.
"""

from __future__ import annotations

import re

CHOICES = ("auto", "yes", "no")  # of --leading-space

# Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le, New Tai Lue, Tai Tham, Balinese, Han with its radicals, kana, Bopomofo,
# Yi, Javanese, Cham, Tai Viet, halfwidth katakana.
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029"
    "\u3031-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa00-\uaadf"
    "\uf900-\ufaff\uff66-\uff9f\U00016ff0-\U00018cff\U0001aff0-\U0001b16f\U00020000-\U0003ffff]"
)


def writes_spaces(text: str) -> bool:
    """Return False if the first letter of a text is of a script without spaces between words, as Chinese or Thai."""
    if text.isascii():
        return True
    first = next((c for c in text if c.isalpha()), "")
    return _SPACELESS.match(first) is None
