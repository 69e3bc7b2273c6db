"""Carries out what the scheduler decides: attempts are started, the first answer wins.

Each call is a query of its own in the scheduler, which knows nothing of what it carries. A call
that must not be repeated is given to a second upstream only if the first refused the connection.
What an ejected upstream has in hand is sent to another, and its own answer still counts if it is
the first, unless the upstream cannot be trusted.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from itertools import count

from codedinvnet.common.errors import described
from codedinvnet.driver import Driver
from codedinvnet.gateway.calls import Attempt, Call, Cause, Failure, State
from codedinvnet.gateway.cluster import LIMITED, Cluster, Endpoint
from codedinvnet.gateway.metrics import GatewayMetrics
from codedinvnet.gateway.proof import Arm
from codedinvnet.members.member import BITS, Member
from codedinvnet.net.alarm import Alarm
from codedinvnet.net.background import Background, log_error
from codedinvnet.net.tracing import Tracer
from codedinvnet.scheduler.actions import DEADLINE, Answer, Decided, Send
from codedinvnet.scheduler.admission import Admission
from codedinvnet.scheduler.events import (
    PRIORITIES,
    Cancelled,
    Completed,
    Event,
    Failed,
    Gone,
    PolicyChanged,
    Released,
    Submit,
    TimerDue,
    WorkerLost,
    WorkerUp,
)
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules

RETRY_SHARE, MOST_RETRIES = 0.1, 50.0
"""Failed requests may be sent again: a share of all requests, saved up to so many. What clients may
be to blame for has a budget of its own, which they can use up at no one else's expense."""
MOST_BREAKS = 2
"""Connections that may break over a call: what kills two servers is sent to no third."""
DOUBTFUL = frozenset({*range(300, 400), 401, 403, 404})
"""Statuses by which one upstream may fail, if it lacks a model or a token; more often, the client's
request is at fault."""
SHEDS = 1.0
"""Seconds for which no request that was shed (429) is sent to an upstream that shed another, unless
its `Retry-After` says how long: where all have too much to do, retries make it more."""
HELD = 1.0, 3.0
"""How many times as long as a sound answer takes a failed request keeps its slot, drawn evenly. By
once, an upstream that fails is free just when the next request of its route comes, if two routes
take turns: 15 to 68 errors of 600 with two of three failing, and 9 to 15 with this. Up to four
times had 16 to 25, since the failing one is found out later."""
SWEEP = 0.25
"""Seconds between two looks for attempts that take too long."""
OVERLOADED = "overloaded: try again later"


class Blame(StrEnum):
    """Whose fault a failed request is, for the budget of retries."""

    UPSTREAM = "upstream"
    CLIENT = "client"


class Refused(Exception):
    """A request is not taken; the client may try again after some seconds."""

    def __init__(self, reason: str, retry_after: int = 1, status: int = 503) -> None:
        super().__init__(reason)
        self.retry_after, self.status = retry_after, status


class Dispatcher:
    """Hands calls to the scheduler, and attempts to endpoints.

    Args:
        rules: of the scheduler; the workers are the cluster's places.
        cluster: the upstreams, and the fallback if there is one.
        metrics: where it counts.
        cancel: whether attempts that nobody waits for are closed; None: those of streams are, and
            those whose client is gone.
        member: returns this gateway's part in deciding with others, for a front end and a function
            that makes schedulers; None: it decides alone.
        tracer: makes spans of calls and attempts; None: they are not traced.
    """

    def __init__(
        self,
        rules: Rules,
        cluster: Cluster,
        metrics: GatewayMetrics,
        cancel: bool | None = None,
        member: Callable[[Callable[[], Scheduler], Dispatcher], Member] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.rules, self.cluster, self.metrics = rules, cluster, metrics
        self.cancels, self.policy, self.tracer = cancel, rules.policy, tracer
        self.admission = Admission(1, rules.max_pending)
        self.calls: dict[int, Call] = {}
        """Those that the scheduler knows, by query."""
        self.pending = [0] * len(PRIORITIES)
        """How many these are, by priority."""
        self.attempts: dict[int, Attempt] = {}
        """Those that have not ended, by the scheduler's number. It knows no more of those that an
        upstream had in hand when it was ejected."""
        self.loop = asyncio.get_running_loop()
        make = partial(Scheduler, rules)
        self.member = None if member is None else member(make, self)
        self.driver = Driver(make(), self) if self.member is None else self.member.driver
        self._alarm = Alarm(lambda now: self.driver.feed(now, TimerDue()))
        self._numbers = count(0 if self.member is None else self.member.name << BITS)
        self._retries = {Blame.UPSTREAM: MOST_RETRIES, Blame.CLIENT: MOST_RETRIES}
        self._since_retry = 0
        """Requests that the budgets have not earned from yet."""
        self._background = Background()
        cluster.on_lost, cluster.on_up = self._lost, self._up

    # Life

    async def start(self) -> None:
        """Find out which upstreams are up."""
        for place, endpoint in enumerate(self.cluster.endpoints):
            if endpoint is None:
                self._feed(WorkerLost(place, "no upstream is there"))
        await self.cluster.start()
        self.resize()
        self._background.spawn(Sweeper(self).run())

    async def stop(self) -> None:
        """Abort what is under way."""
        await self._background.stop()
        self._alarm.cancel()
        for attempt in self.attempts.values():
            attempt.become(State.CANCELLED)
            attempt.end_trace("cancelled")
        await self.cluster.stop()

    # Calls

    def submit(self, call: Call) -> None:
        """Take a call; it ends by `Attempt.pass_on` or `Call.fail`.

        Raises:
            Refused: if it is not taken.
        """
        now, cluster = time.monotonic(), self.cluster
        fallback = call.repeatable and self.policy.adapts
        if not cluster.takes(fallback):
            raise Refused("no upstream is up: try again later")
        ahead = self._ahead(call.priority)
        if not self.admission.takes(ahead, 1, call.deadline - now):
            raise Refused(OVERLOADED, self.admission.refuse(ahead, 1), 429)
        call.query = next(self._numbers)
        self.calls[call.query] = call
        self.pending[call.priority] += 1
        self._since_retry += 1
        self.admission.note(now, len(self.calls))
        submit = Submit(
            (call.query,),
            call.deadline,
            size_class=call.size_class,
            route=call.route.name,
            repeatable=call.repeatable,
            delay=call.route.limits.delay,
            keys=call.prompt.keys if call.prompt else (),
            size=call.prompt.size if call.prompt else 0,
            priority=call.priority,
        )
        self.driver.feed(now, submit)

    def _ahead(self, priority: int) -> int:
        """Return how many calls are to be answered before the next of a priority.

        Those of lower priority are not, unless upstreams are at them.
        """
        lower = sum(self.pending[priority + 1 :])
        return len(self.calls) - lower + min(lower, self.admission.workers)

    def shed(self, now: float) -> None:
        """Refuse calls that wait, and that those of higher priority leave no time for."""
        if sum(map(bool, self.pending)) < 2:
            return
        waiting = [call for call in self.calls.values() if not call.attempts]
        ahead, rate = len(self.calls) - len(waiting), self.admission.rate
        for call in sorted(waiting, key=lambda each: each.priority):
            is_behind = any(self.pending[: call.priority])
            if is_behind and ahead > rate * (call.deadline - now):
                seconds = self.admission.refuse(self._ahead(call.priority), 1)
                self._forget(call)
                call.fail(429, OVERLOADED, seconds)
            else:
                ahead += 1

    def change_policy(self, name: str) -> None:
        """Go on by another policy."""
        self.policy = POLICIES[name]
        self._feed(PolicyChanged(name))

    def in_flight(self) -> list[tuple[Endpoint, int]]:
        """Return the upstreams, each with how many attempts it has in hand."""
        counts = Counter(attempt.endpoint for attempt in self.attempts.values())
        return [(endpoint, counts[endpoint]) for endpoint in self.cluster]

    def resize(self) -> None:
        """Take in how many requests the upstreams that are up may have together."""
        self.admission.resize(self.driver.snapshot().slots)

    def cancel(self, call: Call) -> None:
        """The client is gone: have nothing more done for a call."""
        winner, now = call.winner, time.monotonic()
        if winner is None:
            call.route.waited(now, now - call.came, call.arm)
        elif not winner.is_over:
            self.end(winner, State.CANCELLED, "cancelled")
        self._forget(call)
        for attempt in call.attempts:
            self._lose(attempt, is_gone=True)
        call.end()

    def _take_out(self, query: int) -> Call | None:
        """Return a call that the scheduler knows no longer; None if it did not."""
        call = self.calls.pop(query, None)
        if call is not None:
            self.pending[call.priority] -= 1
        return call

    def _forget(self, call: Call) -> None:
        """Take a call out of the scheduler, if it is there."""
        if self._take_out(call.query) is not None:
            self._feed(Gone((call.query,)))
            self.admission.note(time.monotonic(), len(self.calls))

    # What attempts report

    def answered(self, attempt: Attempt, is_usual: bool) -> None:
        """An attempt has an acceptable answer, or the first content of one: then `end` follows.

        Args:
            attempt: that has it.
            is_usual: whether its time tells how long such requests take.
        """
        now, call, number = time.monotonic(), attempt.call, attempt.number
        if attempt.status >= 400 and attempt.endpoint.is_fallback:  # which knows less
            self._feed(Failed(number, f"{attempt.endpoint.url}: status {attempt.status}"))
            self.end(attempt, State.FAILED, "error")
            return
        is_complete = attempt.state is not State.FOUND
        attempt.seconds = now - attempt.began
        self._alarm.heard(attempt.began)
        attempt.endpoint.answered(attempt.began, now, is_usual)
        fault = None
        if not call.repeatable:  # of others, another's answer says whose fault it was
            fault = attempt.fault
            self.cluster.compare(attempt.endpoint, call.route.name, attempt.seconds, fault)
        keeps = not is_complete or fault is not None
        self.driver.feed(now, Completed(number, is_usual, keeps_slot=keeps))
        if fault is not None and is_complete:
            self._hold_slot(attempt)
        if call.waits:  # the scheduler had lost the attempt
            self._forget(call)
            self._won(call, attempt)
        attempt.result = Cause.STATUS.value if fault else "ok" if is_usual else "error"
        if is_complete:
            self.end(attempt, State.COMPLETE, attempt.result)

    def _hold_slot(self, attempt: Attempt) -> None:
        """Keep a failed request's slot for about as long as a sound answer takes.

        An upstream that fails at once would be the idlest of all and get most requests.
        """
        usual = self.cluster.outliers.usual_seconds(attempt.call.route.name)
        left = usual * random.uniform(*HELD) - attempt.seconds
        released = Released(attempt.endpoint.worker, attempt.number)
        self.loop.call_later(max(0.0, left), self._feed, released)

    def end(self, attempt: Attempt, state: State, result: str, reason: str = "") -> None:
        """Have an attempt end in one of `ENDS`; metrics and the log say by which result."""
        before, now = attempt.state, time.monotonic()
        attempt.become(state)
        del self.attempts[attempt.number]
        call, endpoint = attempt.call, attempt.endpoint
        attempt.result, attempt.seconds = result, attempt.seconds or now - attempt.began
        call.route.proof.worked(now, now - attempt.began, attempt.is_copy)
        if before is State.STREAM:
            self._feed(Released(endpoint.worker, attempt.number))
        elif state is State.CANCELLED:
            self._feed(Cancelled(attempt.number))
        is_limit = attempt.status == 429 and result == Cause.STATUS.value
        endpoint.count(LIMITED if is_limit else result, attempt.seconds)
        if attempt.trace is not None:
            attempt.end_trace(result, reason)
        call.release()

    def failed(self, attempt: Attempt, failure: Failure) -> None:
        """An attempt has no answer, or one by which its upstream failed."""
        call, endpoint = attempt.call, attempt.endpoint
        self._alarm.heard(attempt.began)
        self.end(attempt, State.FAILED, failure.cause.value, failure.reason)
        is_live = call.waits
        if attempt.status == 429:
            endpoint.sheds_until = time.monotonic() + max(failure.retry_after, SHEDS)
        if is_live:
            call.last = failure
            call.breaks += failure.cause is Cause.BROKEN
        final = is_live and not endpoint.is_fallback and not self._may_retry(attempt, failure)
        if is_live and final and call.query not in self.calls:  # the scheduler has let go of it
            self.give_up(call, failure.reason)
        unsent = failure.cause is Cause.UNSENT
        self._feed(Failed(attempt.number, failure.reason, final, unsent))
        if failure.cause is not Cause.STATUS or attempt.status >= 500:
            self.cluster.blame(endpoint, failure)  # of others it is when another answers

    def _may_retry(self, attempt: Attempt, failure: Failure) -> bool:
        """Return whether a failed call may be sent again."""
        call = attempt.call
        if failure.cause is Cause.UNSENT and not call.breaks:
            return True
        if not call.repeatable or failure.cause is Cause.NO_FILES or call.breaks >= MOST_BREAKS:
            return False
        if failure.cause is Cause.STATUS and not self._has_untried(call, attempt.status == 429):
            return False
        doubtful = attempt.status < 300 or attempt.status in DOUBTFUL  # below, it is in a stream
        clients = failure.cause is Cause.STATUS and doubtful
        blame = Blame.CLIENT if clients else Blame.UPSTREAM
        earned, self._since_retry = RETRY_SHARE * self._since_retry, 0
        for each, left in self._retries.items():
            self._retries[each] = min(MOST_RETRIES, left + earned)
        taken = self._retries[blame] >= 1.0
        self._retries[blame] -= taken
        self.metrics.retries.labels("sent" if taken else "refused").inc()
        return taken

    def _has_untried(self, call: Call, was_shed: bool) -> bool:
        """Return whether an upstream is up that may answer a call which it was not sent."""
        tried, now = {attempt.endpoint for attempt in call.attempts}, time.monotonic()
        untried = (e for e in self.cluster.mains_here() if e.is_up and e not in tried)
        return any(not was_shed or each.sheds_until <= now for each in untried)

    # Events and actions, see `FrontEnd`

    def _feed(self, event: Event) -> None:
        self.driver.feed(time.monotonic(), event)

    def set_timer(self, at: float | None) -> None:
        self._alarm.set(at)

    def broken(self, error: Exception) -> str:
        log_error(error)
        return described(error)

    def begin(self, sends: Sequence[Send]) -> None:
        (send,) = sends
        call = self.calls.get(send.members[0]) if send.members else None
        endpoint = self.cluster.endpoints[send.worker]
        why = ""
        if call is None or call.winner is not None or endpoint is None:
            why = "it is not needed"
        elif self.member is not None and not endpoint.is_up:  # others find it up
            self._feed(Failed(send.attempt, f"{endpoint.url} is down", unsent=True))
            return
        elif call.written and not call.repeatable:
            why = "it must not be repeated"
        elif call.breaks and call.live:
            why = "a connection broke over it: it may be what kills upstreams"
        if why or call is None or endpoint is None:
            self._feed(Failed(send.attempt, why, final=bool(call)))
            return
        attempt = call.attempt(endpoint, send.attempt)
        attempt.is_copy = send.copy
        if send.copy:
            call.arm = Arm.COPIED
        if not call.attempts:
            call.route.queued(attempt.began - call.came)
        if call.trace is not None:
            earlier, origin = len(call.attempts), endpoint.client.origin
            attempt.trace = call.trace.attempt(earlier, send.copy, origin)
        call.attempts.append(attempt)
        self.attempts[send.attempt] = attempt
        attempt.start()

    def answer(self, answer: Answer) -> None:
        call = self._take_out(answer.query)
        if call is not None:
            self._won(call, self.attempts[answer.attempt])

    def fail(self, query: int, reason: str) -> None:
        call = self._take_out(query)
        if call is not None:
            self.give_up(call, reason)

    def copy_refused(self, query: int, held_out: bool) -> None:
        call = self.calls.get(query)
        if call is not None:
            call.route.hedged("held_out" if held_out else "refused")
            if held_out:
                call.arm = Arm.HELD_OUT

    def replace(self, worker: int, reason: str) -> None:
        """Wait: the cluster probes upstreams that it has ejected."""

    def forget(self, attempts: Sequence[int], queries: Sequence[int]) -> None:
        """Let go of nothing: calls have their attempts."""

    def decided(self, decided: Decided) -> None:
        """Tell nobody."""

    # What a member asks of its upstreams

    def urls(self) -> list[str]:
        return ["" if each is None else each.url for each in self.cluster.endpoints]

    def suspect(self, place: int, reason: str) -> None:
        self.loop.call_soon(self.cluster.suspect, place, reason)

    # Ends

    def _won(self, call: Call, attempt: Attempt) -> None:
        """Answer a call by an attempt, and let the others go."""
        now = time.monotonic()
        call.winner = attempt
        self.admission.note(now, len(self.calls), 1)
        if len(call.attempts) > 1:
            if any(other.is_copy for other in call.attempts):
                call.route.hedged("won" if attempt.is_copy else "lost")
            for other in call.attempts:
                if other is not attempt:
                    self._lose(other)
                if attempt.status < 300 and other.status < 500 and other.result == "status":
                    reason = f"status {other.status} where another upstream answered"
                    self.cluster.blame(other.endpoint, Failure(Cause.STATUS, reason))
        call.route.answered(now, now - call.came, call.arm)
        attempt.pass_on()

    def give_up(self, call: Call, reason: str) -> None:
        """End a call with an error."""
        now, least = time.monotonic(), call.route.limits.deadline
        call.route.waited(now, max(least, now - call.came), call.arm)  # it is worse than late
        self.admission.note(now, len(self.calls))
        for attempt in call.attempts:
            self._lose(attempt)
        if reason == DEADLINE:
            call.fail(504, why_late(call))
        else:
            call.fail(502, reason)

    def _lose(self, attempt: Attempt, is_gone: bool = False) -> None:
        """An attempt is not needed any more: close it, or let it end by itself.

        A copy that lost is nearly done when its sibling has answered, and its time is worth
        knowing; what a client has left (`is_gone`) may have just begun.
        """
        if attempt.is_over or attempt is attempt.call.winner:
            return
        closes, winner = self.cancels, attempt.call.winner
        if closes is None:
            closes = is_gone or attempt.is_stream or (winner is not None and winner.is_stream)
        if closes or attempt.state is State.CONNECT:
            self.end(attempt, State.CANCELLED, "cancelled")
        elif attempt.state in (State.HOLD, State.SEEK, State.FOUND):
            attempt.become(State.LEFT)

    # Endpoints

    def _lost(self, endpoint: Endpoint, reason: str, trusted: bool) -> None:
        """An endpoint was ejected: what it has in hand goes to others.

        Answers that it may yet give still count if it is trusted.
        """
        here = [each for each in self.attempts.values() if each.endpoint is endpoint]
        unsent = tuple(each.number for each in here if each.state is State.CONNECT)
        lost = [each for each in here if each.state is State.CONNECT or not trusted]
        for attempt in here:
            if attempt.call.waits and attempt.call.written and not attempt.call.repeatable:
                self._forget(attempt.call)  # no other upstream may have it
        for attempt in lost:
            if attempt is not attempt.call.winner:  # its end frees a slot, which is of no use yet
                self.end(attempt, State.FAILED, Cause.LOST.value)
        self._feed(WorkerLost(endpoint.worker, reason, unsent))
        self.resize()
        for attempt in lost:
            call = attempt.call
            if attempt is call.winner:
                self.failed(attempt, Failure(Cause.LOST, reason))
                call.break_off()
            elif call.waits and not trusted:
                call.last = Failure(Cause.LOST, f"{endpoint.url}: {reason}")
                if call.query not in self.calls:
                    self.give_up(call, call.last.reason)

    def _up(self, endpoint: Endpoint) -> None:
        """An endpoint takes requests again."""
        self._feed(WorkerUp(endpoint.worker))
        self.resize()


class Sweeper:
    """Looks for attempts that take too long."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher

    async def run(self) -> None:
        """Look again and again, for ever."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            self.dispatcher.metrics.loop_lag.observe(max(0.0, now - looked - SWEEP))
            self._sweep(now)
            looked = now

    def _sweep(self, now: float) -> None:
        dispatcher = self.dispatcher  # in a frame that ends, as it would keep the last call's body
        for attempt in list(dispatcher.attempts.values()):
            self._look(now, attempt)
        dispatcher.shed(now)
        dispatcher.resize()
        dispatcher.driver.look()

    def _look(self, now: float, attempt: Attempt) -> None:
        dispatcher, call, endpoint = self.dispatcher, attempt.call, attempt.endpoint
        limits = call.route.limits
        if attempt is call.winner:
            if now - attempt.heard > limits.idle:
                dispatcher.failed(attempt, Failure(Cause.SILENT, "the stream stood still"))
                call.break_off()
            return
        age = now - attempt.began
        if age > limits.silent and not attempt.is_blamed and endpoint.heard < attempt.began:
            attempt.is_blamed = True
            reason = f"no answer within {limits.silent:g} s"
            dispatcher.cluster.blame(endpoint, Failure(Cause.SILENT, reason))
        if age > limits.deadline and attempt.state is State.LEFT:
            dispatcher.end(attempt, State.CANCELLED, Cause.SILENT.value)
        elif now >= call.deadline and call.waits and call.query not in dispatcher.calls:
            dispatcher.give_up(call, DEADLINE)


def why_late(call: Call) -> str:
    """Return why a call's time is over, and where it was."""
    where = ", ".join(dict.fromkeys(attempt.endpoint.url for attempt in call.attempts))
    parts = [DEADLINE, f"at upstream {where}" if where else "no upstream was free"]
    if call.last is not None:
        parts.append(f"last failure: {call.last.reason}")
    return "; ".join(parts)
