"""Commands of `stillhouse` in the process of a test, as a user types them."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from stillhouse.cli import cli


def stillhouse(*args: object, code: int = 0, error: type[Exception] | None = None, match: str = "") -> Result:
    """Run a command. It has to end with `code`, or to raise `error` with a message that `match` is found in."""
    result = CliRunner().invoke(cli, [str(a) for a in args])
    if error is not None:
        with pytest.raises(error, match=match):
            assert result.exception is not None
            raise result.exception
    else:
        assert result.exit_code == code, (result.output, result.exception)
    return result
