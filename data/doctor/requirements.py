"""The libraries that Stillhouse asks for, read from the metadata of its installation.

Guarantees: there is no second list of dependencies beside setup.cfg, from which the metadata comes.
Try: `stillhouse doctor`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*([^;]*)")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)""")


@dataclass(frozen=True)
class Need:
    """A distribution as pip names it, with its versions as ">=2.11,<2.15". `extra` is None if it is always needed."""

    name: str
    versions: str
    extra: str | None

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install '{self.name}{self.versions}'" if self.extra is None else install(self.extra)

    @property
    def module(self) -> str:
        """The module to import."""
        return {"mlflow-skinny": "mlflow"}.get(self.name, self.name.replace("-", "_").replace(".", "_"))


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'stillhouse[{extra}]'"


def needs() -> list[Need]:
    """Return all requirements, those that are always needed first. The list is empty if nothing is installed."""
    try:
        lines = metadata.requires("stillhouse") or []
    except metadata.PackageNotFoundError:
        return []
    requirements = []
    for line in lines:
        if match := _REQUIREMENT.match(line):
            extra = _EXTRA.search(line)
            requirements.append(Need(match[1], match[2].replace(" ", ""), extra[1] if extra else None))
    return sorted(requirements, key=lambda n: (n.extra is not None, n.extra or "", n.name))


def installed(name: str) -> str | None:
    """Return the version of a distribution, or None if it is absent or does not name its version."""
    try:
        return metadata.version(name)
    except Exception:  # A half-removed package may raise anything.
        return None


def satisfies(version: str, versions: str) -> bool:
    """Return whether a version is one of `versions`. Return True if that cannot be decided here."""
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(versions).contains(version, prereleases=True)
    except Exception:  # packaging is absent, or the version does not follow its rules.
        return True
