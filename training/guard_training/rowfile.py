"""What the commands that write a file of rows share: settings that a resumed command must repeat, images in place.

Refuses: going on with an output that was begun with other settings or other inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from guard_training.corpus.rows import Row


class OutputError(ValueError):
    """An output that cannot be gone on with; the message says what to do instead."""


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def begin(output: Path, settings: Mapping[str, Any]) -> bool:
    """Notes a command's settings beside its output; True where the output is gone on with.

    Raises ``OutputError`` where it was begun with others, naming those that differ.
    """
    note = output.with_name(f"{output.name}.settings.json")
    text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
    if note.is_file():
        begun = json.loads(note.read_text("utf-8"))
        wanted = json.loads(text)
        other = sorted(key for key in begun.keys() | wanted.keys() if begun.get(key) != wanted.get(key))
        if other:
            raise OutputError(
                f"{output} was begun with other settings ({', '.join(other)}): "
                f"repeat them, delete it and {note.name}, or give another --output"
            )
        return True
    if output.exists():
        raise OutputError(f"{output} exists and no {note.name} says how it was made; give another --output")
    write_whole(note, text.encode() + b"\n")
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, and the folder it is in, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # /dev/stdout is written to, not replaced
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a file of one value, for people to read too."""
    # backslashreplace: half of a surrogate pair has no UTF-8, but a JSON escape
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_whole(path, text.encode(errors="backslashreplace") + b"\n")


def kept_json(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, as JSON keeps it (a tuple is a list); a run that goes on gets what ``path`` holds."""
    if not path.exists():
        write_whole(path, json.dumps(make()).encode())
    return json.loads(path.read_text(encoding="utf-8"))


def bring_image(row: Row, folder: Path) -> Row:
    """The row with its image inside ``folder``: left there, or linked (else copied) to ``images/<digest>``."""
    if row.image is None or row.image.resolve().is_relative_to(folder.resolve()):
        return row
    target = folder / "images" / f"{digest(row.image)[:32]}{row.image.suffix.lower()}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            os.link(row.image.resolve(), part)
        except OSError:
            shutil.copyfile(row.image, part)
        part.replace(target)
    return replace(row, image=target)
