"""``guard-gateway weights list | stage | unstage | promote | rollback``.

A command changes the state of a weights directory; the gateway that follows it does the work, and the command waits
for what comes of it. Where no gateway runs, ``rollback`` and ``promote --force`` say what the next start serves.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from guard_middleware import config
from guard_middleware.errors import ConfigError
from guard_middleware.weights import manifest, state
from guard_middleware.weights.directory import WeightsDirectory, now
from guard_middleware.weights.state import Refused, Revision, State

_POLL = 0.2
_EPILOG = """examples:
  guard-gateway weights list --config guard.yaml
  guard-gateway weights stage 2026-11 --config guard.yaml       load it beside what serves, golden set, shadow
  guard-gateway weights promote --config guard.yaml             it serves, without a gap
  guard-gateway weights rollback --config guard.yaml            the ones before it serve again
"""
_DANGER = {
    "stage": "--force: its files are not compared with their checksums now nor later; whoever can write there chooses "
    "what your guard lets through",
    "promote": "--force: verdicts that the golden set keeps will change, or files may not be what was measured; the "
    "decision log and the history say that you did this",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``weights`` to the gateway's commands."""
    weights = commands.add_parser(
        "weights",
        help="change the guard's weights while it serves",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(required=True, metavar="COMMAND")
    made = {
        "list": weights.add_parser("list", help="revisions, what serves, what is tried, and what was done"),
        "stage": weights.add_parser("stage", help="load a revision beside what serves, and try it"),
        "unstage": weights.add_parser("unstage", help="end the trial of what is staged"),
        "promote": weights.add_parser("promote", help="what is staged serves"),
        "rollback": weights.add_parser("rollback", help="the weights before serve again"),
    }
    for name, command in made.items():
        where = command.add_mutually_exclusive_group(required=True)
        where.add_argument("--config", metavar="FILE", help="the gateway's configuration, which names the directory")
        where.add_argument("--directory", metavar="DIR", help="the weights directory itself")
        command.add_argument("--guard", default=config.DEFAULT_GUARD, metavar="NAME", help="of `guards` (%(default)s)")
        command.set_defaults(run=partial(_run, name))
    made["list"].add_argument("--json", action="store_true", help="for a script")
    made["stage"].add_argument("revision", metavar="REVISION", help="a folder in the directory, or any folder's path")
    for name in ("stage", "promote"):
        made[name].add_argument("--force", action="store_true", help=_DANGER[name].removeprefix("--force: "))
    for name in ("stage", "promote", "rollback"):
        made[name].add_argument("--no-wait", action="store_true", help="return at once")
        made[name].add_argument("--timeout", type=float, default=900.0, help="seconds to wait (default %(default)g)")


def _run(name: str, arguments: argparse.Namespace) -> int:
    """0 done, 1 tried or refused by the gateway, 2 (``Refused``, ``ConfigError``) not to be done at all."""
    directory = _directory(arguments)
    if getattr(arguments, "force", False):
        print(_DANGER[name], file=sys.stderr)
    command: Callable[[WeightsDirectory, argparse.Namespace], int] = {
        "list": _list,
        "stage": _stage,
        "unstage": _unstage,
        "promote": _promote,
        "rollback": _rollback,
    }[name]
    return command(directory, arguments)


def _directory(arguments: argparse.Namespace) -> WeightsDirectory:
    if arguments.directory:
        return WeightsDirectory(arguments.directory)
    settings = config.load(arguments.config)
    place = {config.DEFAULT_GUARD: settings.worker, **settings.guards}.get(arguments.guard)
    if place is None:
        raise ConfigError(f"no guard `{arguments.guard}`", path=arguments.config, remedy="name one of `guards`")
    if place.weights is None:
        raise ConfigError(
            "this guard has no weights directory",
            path=arguments.config,
            remedy="write worker: {weights: {directory: /srv/guard-weights}}",
        )
    return WeightsDirectory(place.weights.directory, place.model)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


# -- list


def _list(directory: WeightsDirectory, arguments: argparse.Namespace) -> int:
    found, followed = directory.read(), directory.followed()
    roles = {found.active.model: "active"}
    if found.previous is not None:
        roles.setdefault(found.previous.model, "previous")
    if found.staged is not None:
        roles[found.staged.revision.model] = f"staged: {found.staged.phase}"
    known = {str(path): path for path in directory.revisions()}
    models = [*known, *(model for model in roles if model not in known)]
    held = [found.active, found.previous, found.staged.revision if found.staged else None]
    loaded = {one.model: one.revision for one in held if one is not None}
    rows = [_row(model, loaded.get(model), roles.get(model, "")) for model in models]
    if arguments.json:
        told = {"directory": str(directory.folder), "followed": followed, "revisions": rows}
        print(json.dumps({**told, "state": state.encode(found)}, indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False, highlight=False)
    table = Table("name", "revision", "made", "card", "calibration", "role", box=None)
    for row in rows:
        table.add_row(*("yes" if cell is True else "no" if cell is False else cell or "-" for cell in row.values()))
    console.print(table)
    for line in _trial_lines(found):
        console.print(line)
    if not followed:
        console.print("no gateway follows this directory", style="dim")
    for entry in found.history[-8:]:
        why = f": {entry.why.splitlines()[0]}" if entry.why else ""
        console.print(f"{entry.at[:19]}  {entry.by}  {entry.what}  {entry.revision}{why}", style="dim")
    return 0


def _row(model: str, loaded: str | None, role: str) -> dict[str, str | bool | None]:
    folder = Path(model)
    try:
        lineage = json.loads((folder / manifest.LINEAGE).read_text("utf-8"))
        stated, made = str(lineage["revision"]), str(lineage["made"])[:10]
    except (OSError, ValueError, LookupError, TypeError):
        stated, made = None, None
    return {
        "name": folder.name or model,
        "revision": loaded or stated,
        "made": made,
        "card": (folder / manifest.CARD).is_file(),
        "calibration": (folder / manifest.CALIBRATION).is_file(),
        "role": role,
    }


def _trial_lines(found: State) -> list[str]:
    staged = found.staged
    if staged is None:
        return []
    lines = [f"{staged.revision.says()} is staged ({staged.phase}){': ' + staged.why if staged.why else ''}"]
    if staged.golden is not None:
        broken = f", broken: {', '.join(staged.golden.broken)}" if staged.golden.broken else ""
        lines.append(f"golden set: {staged.golden.rows - len(staged.golden.broken)} of {staged.golden.rows}{broken}")
    shadow = staged.shadow
    if shadow.agreed or shadow.stricter or shadow.looser or shadow.failed:
        counts = f"{shadow.agreed} agreed, {shadow.stricter} stricter, {shadow.looser} looser, {shadow.failed} failed"
        lines.append(f"shadow: {counts}")
    return lines


# -- what changes the state


def _stage(directory: WeightsDirectory, arguments: argparse.Namespace) -> int:
    folder = directory.find(arguments.revision)
    sums, why = None, ""
    try:
        sums = manifest.check(folder)
    except manifest.ManifestError as error:
        if not arguments.force:
            raise Refused(f"{error}; --force stages it unchecked") from None
        why = f"forced: {error}"
    told = {manifest.CARD: "card", manifest.CALIBRATION: "calibration: its scores are as the model gives them"}
    for name, what in told.items():
        if not (folder / name).is_file():
            print(f"{folder.name} has no {what}", file=sys.stderr)
    revision = Revision(folder.name, str(folder), sums)
    after = directory.update(partial(state.stage, revision=revision, by=_who(), at=now(), why=why))
    assert after.staged is not None
    id = after.staged.id
    if not directory.followed():
        print(f"staged {folder.name}; no gateway follows {directory.folder}: it is loaded when one starts")
        return 0
    if arguments.no_wait:
        print(f"staged {folder.name}")
        return 0

    def settled(current: State) -> bool:
        staged = current.staged
        return staged is None or staged.id != id or staged.phase in ("ready", "failed")

    found = _wait(directory, arguments.timeout, settled)
    if found.staged is None or found.staged.id != id:
        raise Refused("it was unstaged meanwhile")
    print("\n".join(_trial_lines(found)))
    return int(found.staged.phase == "failed" or bool(found.staged.golden and found.staged.golden.broken))


def _unstage(directory: WeightsDirectory, arguments: argparse.Namespace) -> int:
    directory.update(partial(state.unstage, by=_who(), at=now(), followed=directory.followed()))
    print("nothing is staged")
    return 0


def _promote(directory: WeightsDirectory, arguments: argparse.Namespace) -> int:
    if directory.followed():
        return _order(directory, arguments, partial(state.promote, by=_who(), at=now(), force=arguments.force))
    if not arguments.force:
        raise Refused(
            f"no gateway follows {directory.folder}: start it, so that what is staged is loaded and tried; or --force "
            "makes the next start serve it untried"
        )

    def take(current: State) -> State:
        if current.staged is None:
            raise Refused("nothing is staged; begin with `guard-gateway weights stage NAME`")
        revision = current.staged.revision
        return state.taken(current, revision, "promoted", by=_who(), at=now(), why="forced, untried, no gateway ran")

    return _offline(directory, take)


def _rollback(directory: WeightsDirectory, arguments: argparse.Namespace) -> int:
    if directory.followed():
        return _order(directory, arguments, partial(state.roll_back, by=_who(), at=now()))

    def take(current: State) -> State:
        if current.previous is None:
            raise Refused("there are no previous weights; stage the ones that you want and promote them")
        return state.taken(current, current.previous, "rolled back", by=_who(), at=now(), why="no gateway ran")

    return _offline(directory, take)


def _offline(directory: WeightsDirectory, take: Callable[[State], State]) -> int:
    with directory.following():  # none may start meanwhile
        after = directory.update(take)
    print(f"{after.active.says()} serves from the next start on")
    return 0


def _order(directory: WeightsDirectory, arguments: argparse.Namespace, change: Callable[[State], State]) -> int:
    ordered = directory.update(change)
    if arguments.no_wait:
        print("ordered")
        return 0
    found = _wait(directory, arguments.timeout, lambda s: s.order is None)
    told = [entry for entry in found.history if entry.number > ordered.number]
    for entry in told:
        print(f"{entry.what}: {entry.revision}{f' ({entry.why})' if entry.why else ''}")
    return int(not any(entry.what in ("promoted", "rolled back") for entry in told))


def _wait(directory: WeightsDirectory, seconds: float, until: Callable[[State], bool]) -> State:
    end = time.monotonic() + seconds
    while not until(found := directory.read()):
        if time.monotonic() > end:
            raise Refused(f"not within {seconds:g} s; it goes on, see `guard-gateway weights list`")
        if not directory.followed():
            if until(found := directory.read()):  # it may have done it just before
                return found
            raise Refused("the gateway ended meanwhile; what was active stays active")
        time.sleep(_POLL)
    return found
