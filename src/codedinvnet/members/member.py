"""One gateway's part in deciding as one with others. A state machine without sockets or clock.

The oldest member that can be reached *decides*: its scheduler takes the events of all, and each
carries out the actions for its own queries. There is no vote. A member that reaches no older one
that decides does so itself, as a gateway without members would; two parts that don't see each other
each decide for themselves. So does a member whose decider was silent for `SILENCE`. Whoever changes
the decider tells the next one what it has in flight: what waits is submitted again, what is under
way keeps its attempts. A query is only ever sent by the member that its client is at, which knows
whether it was; so none is sent twice that must not be, whatever messages are lost.

An answer is passed on before the decider hears of it. An upstream is down if most members find it
down; the others are told when one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from codedinvnet.driver import DecodingFrontEnd, Driver, FrontEnd
from codedinvnet.members.wire import (
    Decides,
    Hello,
    Join,
    Message,
    Ping,
    Pong,
    Suspect,
    Upstreams,
)
from codedinvnet.scheduler.actions import (
    DEADLINE,
    Action,
    Answer,
    AnswerDecoded,
    CopyRefused,
    Decode,
    Fail,
    Send,
    Snapshot,
)
from codedinvnet.scheduler.events import (
    Cancelled,
    Completed,
    Decoded,
    Event,
    Failed,
    Gone,
    PolicyChanged,
    Released,
    Resumed,
    Submit,
    TimerDue,
    Withheld,
    WorkerLost,
    WorkerUp,
)
from codedinvnet.scheduler.group import Traffic
from codedinvnet.scheduler.scheduler import Scheduler

BITS = 32
"""Of a number that count what its member has numbered; the member's name precedes them."""
BEAT = 0.03
"""Seconds between two pings of a decider that says nothing."""
RARE = 10
"""Beats between two pings of members that might decide, or that have just sent something."""
SILENCE = 0.09
"""Seconds without a word from the decider, after which a member decides alone."""
GONE = 1.0
"""Seconds without a word from another member, after which what it had in flight is let go of. It
keeps places at upstreams until then, and may only have stood still."""
STEADY = 1.0
"""Seconds for which a member must have been there again that was lost before."""
SENT = (
    Submit, Resumed, Completed, Released, Failed, Cancelled, WorkerLost, WorkerUp, Decoded,
    Withheld, Gone, PolicyChanged,
)  # fmt: skip
"""The events that travel."""


class Line(Protocol):
    """A connection to another member."""

    def post(self, message: Message) -> None:
        """Send a message, after those that were sent before."""

    def close(self) -> None:
        """Close it; nothing is received from it any more."""


class Upstreamed(Protocol):
    """Knows the upstreams of this member."""

    def urls(self) -> Sequence[str]:
        """Return the URL at each place; "" where there is none."""

    def suspect(self, place: int, reason: str) -> None:
        """Look whether an upstream is down that another member finds down."""


@dataclass(slots=True)
class _Entry:
    """A query that is not over, or has an attempt under way."""

    submit: Submit
    attempts: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Those at its own task: each worker, and since when."""
    is_over: bool = False
    sent: int = 0
    """How many attempts were begun that an upstream may have seen."""
    again: bool = False
    """It was submitted once more although the scheduler had ended it."""

    def begin(self, number: int, worker: int, now: float) -> None:
        """An attempt is begun."""
        self.attempts[number] = worker, now
        self.sent += 1

    @property
    def may_be_answered(self) -> bool:
        """Whether it need not fail though the scheduler says so: it knows less than this member.

        When others find an upstream down, it may answer what it has in hand, and a message that
        was on its way has been in no one's hand.
        """
        return bool(self.attempts) or (not self.sent and not self.again)


@dataclass(slots=True)
class _Peer:
    """Another member, over a line."""

    line: Line
    hello: Hello
    heard: float
    since: float
    decides: bool
    ahead: float
    """This clock minus that member's."""

    @property
    def rank(self) -> tuple[float, int]:
        return self.hello.started, self.hello.name


class Member:
    """Decides, or has another member decide. A `Driver` takes it for its scheduler.

    Args:
        name: a random number of 31 bits, of this process alone.
        started: when this process was started, by the clock on the wall.
        make: returns a new scheduler.
        upstreams: of this member.
        front_end: carries out what is decided.
        decoding: the same, if it has coded groups.

    Attributes:
        driver: takes this for its scheduler.
        message_seconds: how long a message to the decider took lately.
        alone: how often it lost the decider.
    """

    def __init__(
        self,
        name: int,
        started: float,
        make: Callable[[], Scheduler],
        upstreams: Upstreamed,
        front_end: FrontEnd,
        decoding: DecodingFrontEnd | None = None,
    ) -> None:
        self.name, self.started, self._make, self._upstreams = name, started, make, upstreams
        self.scheduler = make()
        self.scheduler.flying.count = name << BITS
        self.driver = Driver(self, front_end, decoding)
        self.message_seconds, self.alone = 0.0, 0
        self._peers: dict[Line, _Peer] = {}
        """Both those whom this one may follow and those who may follow it."""
        self._older: set[Line] = set()
        """Lines that this member opened."""
        self._leader: _Peer | None = None
        self._followers: dict[int, _Peer] = {}
        self._lost: dict[int, float] = {}
        """Deciders that were lost, and when."""
        self._entries: dict[int, _Entry] = {}
        """By query: this member's, and its followers'."""
        self._query_of: dict[int, int] = {}
        self._down: dict[int, set[int]] = {}
        """Place -> the members that find it down."""
        self._urls: tuple[str, ...] = ()
        self._there: tuple[str, ...] = ()
        """The places of the decider."""
        self._inbox: list[Action] = []
        self._policy: str | None = None
        self._ticked, self._ticks = 0.0, 0

    # What a driver needs of a scheduler

    @property
    def decides(self) -> bool:
        """Whether its own scheduler decides."""
        return self._leader is None

    @property
    def size(self) -> int:
        """How many members its scheduler decides for; 0 if another's does."""
        return 1 + len(self._followers) if self.decides else 0

    def next_timer(self) -> float | None:
        """Return when `TimerDue` is wanted next."""
        return self.scheduler.next_timer() if self.decides else None

    def snapshot(self) -> Snapshot:
        """Return what pages, metrics and admission show: what this scheduler knows."""
        return self.scheduler.snapshot()

    def handle(self, now: float, event: Event) -> list[Action]:
        """Take an event of this member, and return what it has to do."""
        inbox, self._inbox = self._inbox, []
        if self._leader is None:
            return inbox + self._decide(now, self.name, event)
        return inbox + self._ask(now, self._leader, event)

    # Deciding

    def _decide(self, now: float, owner: int, event: Event) -> list[Action]:
        """Have the scheduler take an event; return what this member has to do."""
        match event:
            case WorkerLost(place, reason, unsent):
                return self._find_down(now, owner, place, reason, unsent)
            case WorkerUp(place):
                self._down.setdefault(place, set()).discard(owner)
                return self._count(now, place)
            case PolicyChanged(policy):
                self._policy = policy
                for peer in self._followers.values():
                    peer.line.post(event)
        self._note(event)
        return self._routed(now, self.scheduler.handle(now, event))

    def _routed(self, now: float, actions: Sequence[Action]) -> list[Action]:
        """Send actions to the members whose queries they are for; return the others."""
        own: list[Action] = []
        for action in actions:
            query = _query(action)
            entry = None if query is None else self._entries.get(query)
            if isinstance(action, Send) and entry is not None and not action.group_size:
                entry.begin(action.attempt, action.worker, now)
                self._query_of[action.attempt] = action.members[0]
            if query is None or query >> BITS == self.name:
                own.append(action)
                continue
            if isinstance(action, Fail) and entry is not None:
                self._fail(action.query, entry)
            if (peer := self._followers.get(query >> BITS)) and not isinstance(action, Answer):
                peer.line.post(action)
        return self._kept(now, own)

    def _kept(self, now: float, actions: list[Action]) -> list[Action]:
        """Return actions without failures of queries that may yet be answered."""
        kept = []
        for action in actions:
            entry = self._entries.get(action.query) if isinstance(action, Fail) else None
            if not isinstance(action, Fail) or entry is None:
                kept.append(action)
            elif not entry.is_over and action.reason != DEADLINE and entry.may_be_answered:
                entry.again = True
                kept += self.handle(now, self._resumed(entry))
            elif not entry.is_over:
                self._fail(action.query, entry)
                kept.append(action)
        return kept

    def _fail(self, query: int, entry: _Entry) -> None:
        entry.is_over = True
        if not entry.attempts:
            del self._entries[query]

    def _resumed(self, entry: _Entry) -> Submit | Resumed:
        attempts = tuple((number, *at) for number, at in entry.attempts.items())
        return Resumed(entry.submit, attempts) if attempts else entry.submit

    def _note(self, event: Event) -> None:
        """Keep what is in flight."""
        match event:
            case Submit(queries):
                self._entries.setdefault(queries[0], _Entry(event)).is_over = False
            case Resumed(submit, attempts):
                (query,) = submit.queries
                entry = self._entries.setdefault(query, _Entry(submit))
                entry.is_over = False
                entry.attempts = {number: (worker, at) for number, worker, at in attempts}
                self._query_of |= dict.fromkeys(entry.attempts, query)
            case Completed(number, _, keeps_slot):
                if (found := self._query_of.get(number)) is not None:
                    self._entries[found].is_over = True
                    if not keeps_slot:
                        self._ended(number)
            case Failed(number, _, _, unsent):
                if unsent and (found := self._query_of.get(number)) is not None:
                    self._entries[found].sent -= 1
                self._ended(number)
            case Cancelled(number) | Released(_, number):
                self._ended(number)
            case Gone(queries):
                for each in queries:
                    if (left := self._entries.get(each)) is not None:
                        self._fail(each, left)

    def _ended(self, number: int) -> None:
        """Nothing more comes of an attempt."""
        query = self._query_of.pop(number, None)
        if query is not None:
            entry = self._entries[query]
            del entry.attempts[number]
            if entry.is_over and not entry.attempts:
                del self._entries[query]

    def _drop(self, owner: int, place: int) -> list[int]:
        """A member lets go of its attempts at a place; return them."""
        dropped = [
            number
            for query, entry in self._entries.items()
            if query >> BITS == owner
            for number, (worker, _) in entry.attempts.items()
            if worker == place
        ]
        for number in dropped:
            self._ended(number)
        return dropped

    # Upstreams that are down

    def _find_down(
        self, now: float, owner: int, place: int, reason: str, unsent: tuple[int, ...]
    ) -> list[Action]:
        lost = self._drop(owner, place)
        self._down.setdefault(place, set()).add(owner)
        actions = self._count(now, place, reason, unsent)
        for number in lost:  # unless the scheduler has given them up
            failed = Failed(number, reason, unsent=number in unsent)
            actions += self._routed(now, self.scheduler.handle(now, failed))
        if self.scheduler.is_up(place):
            for peer in self._followers.values():
                peer.line.post(Suspect(place, reason))
            if owner != self.name:
                self._upstreams.suspect(place, reason)
        return actions

    def _count(
        self, now: float, place: int, reason: str = "", unsent: tuple[int, ...] = ()
    ) -> list[Action]:
        """Let the scheduler know what most members find of a place."""
        self._look_at_upstreams()
        down = not self._urls[place] or 2 * len(self._down.get(place, ())) > self.size
        if down is not self.scheduler.is_up(place):
            return []
        event = WorkerLost(place, reason, unsent) if down else WorkerUp(place)
        return self._routed(now, self.scheduler.handle(now, event))

    def _look_at_upstreams(self) -> None:
        urls = tuple(self._upstreams.urls())
        if urls != self._urls:
            self._urls = urls
            for peer in self._followers.values():
                peer.line.post(Upstreams(urls))

    # Having another decide

    def _ask(self, now: float, leader: _Peer, event: Event) -> list[Action]:
        """Tell the decider of an event; return what is to be done at once."""
        answers: list[Action] = []
        query = self._query_of.get(event.attempt) if isinstance(event, Completed) else None
        match event:
            case TimerDue():
                return []
            case Completed(number, is_usual) if query is not None:
                entry = self._entries[query]
                worker, since = entry.attempts[number]
                if is_usual:  # the next scheduler here is to know how long requests take
                    traffic = Traffic(entry.submit.route, entry.submit.size_class)
                    self.scheduler.stats.took(now, worker, 0, now - since, traffic)
                if not entry.is_over:
                    answers = [Answer(query, number, worker)]
            case WorkerLost(place):
                self._drop(self.name, place)
                self._down.setdefault(place, set()).add(self.name)
                self.scheduler.handle(now, event)
            case WorkerUp(place):
                self._down.setdefault(place, set()).discard(self.name)
                self.scheduler.handle(now, event)
        self._note(event)
        self._tell(leader, event)
        if answers and query is not None:
            self._tell(leader, Gone((query,)))
        return answers

    def _tell(self, leader: _Peer, event: Event) -> None:
        """Post an event with the decider's numbers of the places."""
        match event:
            case Resumed(submit, attempts):
                there = [(n, self._place_there(place), at) for n, place, at in attempts]
                known = tuple((n, place, at) for n, place, at in there if place is not None)
                leader.line.post(Resumed(submit, known) if known else submit)
            case Released(place, number):
                if (there_too := self._place_there(place)) is not None:
                    leader.line.post(Released(there_too, number))
            case WorkerLost(place, reason, unsent):
                if (there_too := self._place_there(place)) is not None:
                    leader.line.post(WorkerLost(there_too, reason, unsent))
            case WorkerUp(place):
                if (there_too := self._place_there(place)) is not None:
                    leader.line.post(WorkerUp(there_too))
            case _:
                leader.line.post(event)

    def _place_there(self, place: int) -> int | None:
        url = self._upstreams.urls()[place]
        return self._there.index(url) if url and url in self._there else None

    def _told(self, now: float, leader: _Peer, action: Action) -> None:
        """The decider has an action carried out."""
        if isinstance(action, Send):
            url, here = self._there[action.worker], self._upstreams.urls()
            if url not in here:
                leader.line.post(Failed(action.attempt, "it is not known here", unsent=True))
                return
            action = action._replace(worker=here.index(url))
            entry = self._entries.get(action.members[0])
            if entry is not None and not action.group_size:
                entry.begin(action.attempt, action.worker, now)
                self._query_of[action.attempt] = action.members[0]
        self._inbox += self._kept(now, [action])

    # Other members

    def hello(self, now: float, digest: str, version: str, token: str) -> Hello:
        """Return how this member presents itself."""
        urls = tuple(self._upstreams.urls())
        return Hello(version, digest, token, self.name, self.started, self.decides, now, urls)

    def connected(self, now: float, line: Line, hello: Hello, opened: bool) -> None:
        """A member has presented itself on a line; it may decide for this one if it is older."""
        peer = _Peer(line, hello, now, now, hello.decides, now - hello.now)
        self._peers[line] = peer
        if opened:
            self._older.add(line)
        self.choose(now)
        self._carry_out(now)

    def yields_to(self, hello: Hello) -> bool:
        """Whether this member would have another decide."""
        return (hello.started, hello.name) < (self.started, self.name)

    def receive(self, now: float, line: Line, message: Message) -> None:
        """Another member tells something."""
        peer = self._peers.get(line)
        if peer is None:
            return
        peer.heard = now
        match message:
            case Ping():
                line.post(Pong(message.at))
            case Pong(at) if peer is not self._leader:
                pass
            case Pong(at):
                self.message_seconds = (now - at) / 2
            case Decides(decides):
                peer.decides = decides  # before this member looks for another
                if self._followers.get(peer.hello.name) is peer:
                    self._let_go(now, peer)
                if peer is self._leader and not decides:
                    self._lose_leader(now)
                self.choose(now)
            case Upstreams(urls):
                peer.hello = peer.hello._replace(upstreams=urls)
                if peer is self._leader:
                    self._there = urls
            case Join(down):
                self._join(now, peer, down)
            case Suspect(place, reason) if peer is self._leader:
                here = self._upstreams.urls()
                if self._there[place] in here:
                    self._upstreams.suspect(here.index(self._there[place]), reason)
            case PolicyChanged(policy) if peer is self._leader:
                self._policy = policy
                self.scheduler.handle(now, message)
            case _ if peer is self._leader and not isinstance(message, SENT):
                self._told(now, peer, message)  # type: ignore[arg-type]
            case _ if peer.hello.name in self._followers and isinstance(message, SENT):
                event = _moved(message, peer.ahead)
                self._inbox += self._decide(now, peer.hello.name, event)
        self._carry_out(now)

    def _carry_out(self, now: float) -> None:
        """Have this member's actions carried out, and the timer set."""
        if self._inbox:
            self.driver.feed(now, TimerDue())
        else:
            self.driver.look()

    def _join(self, now: float, peer: _Peer, down: Sequence[int]) -> None:
        if not self.decides:
            peer.line.post(Decides(False))
            return
        if (before := self._followers.get(peer.hello.name)) is not None:
            self._let_go(now, before)
        self._followers[peer.hello.name] = peer
        for place in down:
            self._down.setdefault(place, set()).add(peer.hello.name)
        peer.line.post(Upstreams(tuple(self._upstreams.urls())))
        self._recount(now)

    def _recount(self, now: float) -> None:
        for place in range(len(self._upstreams.urls())):
            self._inbox += self._count(now, place, "most members find it down")

    def closed(self, now: float, line: Line) -> None:
        """A line was closed, by whomever."""
        peer = self._peers.pop(line, None)
        self._older.discard(line)
        if peer is None:
            return
        if peer is self._leader:
            self._lost[peer.hello.name] = now
            self._lose_leader(now)
        elif self._followers.get(peer.hello.name) is peer:
            self._let_go(now, peer)
        self.choose(now)
        self._carry_out(now)

    def _let_go(self, now: float, peer: _Peer) -> None:
        """A follower is gone, or decides for itself: its queries are no longer here."""
        name = peer.hello.name
        del self._followers[name]
        own = {query: each for query, each in self._entries.items() if query >> BITS == name}
        ends: list[Event] = [Gone(tuple(own))] if own else []
        ends += [Cancelled(number) for each in own.values() for number in each.attempts]
        ends += [Released(each.attempts[n][0], n) for each in own.values() for n in each.attempts]
        for event in ends:
            self._inbox += self._decide(now, name, event)
        for voters in self._down.values():
            voters.discard(name)
        self._recount(now)

    def _lose_leader(self, now: float) -> None:
        """Have another decide, or decide alone, from what is in flight here."""
        self._leader = None
        self.choose(now)
        if not self.decides:
            return
        self.alone += 1
        for line in self._peers:
            line.post(Decides(True))
        self._urls = tuple(self._upstreams.urls())
        for event in list(self._in_flight()):
            self._inbox += self._decide(now, self.name, event)

    def _in_flight(self) -> Iterator[Event]:
        """Yield what another scheduler is to know: what is under way before what waits for it."""
        entries = list(self._entries.values())
        for entry in sorted(entries, key=lambda each: not each.attempts):
            yield self._resumed(entry)
            if entry.is_over:
                yield Gone(entry.submit.queries)

    def choose(self, now: float) -> None:
        """Have the oldest member decide that does, and is older than this one."""
        able = [
            peer
            for line, peer in self._peers.items()
            if line in self._older
            and peer.decides
            and peer.rank < (self.started, self.name)
            and now - self._lost.get(peer.hello.name, -STEADY) >= STEADY
            and now - peer.heard < GONE
        ]
        best = min(able, key=lambda peer: peer.rank, default=None)
        if best is None or (self._leader is not None and self._leader.rank <= best.rank):
            return
        self._carry_out(now)
        self._leader, self._followers = best, {}
        for query in [query for query in self._entries if query >> BITS != self.name]:
            for number in self._entries.pop(query).attempts:
                del self._query_of[number]
        for line in self._peers:
            if line is not best.line:
                line.post(Decides(False))
        self._there, count = best.hello.upstreams, self.scheduler.flying.count
        down = [place for place, found in self._down.items() if self.name in found]
        self._down = {place: {self.name} for place in down}
        there = [self._place_there(place) for place in down]
        best.line.post(Join(tuple(place for place in there if place is not None)))
        for event in list(self._in_flight()):
            self._tell(best, event)
        self._renew(now, count)

    def _renew(self, now: float, count: int) -> None:
        """Have a scheduler ready that knows what is up, should this member decide again."""
        self.scheduler = self._make()
        self.scheduler.flying.count = count
        for place, url in enumerate(self._upstreams.urls()):
            if not url or place in self._down:
                self.scheduler.handle(now, WorkerLost(place, "it was down before"))
        if self._policy is not None:
            self.scheduler.handle(now, PolicyChanged(self._policy))

    def tick(self, now: float) -> None:
        """Ping, and see who is silent; wanted every `BEAT`."""
        stood_still = now - self._ticked > 2 * BEAT
        self._ticked = now
        self._ticks += 1
        for line in self._older:
            peer = self._peers[line]
            if self._ticks % RARE == 0 or (peer is self._leader and now - peer.heard > BEAT / 2):
                line.post(Ping(now))
        if stood_still:  # what was sent meanwhile has not been read yet
            for peer in self._peers.values():
                peer.heard = now
            return
        for line, peer in list(self._peers.items()):
            silent = now - peer.heard
            if silent > GONE or (peer is self._leader and silent > SILENCE):
                line.close()
                self.closed(now, line)
        if self.decides:
            self._look_at_upstreams()
        self.choose(now)
        self._carry_out(now)


def _query(action: Action) -> int | None:
    """Return the query that an action is for; None if it is for none, or for all."""
    match action:
        case Send():
            return action.members[0]
        case Answer() | AnswerDecoded() | Fail() | CopyRefused():
            return action.query
        case Decode():
            return action.wanted[0][0]
    return None


def _moved(event: Event, ahead: float) -> Event:
    """Return an event with the times of this member's clock."""
    match event:
        case Submit():
            return event._replace(deadline=event.deadline + ahead)
        case Resumed(submit, attempts):
            moved = tuple((number, worker, at + ahead) for number, worker, at in attempts)
            return Resumed(submit._replace(deadline=submit.deadline + ahead), moved)
    return event
