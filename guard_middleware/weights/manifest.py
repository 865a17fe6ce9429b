"""``SHA256SUMS`` of a revision's folder, as ``guard-train publish`` writes it and ``sha256sum -c`` reads it.

Refuses (``ManifestError``): no checksums, or such as are no text, a file that is missing, changed or not named there,
a name that leads out of the folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from guard_middleware.errors import GuardMiddlewareError

SUMS, CARD, CALIBRATION, LINEAGE = "SHA256SUMS", "README.md", "calibration.json", "lineage.json"


class ManifestError(GuardMiddlewareError):
    """A folder that is not the revision that its checksums name."""


def fingerprint(folder: Path) -> str:
    """The SHA-256 of the checksums themselves: it names the revision with all its files. Reads nothing else."""
    return hashlib.sha256(_read(folder)).hexdigest()


def check(folder: Path) -> str:
    """Compares every file of the folder; returns ``fingerprint``. Takes about a second per 2 GB."""
    data = _read(folder)
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ManifestError(f"{folder / SUMS}: is no text; copy the revision again") from None
    wanted = {name: sum for sum, _, name in (line.partition("  ") for line in lines)}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {SUMS}
    for name in sorted(wanted.keys() | present):
        if name not in wanted:
            raise ManifestError(f"{folder / name}: not in {SUMS}; take it out, or make the revision again")
        if name not in present:
            raise ManifestError(f"{folder / name}: missing, though {SUMS} names it; copy the revision again")
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted[name]:
                raise ManifestError(f"{folder / name}: changed since {SUMS} was written; copy the revision again")
    return hashlib.sha256(data).hexdigest()


def _read(folder: Path) -> bytes:
    try:
        return (folder / SUMS).read_bytes()
    except OSError:
        raise ManifestError(
            f"{folder}: no {SUMS}; make a revision of it: `guard-train publish {folder} --results FILE --output DIR`"
        ) from None
