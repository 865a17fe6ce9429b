"""Follows a weights directory: loads what is staged beside what serves, tries it, and carries out orders.

The state on the disk decides, and is changed before the questions move: an order is carried out when the state says
so, and until then every start is on the old weights. At most two workers are loaded at a time, but for one that
answers its last questions.

A promotion is on trial while the old worker stays loaded (``keep``): if the new one's process ends in that time, the
old one serves again, and the state says ``reverted``. What a rollback takes out of service never does. A staged worker
whose process ends is not staged any more. The active one, where none is behind it, is started again if its files are
still those that were promoted; until it has said which weights it has, nobody knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind, GuardMiddlewareError
from guard_middleware.types import Verdict
from guard_middleware.weights import golden, manifest, state
from guard_middleware.weights.directory import WeightsDirectory, now
from guard_middleware.weights.golden import Case
from guard_middleware.weights.seats import Compared, Seat, Switch
from guard_middleware.weights.state import Entry, Golden, Refused, Revision, State, same
from guard_middleware.wire import ModerationRequest

logger = logging.getLogger(__name__)

#: how long a worker may take to load; past it the start, or the staging, has failed
READY_SECONDS = 300.0
#: how often the state is looked at
_POLL = 0.5
#: how often the counts of the shadow are written into it
_COUNT_SECONDS = 5.0
#: pause after an error that is none of the weights' (a full disk)
_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class Trials:
    """How staged weights are tried: golden cases, a ``share`` of live questions; and for how many seconds the weights
    before a promotion stay loaded."""

    cases: Sequence[Case]
    share: float
    keep: float


@dataclass(slots=True)
class _Trial:
    """``why`` it failed; the state says so as soon as it can be written. ``seat`` may be the warm one."""

    id: int
    task: asyncio.Task[None]
    seat: Seat | None = None
    why: str | None = None


class Follower:
    """The guard of a gateway with a weights directory. ``command`` makes a worker's command of a model and a socket;
    it may be replaced before the start. ``on_serving`` is told the model and revision that answer from now on,
    ``on_unknown`` that the active worker has ended, and whatever comes back has not said yet what it is."""

    def __init__(
        self,
        directory: WeightsDirectory,
        trials: Trials,
        command: Callable[[str, str], Sequence[str]],
        *,
        on_entry: Callable[[Entry], None] = lambda entry: None,
        on_compared: Callable[[Compared], None] = lambda compared: None,
    ) -> None:
        self.command = command
        self._directory, self._trials = directory, trials
        self._on_entry = on_entry
        self.on_serving: Callable[[str, str], None] = lambda model, revision: None
        self.on_unknown: Callable[[], None] = lambda: None
        self.switch = Switch(trials.share, on_compared)
        self._held, self._starting = contextlib.ExitStack(), asyncio.Lock()
        self._sockets = Path()
        self._task: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._gone: dict[Seat, int | None] = {}
        self._trial: _Trial | None = None
        self._identities: dict[Seat, tuple[str, str]] = {}
        self._seats: set[Seat] = set()
        self._sockets_made = 0
        self._unwritten: str | None = None
        self._stamp: object = None
        self._told = 0
        self._warm_until = self._counted = 0.0

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        """See ``wire.Guard``."""
        return await self.switch.moderate(request)

    async def start(self) -> None:
        """Starts the active weights' worker, once. Raises ``ConfigError`` where they are not what was promoted, or
        another gateway follows the directory, and ``OSError`` for a worker that cannot be started at all."""
        if self._task is not None:
            return
        async with self._starting:
            if self._task is None:
                await self._start()

    async def _start(self) -> None:
        entering = asyncio.create_task(asyncio.to_thread(self._held.enter_context, self._directory.following()))
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:  # the thread goes on, and would hold the lock against this very process
            entering.add_done_callback(self._give_back)
            raise
        try:
            # mode 0700
            self._sockets = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="guard-")))
            self._told = (await asyncio.to_thread(self._directory.read)).number
            found = await self._update(partial(state.recovered, at=now()))
            wrong = await _mismatch(found.active)
            if wrong is not None:
                remedy = f"put its files back, or: guard-gateway weights rollback --directory {self._directory.folder}"
                raise ConfigError(f"the active weights are not those that were promoted: {wrong}", remedy=remedy)
            logger.warning("weights: %s serves, from %s", found.active.says(), found.active.model)
            seat = self._seat(found.active)
            await seat.start()
        except BaseException:
            self._held.close()
            raise
        self.switch.active = seat
        self._task = asyncio.create_task(self._follow(), name="guard-weights")

    def _give_back(self, entering: asyncio.Task[None]) -> None:
        if not entering.cancelled() and entering.exception() is None:
            self._held.close()

    async def wait_ready(self) -> None:
        """Until the active weights can moderate; raises ``GuardError``."""
        seat = self.switch.active
        assert seat is not None
        await seat.wait_ready(READY_SECONDS)
        await self._learn(seat)

    async def ready(self) -> bool:
        seat = self.switch.active
        return seat is not None and await seat.identity() is not None

    async def aclose(self) -> None:
        """Ends all workers. The state stays as it is: what was not carried out is dropped at the next start."""
        tasks = [self._task, self._trial.task if self._trial else None, *self._ending]
        for task in (task for task in tasks if task is not None):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self.switch.aclose()
        await asyncio.gather(*(self._stop(seat) for seat in tuple(self._seats)))
        self._held.close()

    # -- one step after another

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL):
                    await self._woken.wait()
            self._woken.clear()
            try:
                await self._step()
            except Refused as refusal:  # the operator was quicker
                logger.info("weights: %s", refusal)
            except Exception as error:  # whatever it is, what serves goes on serving, and the next step is due
                logger.error("weights: %s: %s", type(error).__name__, error, exc_info=not _known(error))
                await asyncio.sleep(_PAUSE)

    async def _step(self) -> None:
        loop, switch = asyncio.get_running_loop(), self.switch
        self._look_after_the_gone()
        if self._unwritten is not None:
            why, self._unwritten = self._unwritten, None
            try:
                await self._update(partial(state.reverted, why=why, at=now()))
            except OSError:  # a full disk; it is tried again, so that the next start is not on weights that died
                self._unwritten = why
                raise
        used = self._trial is not None and self._trial.seat is switch.warm
        if switch.warm is not None and not used and loop.time() >= self._warm_until:
            self._retire_warm()
        stamp = await asyncio.to_thread(self._directory.stamp)
        if stamp != self._stamp:
            self._tell(await asyncio.to_thread(self._directory.read))
            self._stamp = stamp
        found = self._state
        staged, trial = found.staged, self._trial
        if trial is not None and trial.why is not None and staged is not None and staged.id == trial.id:
            found = await self._update(partial(state.failed, id=trial.id, why=trial.why, at=now()))
            staged = found.staged
        if trial is not None and (staged is None or staged.id != trial.id or staged.phase == "failed"):
            await self._end_trial()
            trial = None
        assert switch.active is not None
        if switch.active not in self._identities:
            await self._learn(switch.active)
        if staged is None or (switch.active not in self._identities and found.order is None):
            return  # nothing is tried beside weights that are not loaded yet
        if staged.phase == "new" and trial is None:
            self._trial = trial = _Trial(staged.id, asyncio.create_task(self._try(found), name="guard-staging"))
        if found.order is not None and staged.phase == "ready" and trial is not None and trial.seat is not None:
            try:
                await self._carry_out(found, trial.seat)
            except OSError:  # a full disk; it is tried again
                raise
            except Exception as error:
                logger.error("weights: the order is dropped: %s", error, exc_info=not _known(error))
                await self._update(partial(state.declined, why=str(error) or type(error).__name__, at=now()))
        elif trial is not None and switch.shadow != staged.shadow and loop.time() - self._counted > _COUNT_SECONDS:
            self._counted = loop.time()
            await self._update(partial(state.shadowed, id=staged.id, shadow=switch.shadow))

    def _look_after_the_gone(self) -> None:
        """A worker that has ended by itself: the supervisor restarts the active one where there is none behind it."""
        switch = self.switch
        gone, self._gone = self._gone, {}
        for seat, code in gone.items():
            serves = switch.warm
            if seat is switch.active and serves is not None and (identity := self._identities.get(serves)) is not None:
                switch.active, switch.warm = serves, None
                self._end(self._stop(seat))
                self.on_serving(*identity)
                self._unwritten = f"its worker exited with {code}"
                says = seat.revision.says(), self._unwritten, serves.revision.says()
                logger.error("weights: %s: %s; %s serves again", *says)
            elif seat is switch.warm:
                self._retire_warm()

    # -- staging

    async def _try(self, found: State) -> None:
        """Loads what is staged and tries it; what comes of it is in the state at the end, or in ``_Trial.why``."""
        staged, trial = found.staged, self._trial
        assert staged is not None
        assert trial is not None
        again = found.order is not None  # a rollback: it has served before
        before = self.switch.active and self._identities.get(self.switch.active)
        try:
            seat = await self._loaded(trial, staged.revision, again)
            identity = await seat.identity()
            if identity is None:
                raise GuardError(GuardErrorKind.UNAVAILABLE, "its worker went away")
            self._identities[seat] = identity
            active = self.switch.active
            if identity in (before, active and self._identities.get(active)):
                raise Refused(
                    f"it calls itself {identity[0]}@{identity[1]}, as the active weights do: no record could "
                    "tell them apart"
                )
            tried: Golden | None = None
            if not again:
                tried = await golden.run(seat, self._trials.cases)
                self.switch.try_out(seat)
            await self._update(partial(state.ready, id=staged.id, revision=identity[1], golden=tried, at=now()))
        except Exception as error:
            why = error.message if isinstance(error, GuardError) else str(error) or type(error).__name__
            logger.error("weights: %s could not be staged: %s", staged.revision.says(), why, exc_info=not _known(error))
            trial.why = why
        self._woken.set()

    async def _loaded(self, trial: _Trial, revision: Revision, again: bool) -> Seat:
        """The trial's worker: the warm one where it has these weights, which stays warm until they serve."""
        warm = self.switch.warm
        # Files without checksums may be others by now: only to serve again is the warm worker better than they are.
        if warm is not None and same(warm.revision, revision) and (again or revision.sums is not None):
            trial.seat = warm
            return warm
        self._retire_warm()
        if self._ending:
            await asyncio.wait(self._ending)  # their memory first; a gather that is cancelled would cancel them
        await self._update(partial(state.loading, id=trial.id))
        wrong = await _mismatch(revision)
        if wrong is not None:
            raise Refused(wrong)
        trial.seat = seat = self._seat(revision)
        await seat.start()
        await seat.wait_ready(READY_SECONDS)
        return seat

    async def _end_trial(self) -> None:
        trial, self._trial = self._trial, None
        assert trial is not None
        self.switch.try_out(None)
        trial.task.cancel()
        await asyncio.gather(trial.task, return_exceptions=True)
        if trial.seat is not None and trial.seat not in (self.switch.active, self.switch.warm):
            await self._stop(trial.seat)

    # -- promotion

    async def _carry_out(self, found: State, seat: Seat) -> None:
        """The order, or why not. The state is written before the first question moves."""
        staged, order = found.staged, found.order
        assert staged is not None
        assert order is not None
        wrong = await _mismatch(staged.revision)
        if wrong is not None and not order.force:
            await self._update(partial(state.declined, why=wrong, at=now()))
            return
        identity = await seat.identity()
        if identity is None or identity != self._identities.get(seat):
            await self._update(partial(state.declined, why="its worker cannot moderate now", at=now()))
            return
        counts, left = self.switch.shadow, self.switch.active

        def commit(current: State) -> State:
            return state.promoted(state.shadowed(current, staged.id, counts), at=now(), unchecked=wrong is not None)

        seat.revision = (await self._update(commit)).active
        self.switch.hand_over(seat)
        self._trial = None
        self._warm_until = asyncio.get_running_loop().time() + self._trials.keep
        if order.what == "roll back" or left not in self._identities:
            self._retire_warm()  # what was withdrawn, or has never said what it is, stands in for nothing
        self.on_serving(*identity)
        logger.warning("weights: %s serves", seat.revision.says())

    # -- seats

    def _seat(self, revision: Revision) -> Seat:
        self._sockets_made += 1
        socket = self._sockets / f"{self._sockets_made}.sock"
        seat = Seat(revision, self.command(revision.model, str(socket)), socket, self._exited, _mismatch)
        self._seats.add(seat)
        return seat

    async def _stop(self, seat: Seat) -> None:
        self._identities.pop(seat, None)
        await seat.stop()
        self._seats.discard(seat)

    def _exited(self, seat: Seat, code: int | None) -> None:
        known, trial = self._identities.pop(seat, None), self._trial
        if known and trial is not None and seat is trial.seat:  # one that was loading has told its last words itself
            trial.why = f"its worker exited with {code}"
        if seat is self.switch.active:
            self.on_unknown()
        self._gone[seat] = code
        self._woken.set()

    async def _learn(self, seat: Seat) -> None:
        """What the active weights call themselves, once they are loaded."""
        identity = await seat.identity()
        if identity is not None and seat is self.switch.active and seat not in self._identities:
            self._identities[seat] = identity
            if self._state.active.revision not in (None, identity[1]):
                logger.warning("weights: %s calls itself %s now", self._state.active.says(), identity[1])
            self.on_serving(*identity)
            await self._update(partial(state.serving, revision=identity[1]))

    def _retire_warm(self) -> None:
        seat, self.switch.warm = self.switch.warm, None
        if seat is not None:
            self._end(self._retire(seat))

    async def _retire(self, seat: Seat) -> None:
        """Ends it when it has answered what it has."""
        await seat.idle()
        await self._stop(seat)

    def _end(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # -- the state

    async def _update(self, change: Callable[[State], State]) -> State:
        found = await asyncio.to_thread(self._directory.update, change)
        self._tell(found)
        self._woken.set()
        return found

    def _tell(self, found: State) -> None:
        self._state = found
        for entry in found.history:
            if entry.number > self._told:
                self._on_entry(entry)
        self._told = max(self._told, found.number)


def _known(error: Exception) -> bool:
    """Whether its message is all that there is to say, and no defect of ours."""
    return isinstance(error, GuardMiddlewareError | OSError)


async def _mismatch(revision: Revision) -> str | None:
    """Why the files are not the ones that were staged; None where they are, or where nobody vouched for them."""
    if revision.sums is None:
        return None
    try:
        found = await asyncio.to_thread(manifest.check, Path(revision.model))
    except (manifest.ManifestError, OSError) as error:
        return str(error)
    return None if found == revision.sums else f"{revision.model}: made again since it was staged"
