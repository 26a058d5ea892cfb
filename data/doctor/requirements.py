"""Which libraries Stillhouse asks for: by the checkout's setup.cfg, or by the installed package's own list.

Invariant: there is no second list of dependencies; what setup.cfg gains, `stillhouse doctor` looks at.
Exercised by: `stillhouse doctor`.
"""

from __future__ import annotations

import configparser
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"
_NAME = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*([^;]*)")


@dataclass(frozen=True)
class Need:
    """A distribution as pip names it, in versions as ">=2.11,<2.15"; `extra` None: needed always."""

    name: str
    versions: str
    extra: str | None

    @property
    def remedy(self) -> str:
        return f"pip install '{self.name}{self.versions}'" if self.extra is None else install(self.extra)


def install(extra: str) -> str:
    return f"pip install 'stillhouse[{extra}]'"


def needs() -> list[Need]:
    """All of them, those that are always needed first. Empty where neither list can be found."""
    found = _of_checkout() or _of_package()
    return sorted(found, key=lambda n: (n.extra is not None, n.extra or "", n.name))


def _of_checkout() -> list[Need]:
    config = configparser.ConfigParser()
    try:
        config.read(SETUP, encoding="utf-8")
        if config["metadata"]["name"] != "stillhouse":
            return []
        lines: dict[str | None, str] = {None: config["options"]["install_requires"]}
        lines.update(config["options.extras_require"])
    except (configparser.Error, KeyError, OSError, UnicodeDecodeError):
        return []
    return [need for extra, text in lines.items() for line in text.splitlines() for need in _need(line, extra)]


def _of_package() -> list[Need]:
    try:
        lines = metadata.requires("stillhouse") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", line)
        found += _need(line, extra[1] if extra else None)
    return found


def _need(line: str, extra: str | None) -> list[Need]:
    match = _NAME.match(line)
    return [] if match is None else [Need(match[1], match[2].replace(" ", ""), extra)]


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is absent or says nothing of itself."""
    try:
        return metadata.version(name)
    except Exception:  # a half-removed package may raise anything
        return None


def satisfies(version: str, versions: str) -> bool:
    """Whether a version is one of those asked for; true where nothing here can tell."""
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(versions).contains(version, prereleases=True)
    except Exception:  # no packaging, or a version that is none
        return True


def module(name: str) -> str:
    """What to import of a distribution: what it says, or else its name with underscores."""
    plain = name.lower().replace("-", "_").replace(".", "_")
    try:
        files = metadata.files(name) or []
    except Exception:
        files = []
    tops = {f.parts[0].removesuffix(".py") for f in files if f.suffix == ".py" and len(f.parts) <= 2}
    tops = {t for t in tops if t.isidentifier() and not t.startswith("_")}
    same = [t for t in sorted(tops) if t.lower() == plain]
    return (same or [t for t in sorted(tops) if t.lower() in plain] or [plain])[0]
