"""Members without sockets: lines are queues, and whoever walks decides what happens next."""

from __future__ import annotations

import pickle
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from codedinvnet.members.member import BITS, Member
from codedinvnet.members.wire import Frames, Hello, Message, encode
from codedinvnet.scheduler.actions import Answer, Decided, Send
from codedinvnet.scheduler.events import Completed, Failed, Gone, Submit, WorkerLost, WorkerUp
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules

UPSTREAMS = 2
FAR = 1e6


def make() -> Scheduler:
    """Return a scheduler that copies nothing, since it never learns what is late."""
    return Scheduler(Rules(UPSTREAMS, POLICIES["hedge"], hang_timeout=FAR))


class Wire:
    """One end of a line; messages travel as bytes."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.sent: deque[bytes] = deque()
        self.is_open = True

    def post(self, message: Message) -> None:
        if self.is_open:
            self.sent.append(encode([message]))

    def close(self) -> None:
        self.is_open = False


class Gateway:
    """A member's front end, as the gateway's dispatcher is one."""

    def __init__(self, index: int, reversed_places: bool) -> None:
        self.index, self.now = index, 0.0
        urls = [f"http://{place}" for place in range(UPSTREAMS)]
        self.places = urls[::-1] if reversed_places else urls
        self.down: set[int] = set()
        self.member = Member(100 + index, float(index), make, self, self)
        self.submitted: list[int] = []
        self.repeatable: set[int] = set()
        self.ended: Counter[int] = Counter()
        self.sent: Counter[int] = Counter()
        self.known: dict[int, int] = {}
        """Attempts that the scheduler may know -> their query."""
        self.running: dict[int, tuple[int, int]] = {}
        """Attempts under way -> query and place."""
        self.suspected: list[int] = []

    # Upstreams

    def urls(self) -> Sequence[str]:
        return self.places

    def suspect(self, place: int, reason: str) -> None:
        self.suspected.append(place)

    def lose(self, place: int) -> None:
        """Find an upstream down, which answers what it has in hand all the same."""
        self.down.add(place)
        for number, (query, at) in self.running.items():
            if at == place:
                del self.known[number]
                if query not in self.repeatable and not self.ended[query]:
                    self.member.driver.feed(self.now, Gone((query,)))
        self.member.driver.feed(self.now, WorkerLost(place, "lost"))

    def find_up(self, place: int) -> None:
        self.down.discard(place)
        self.member.driver.feed(self.now, WorkerUp(place))

    # Clients

    def submit(self, repeatable: bool) -> None:
        query = (self.member.name << BITS) + len(self.submitted)
        self.submitted.append(query)
        if repeatable:
            self.repeatable.add(query)
        self.member.driver.feed(self.now, Submit((query,), FAR, repeatable=repeatable))

    def result(self, number: int) -> None:
        query, _ = self.running.pop(number)
        if self.known.pop(number, None) is not None:
            self.member.driver.feed(self.now, Completed(number))
        elif not self.ended[query]:
            self.member.driver.feed(self.now, Gone((query,)))
            self.ended[query] += 1

    # Actions

    def begin(self, sends: Sequence[Send]) -> None:
        (send,) = sends
        (query,) = send.members
        is_sent = query not in self.repeatable and self.sent[query]
        if self.ended[query] or is_sent or send.worker in self.down:
            final = not self.ended[query] and bool(is_sent)
            unsent = send.worker in self.down and not is_sent
            failed = Failed(send.attempt, "it may not be sent", final, unsent)
            self.member.driver.feed(self.now, failed)
            return
        assert send.attempt not in self.running
        self.sent[query] += 1
        self.known[send.attempt] = query
        self.running[send.attempt] = query, send.worker

    def answer(self, answer: Answer) -> None:
        self.ended[answer.query] += 1

    def fail(self, query: int, reason: str) -> None:
        assert self.ended[query], f"{query} failed: {reason}"

    def replace(self, worker: int, reason: str) -> None:
        pass

    def forget(self, attempts: Sequence[int], queries: Sequence[int]) -> None:
        pass

    def copy_refused(self, query: int, held_out: bool) -> None:
        """Do nothing."""

    def decided(self, decided: Decided) -> None:
        pass

    def set_timer(self, at: float | None) -> None:
        pass

    def broken(self, error: Exception) -> str:
        raise error


Event: TypeAlias = tuple[str, int, int]


@dataclass(frozen=True)
class Left:
    """What is still to happen."""

    submits: tuple[tuple[int, bool], ...] = ((1, True), (1, False), (0, True))
    """Each a member, and whether the query may be repeated."""
    breaks: int = 1
    losses: int = 0
    """Upstreams that a member finds down."""


@dataclass
class Line:
    """A line from a member to an older one."""

    younger: int
    older: int
    ends: dict[int, Wire] = field(default_factory=dict)
    """By member, its end; empty while there is none."""
    noticed: set[int] = field(default_factory=set)
    """The members that know that it is broken."""
    broken: bool = False


class World:
    """Members, the oldest first, each with a line to every older one."""

    def __init__(self, members: int = 2) -> None:
        self.gateways = [Gateway(index, index % 2 == 1) for index in range(members)]
        pairs = [(y, o) for y in range(members) for o in range(y)]
        self.lines = [Line(younger, older) for younger, older in pairs]

    def connect(self, line: Line) -> None:
        line.broken, line.noticed = False, set()
        line.ends = {end: Wire(end) for end in (line.younger, line.older)}
        hellos: dict[int, Hello] = {
            end: self.gateways[end].member.hello(0.0, "", "", "") for end in line.ends
        }
        for end, other in ((line.older, line.younger), (line.younger, line.older)):
            is_opened = end == line.younger
            member = self.gateways[end].member
            member._lost.clear()  # STEADY has passed
            member.connected(0.0, line.ends[end], hellos[other], is_opened)

    def events(self, left: Left) -> Iterator[tuple[Event, Left]]:
        """Yield what can happen, with what is left then."""
        if left.submits:
            yield ("submit", *left.submits[0]), replace(left, submits=left.submits[1:])
        for index, gateway in enumerate(self.gateways):
            for number in gateway.running:
                yield ("result", index, number), left
            for place in gateway.down:
                yield ("up", index, place), left
            if left.losses:
                yield ("loss", index, 0), replace(left, losses=left.losses - 1)
        for index, line in enumerate(self.lines):
            for end, wire in line.ends.items():
                if line.broken and end not in line.noticed:
                    yield ("notice", index, end), left
                elif wire.sent and not line.broken:
                    yield ("deliver", index, end), left
            if not line.ends or len(line.noticed) == 2:
                yield ("connect", index, 0), left
            elif left.breaks and not line.broken:
                yield ("break", index, 0), replace(left, breaks=left.breaks - 1)

    def happen(self, event: Event) -> None:
        kind, index, n = event
        if kind == "submit":
            self.gateways[index].submit(bool(n))
        elif kind == "result":
            self.gateways[index].result(n)
        elif kind == "up":
            self.gateways[index].find_up(n)
        elif kind == "loss":
            self.gateways[index].lose(n)
        elif kind == "connect":
            self.connect(self.lines[index])
        elif kind == "break":
            self.lines[index].broken = True
        elif kind == "notice":
            line = self.lines[index]
            line.noticed.add(n)
            self.gateways[n].member.closed(0.0, line.ends[n])
        else:
            line = self.lines[index]
            other = line.younger if n == line.older else line.older
            (message,) = Frames().feed(line.ends[n].sent.popleft())
            self.gateways[other].member.receive(0.0, line.ends[other], message)
        self.check()

    def check(self) -> None:
        for gateway in self.gateways:
            assert all(count <= 1 for count in gateway.ended.values()), "it ended twice"
            once = [q for q in gateway.sent if q not in gateway.repeatable]
            assert all(gateway.sent[q] == 1 for q in once), "it was sent twice"

    def check_end(self) -> None:
        """Nothing is left to happen: nothing may be left behind."""
        for gateway in self.gateways:
            assert set(gateway.submitted) == set(gateway.ended), "a query is lost"
            assert not gateway.known
            assert not gateway.member._entries
            assert not gateway.member._query_of
        oldest = self.gateways[0].member
        assert oldest.decides
        assert oldest.size == len(self.gateways)
        scheduler = oldest.scheduler
        assert not scheduler.queries
        assert not scheduler.attempts
        assert not any(map(scheduler.load, range(UPSTREAMS)))
        assert scheduler.workers_up == UPSTREAMS

    def fingerprint(self, left: Left) -> str:
        """Return what tells a state from others, but for numbers."""
        told: list[object] = [left]
        for gateway in self.gateways:
            member, scheduler = gateway.member, gateway.member.scheduler
            leader = member._leader and member._leader.hello.name
            entries = [
                (query, entry.is_over, list(entry.attempts.items()))
                for query, entry in member._entries.items()
            ]
            queries = [(q.identity, list(q.attempts)) for q in scheduler.queries.values()]
            at = [list(worker.running) for worker in scheduler.assigner.workers]
            told += [leader, sorted(member._followers), entries, sorted(scheduler.assigner.up)]
            told += [queries, at, sorted((k, sorted(v)) for k, v in member._down.items() if v)]
            told += [list(gateway.known), list(gateway.running.items()), sorted(gateway.down)]
            told += [sorted(gateway.ended.items()), sorted(gateway.sent.items())]
        for line in self.lines:
            sent = [list(wire.sent) for wire in line.ends.values()]
            told += [line.broken, sorted(line.noticed), sent]
        numbers: dict[str, str] = {}
        return re.sub(
            r"\d{10,}",
            lambda found: numbers.setdefault(found[0], f"#{len(numbers)}"),
            re.sub(r"\\x..|b'....", "", repr(told)),
        )


@dataclass
class Walk:
    """What was met."""

    seen: set[int] = field(default_factory=set)
    steps: int = 0
    ends: int = 0


def walk(world: World, left: Left) -> Walk:
    """Walk through all orders.

    Raises:
        AssertionError: if a rule is broken, with the events that led there.
    """
    found = Walk({hash(world.fingerprint(left))})
    stack: list[tuple[bytes, list[tuple[Event, Left]], tuple[Event, ...]]] = []
    stack.append((pickle.dumps(world), list(world.events(left)), ()))
    while stack:
        state, todo, path = stack.pop()
        if not todo:
            found.ends += 1
            _check_end(pickle.loads(state), path)
        for event, rest in todo:
            world = pickle.loads(state)
            try:
                world.happen(event)
            except Exception as error:
                raise AssertionError(f"{error!r}\nafter {(*path, event)}") from error
            found.steps += 1
            mark = hash(world.fingerprint(rest))
            if mark not in found.seen:
                found.seen.add(mark)
                stack.append((pickle.dumps(world), list(world.events(rest)), (*path, event)))
    return found


def _check_end(world: World, path: Sequence[Event]) -> None:
    try:
        world.check_end()
    except AssertionError as error:
        raise AssertionError(f"{error!r}\nafter {path}") from error
