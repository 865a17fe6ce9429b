"""Which weights serve, which are tried beside them, and what was done to them: one frozen value and its changes.

A change is a function of the state that gives the next one, or raises ``Refused``. No I/O, no clock: times come in as
ISO text. Operators stage, unstage, promote and roll back; the gateway that follows the state says what came of it.
Only ``promoted``, ``reverted`` and ``taken`` change what is active, and each writes a history entry.

An order (promote, roll back) is carried out by the gateway. Until it is, the old weights are active: whatever is killed
before that, ``recovered`` drops the order and everything starts on the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from guard_middleware.errors import GuardMiddlewareError

#: newest entries that the state keeps; the decision log has them all
HISTORY = 200
#: who the gateway is in the history
GATEWAY = "gateway"

Phase = Literal["new", "loading", "ready", "failed"]
What = Literal["promote", "roll back"]


class Refused(GuardMiddlewareError):
    """A change that the state does not allow; the message says what to do instead."""


@dataclass(frozen=True, slots=True)
class Revision:
    """Weights by what a worker's ``--model`` takes. ``sums`` is the SHA-256 of their SHA256SUMS, None where nobody
    compared the files with it; ``revision`` what the worker calls them, None until one has loaded them."""

    name: str
    model: str
    sums: str | None = None
    revision: str | None = None

    def says(self) -> str:
        return f"{self.name} ({self.revision})" if self.revision else self.name


@dataclass(frozen=True, slots=True)
class Golden:
    """What came of the golden set: ids of the rows whose verdict was not kept, benign ones first."""

    rows: int
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shadow:
    """Live questions put to both: ``stricter`` is harmful only to the staged weights, ``looser`` only to the active."""

    agreed: int = 0
    stricter: int = 0
    looser: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Staged:
    """``id`` tells one staging from the next. ``golden`` None: not run (a revision that has served needs none)."""

    id: int
    revision: Revision
    phase: Phase = "new"
    why: str = ""
    golden: Golden | None = None
    shadow: Shadow = Shadow()


@dataclass(frozen=True, slots=True)
class Order:
    what: What
    by: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    number: int
    at: str
    by: str
    what: str
    revision: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class State:
    active: Revision
    staged: Staged | None = None
    previous: Revision | None = None
    order: Order | None = None
    history: tuple[Entry, ...] = ()

    @property
    def number(self) -> int:
        """Of the newest entry."""
        return self.history[-1].number if self.history else 0

    def noted(self, at: str, by: str, what: str, revision: Revision, why: str = "") -> State:
        entry = Entry(self.number + 1, at, by, what, revision.says(), why[:500])
        return replace(self, history=(*self.history, entry)[-HISTORY:])


# -- what operators ask for


def stage(state: State, revision: Revision, *, by: str, at: str, why: str = "") -> State:
    """Tries ``revision`` beside the active one; it takes the place of what was staged. A folder that serves, or served
    before, keeps its files: without them there would be no way back."""
    _free(state)
    if same(revision, state.active):
        raise Refused(f"{revision.name} is active already")
    for used in (state.active, state.previous):
        if used is not None and used.model == revision.model and used.sums not in (None, revision.sums):
            raise Refused(
                f"the files in {used.model} are others than those of {used.says()}, which was promoted from there; put "
                "them back, and stage the new ones from a folder of their own"
            )
    staged = Staged(_next_id(state), revision)
    return replace(state, staged=staged).noted(at, by, "staged", revision, why)


def unstage(state: State, *, by: str, at: str, followed: bool = True) -> State:
    """``followed`` False: no gateway is there to carry out an order, which is dropped too."""
    if followed:
        _free(state)
    if state.staged is None:
        raise Refused("nothing is staged")
    return replace(state, staged=None, order=None).noted(at, by, "unstaged", state.staged.revision)


def promote(state: State, *, by: str, at: str, force: bool = False) -> State:
    """Orders that the staged weights serve."""
    _free(state)
    staged = state.staged
    if staged is None:
        raise Refused("nothing is staged; begin with `guard-gateway weights stage NAME`")
    if staged.phase == "failed":
        raise Refused(f"{staged.revision.name} could not be staged ({staged.why}); stage it again")
    if staged.phase != "ready":
        raise Refused(f"{staged.revision.name} is not loaded yet; see `guard-gateway weights list`")
    if staged.golden is None or staged.golden.broken:
        broken = ", ".join(staged.golden.broken[:5]) if staged.golden else "it was not run"
        if not force:
            raise Refused(f"{staged.revision.name} does not keep the golden set ({broken}); --force promotes it anyway")
    why = "forced" if force else ""
    return replace(state, order=Order("promote", by, force)).noted(at, by, "promotion ordered", staged.revision, why)


def roll_back(state: State, *, by: str, at: str, force: bool = False) -> State:
    """Orders that the previous weights serve again: they are staged in place of what was, without a golden set."""
    _free(state)
    if state.previous is None:
        raise Refused("there are no previous weights; stage the ones that you want and promote them")
    staged = Staged(_next_id(state), state.previous)
    order = Order("roll back", by, force)
    return replace(state, staged=staged, order=order).noted(at, by, "rollback ordered", state.previous)


def taken(state: State, revision: Revision, what: str, *, by: str, at: str, why: str = "") -> State:
    """``revision`` is active from the next start on: what an operator does where no gateway runs."""
    if same(revision, state.active):
        raise Refused(f"{revision.name} is active already")
    changed = replace(state, active=revision, previous=state.active, staged=None, order=None)
    return changed.noted(at, by, what, revision, why)


# -- what the gateway says


def recovered(state: State, *, at: str) -> State:
    """At the gateway's start, whatever ended the one before: the old weights serve, and staging begins again."""
    staged, order = state.staged, state.order
    if order is not None:
        revision = staged.revision if staged else state.active
        state = replace(state, order=None)
        state = state.noted(at, GATEWAY, "interrupted", revision, f"the gateway ended: {order.what}")
        if order.what == "roll back":
            staged = None
    if staged is not None and staged.phase != "failed":
        staged = Staged(staged.id, staged.revision)
    return replace(state, staged=staged)


def serving(state: State, revision: str) -> State:
    """The active weights are loaded, and call themselves ``revision``."""
    return replace(state, active=replace(state.active, revision=revision))


def loading(state: State, id: int) -> State:
    return replace(state, staged=replace(_staged(state, id), phase="loading"))


def ready(state: State, id: int, revision: str, golden: Golden | None, *, at: str) -> State:
    """The staged weights are loaded, call themselves ``revision``, and gave these golden verdicts."""
    staged = _staged(state, id)
    staged = replace(staged, phase="ready", golden=golden, revision=replace(staged.revision, revision=revision))
    why = "" if golden is None else f"golden set: {golden.rows - len(golden.broken)} of {golden.rows} kept"
    return replace(state, staged=staged).noted(at, GATEWAY, "ready", staged.revision, why)


def failed(state: State, id: int, why: str, *, at: str) -> State:
    """What was staged cannot serve; an order for it ends."""
    staged = replace(_staged(state, id), phase="failed", why=why[:2000])
    return replace(state, staged=staged, order=None).noted(at, GATEWAY, "failed", staged.revision, why)


def shadowed(state: State, id: int, shadow: Shadow) -> State:
    return replace(state, staged=replace(_staged(state, id), shadow=shadow))


def declined(state: State, why: str, *, at: str) -> State:
    """The order was not carried out, and the staged weights stay as they are."""
    if state.order is None or state.staged is None:
        raise Refused("there is no order")
    return replace(state, order=None).noted(at, GATEWAY, "refused", state.staged.revision, why)


def promoted(state: State, *, at: str, unchecked: bool = False) -> State:
    """The order is carried out. ``unchecked``: its files do not match their checksums, and the order was forced."""
    staged, order = state.staged, state.order
    if staged is None or order is None or staged.phase != "ready":
        raise Refused("there is no order for weights that are loaded")
    has_served = order.what == "roll back" and staged.golden is None
    kept = staged.golden is not None and not staged.golden.broken
    if not (kept or has_served or order.force):
        raise Refused("the golden set does not hold")
    if unchecked and not order.force:
        raise Refused("the checksums do not match")
    active = replace(staged.revision, sums=None) if unchecked else staged.revision
    told = [f"{count} {name}" for name, count in asdict(staged.shadow).items() if count]
    told = [f"shadow: {', '.join(told)}"] if told else []
    if order.force:
        golden = staged.golden
        told.insert(0, "forced")
        told += ["the checksums do not match"] if unchecked else []
        told += [f"golden set broken: {', '.join(golden.broken[:10])}"] if golden and golden.broken else []
    what = "promoted" if order.what == "promote" else "rolled back"
    changed = replace(state, active=active, previous=state.active, staged=None, order=None)
    return changed.noted(at, order.by, what, active, "; ".join(told))


def reverted(state: State, why: str, *, at: str) -> State:
    """The active weights' worker ended while the previous one was still loaded, which serves again."""
    if state.previous is None:
        raise Refused("there are no previous weights")
    failing, active, staged = state.active, state.previous, state.staged
    done = staged is not None and same(staged.revision, active)
    changed = replace(state, active=active, previous=None)
    if done:
        changed = replace(changed, staged=None, order=None)
    return changed.noted(at, GATEWAY, "reverted", active, f"{failing.says()}: {why}")


# -- as JSON


def encode(state: State) -> dict[str, Any]:
    return {"version": 1, **asdict(state)}


def decode(value: Any) -> State:
    """Raises ``ValueError`` for anything that ``encode`` does not give."""
    try:
        if value["version"] != 1:
            raise ValueError(f"version {value['version']}")
        staged, previous, order = value["staged"], value["previous"], value["order"]
        return State(
            active=_revision(value["active"]),
            staged=None if staged is None else _decode_staged(staged),
            previous=None if previous is None else _revision(previous),
            order=None if order is None else Order(**_checked(order, what=get_args(What))),
            history=tuple(Entry(**entry) for entry in value["history"]),
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"malformed ({type(error).__name__})") from None


def _decode_staged(value: Mapping[str, Any]) -> Staged:
    golden = value["golden"]
    fields = {
        **_checked(value, phase=get_args(Phase)),
        "revision": _revision(value["revision"]),
        "golden": None if golden is None else Golden(golden["rows"], tuple(golden["broken"])),
        "shadow": Shadow(**value["shadow"]),
    }
    return Staged(**fields)


def _revision(value: Mapping[str, Any]) -> Revision:
    found = Revision(**value)
    if not (isinstance(found.name, str) and isinstance(found.model, str) and found.model):
        raise ValueError("weights without a name")
    return found


def _checked(value: Mapping[str, Any], **choices: tuple[str, ...]) -> Mapping[str, Any]:
    for key, allowed in choices.items():
        if value[key] not in allowed:
            raise ValueError(f"{key}: {value[key]!r}")
    return value


def _free(state: State) -> None:
    if state.order is not None:
        raise Refused(f"an order of {state.order.by} ({state.order.what}) is being carried out; wait for it")


def _staged(state: State, id: int) -> Staged:
    if state.staged is None or state.staged.id != id:
        raise Refused("something else is staged by now")
    return state.staged


def _next_id(state: State) -> int:
    return state.number + 1  # the number of the entry that tells of it


def same(one: Revision, other: Revision) -> bool:
    """Whether both are the same files, as far as anybody vouched for them."""
    return (one.model, one.sums) == (other.model, other.sums)
