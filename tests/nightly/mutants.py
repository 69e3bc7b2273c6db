"""Faults made by hand, each of which a test of `make test` must notice.

`test_mutants.py` makes them one after another in a copy of the source. What it replaces stands in
its file once, which `tests/test_mutants.py` checks at every change.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault."""

    name: str
    file: str
    """Below `src/codedinvnet`."""
    old: str
    new: str
    noticed_by: str
    """A file below `tests/`, or one of its tests: FILE::TEST."""


TOKENS = "contract/test_tokens.py"
LIMITS = "contract/test_limits.py"
CONNECTIONS = "contract/test_connections.py"
EDGES, HTTP1 = "gateway/test_edges.py", "net/test_http1.py"
CLUSTER, HEDGING = "gateway/test_cluster.py", "gateway/test_hedging.py"

MUTANTS = (
    # Tokens
    Mutant(
        "any bearer token is accepted",
        "gateway/tokens.py",
        "right = hmac.compare_digest(token.strip(), self._expected)",
        "right = True",
        TOKENS,
    ),
    Mutant(
        "calls over gRPC need no token",
        "gateway/grpc.py",
        "if not self.token.is_right(",
        "if False and not self.token.is_right(",
        TOKENS,
    ),
    Mutant(
        "the client's token is forwarded where upstreams have none",
        "gateway/run.py",
        "replaces = own is not None or self.token.is_needed",
        "replaces = own is not None",
        TOKENS,
    ),
    Mutant(
        "the client's token is forwarded beside the gateway's own",
        "gateway/proxy.py",
        '(*NOT_PASSED_ON, b"authorization")',
        "NOT_PASSED_ON",
        TOKENS,
    ),
    Mutant(
        "the upstream token is not read again",
        "gateway/tokens.py",
        "self._take(await in_thread(",
        "(await in_thread(",
        TOKENS,
    ),
    Mutant(
        "the port of its own needs no token",
        "gateway/run.py",
        "return None if path in OPEN else self.token.refusal(head)",
        "return None",
        TOKENS,
    ),
    Mutant(
        "serve accepts any token",
        "serving/api/guard.py",
        'if self.token and (scheme.lower() != b"bearer" or not right):',
        'if self.token and scheme.lower() != b"bearer":',
        "serving/api/test_access.py",
    ),
    Mutant(
        "serve answers any host",
        "serving/api/guard.py",
        'if host is not None and not self.knows(host.decode("latin-1")):',
        'if host is None and not self.knows(""):',
        "serving/api/test_access.py",
    ),
    Mutant(
        "whoever reaches the port changes the gateway's policy",
        "gateway/admin.py",
        "if not self.is_guarded:",
        "if False:",
        "gateway/test_run.py::test_changing_the_policy",
    ),
    Mutant(
        "a page of another site changes the gateway's policy",
        "gateway/admin.py",
        'if kind != b"application/json":',
        "if False:",
        "gateway/test_run.py::test_changing_the_policy",
    ),
    Mutant(
        "upstreams' certificates are not checked",
        "net/client.py",
        "context = ssl.create_default_context()",
        "context = ssl._create_unverified_context()",
        "gateway/test_run.py::test_tls_on_both_sides",
    ),
    # Life
    Mutant(
        "it is ready while it drains",
        "gateway/admin.py",
        "ready = up and not self.is_draining",
        "ready = up",
        TOKENS,
    ),
    Mutant(
        "a stopping gateway drops what it has",
        "net/server.py",
        "while self.connections and time.monotonic() < until:",
        "while False:",
        "gateway/test_run.py::test_a_stopping_gateway_answers_what_it_has",
    ),
    Mutant(
        "what a client that left has asked for goes on",
        "gateway/proxy.py",
        "self.dispatcher.cancel(self)",
        "pass",
        EDGES,
    ),
    # Limits of time
    Mutant(
        "streams may stand still for ever",
        "gateway/dispatcher.py",
        "STREAM_IDLE = 300.0",
        "STREAM_IDLE = 1e9",
        LIMITS,
    ),
    Mutant(
        "handshakes may take for ever",
        "net/server.py",
        "HANDSHAKE = 10.0",
        "HANDSHAKE = 1e6",
        LIMITS,
    ),
    Mutant(
        "heads may take for ever",
        "net/server.py",
        'return "head" if age > HEAD_TIMEOUT else ""',
        'return ""',
        LIMITS,
    ),
    Mutant(
        "bodies may stand still for ever",
        "net/server.py",
        "or age > BODY_TIMEOUT",
        "",
        LIMITS,
    ),
    Mutant(
        "idle clients stay for ever",
        "net/server.py",
        "KEEP_ALIVE = 75.0",
        "KEEP_ALIVE = 1e9",
        LIMITS,
    ),
    Mutant(
        "clients that do not read stay for ever",
        "net/server.py",
        "UNREAD = 60.0",
        "UNREAD = 1e9",
        LIMITS,
    ),
    Mutant(
        "messages over gRPC may take for ever",
        "gateway/grpc.py",
        "READ_TIMEOUT, READS = 60.0, 32",
        "READ_TIMEOUT, READS = 1e6, 32",
        LIMITS,
    ),
    Mutant(
        "requests have no deadline",
        "scheduler/scheduler.py",
        'case "deadline":',
        'case "deadline" if False:',
        "gateway/test_limits.py::test_a_deadline_says_where_the_request_was",
    ),
    # Limits of memory and size
    Mutant(
        "messages over gRPC are not counted",
        "gateway/grpc.py",
        "server.memory.take(self.size)",
        "self.size = 0",
        LIMITS,
    ),
    Mutant(
        "memory is never full",
        "net/memory.py",
        "return 8 * self.used >= 7 * self.most",
        "return False",
        "gateway/test_limits.py",
    ),
    Mutant(
        "bodies are read though memory is full",
        "net/requests.py",
        "if size and self.memory.is_full_for(self.size):",
        "if False:",
        "gateway/test_limits.py",
    ),
    Mutant(
        "answers that are held are not counted",
        "gateway/attempts.py",
        "self.call.memory.take(len(data))",
        "pass",
        "gateway/test_limits.py",
    ),
    Mutant(
        "answers that wait for slow clients are not counted",
        "net/answers.py",
        "self._held += size",
        "self.memory.give(size)",
        "gateway/test_limits.py",
    ),
    Mutant(
        "a slow client's upstream is read on",
        "gateway/proxy.py",
        "self.winner.pause()",
        "pass",
        "gateway/test_streams.py::test_a_slow_reader_is_waited_for_within_bounds",
    ),
    Mutant(
        "bodies in chunks have no limit",
        "net/requests.py",
        "if self.size > self._most:",
        "if False:",
        EDGES,
    ),
    Mutant(
        "heads have no limit", "net/http1.py", "MOST_HEAD = 1 << 16", "MOST_HEAD = 1 << 30", EDGES
    ),
    Mutant(
        "trailers have no limit",
        "net/http1.py",
        "if len(data) - at > MOST_HEAD:",
        "if False:",
        LIMITS,
    ),
    Mutant(
        "the line before a chunk has no limit",
        "net/http1.py",
        "or size - at > MOST_SIZE_LINE",
        "",
        HTTP1,
    ),
    Mutant(
        "connections have no limit",
        "net/server.py",
        "if len(self.connections) >= self.most_connections:",
        "if False:",
        "net/test_server.py::test_connections_have_a_limit",
    ),
    Mutant(
        "the gateway takes whatever waits longer than the deadline",
        "gateway/dispatcher.py",
        "if self.admission.takes(pending, 1, call.deadline - now):",
        "if True:",
        "gateway/test_limits.py::test_an_overload_is_refused_and_not_queued_beyond_the_deadline",
    ),
    Mutant(
        "tensors that serve holds have no limit",
        "serving/api/bodies.py",
        "if self.used - held + size > self.most:",
        "if False:",
        "serving/api/test_limits.py",
    ),
    Mutant(
        "compressed bodies have no limit",
        "net/protocol/http.py",
        "if len(found) > limit:",
        "if False:",
        "net/protocol/test_messages.py",
    ),
    # The grammar of HTTP/1.1
    Mutant(
        "a length goes with chunks",
        "net/http1.py",
        'if length is not None or minor == b"0":',
        'if minor == b"0":',
        HTTP1,
    ),
    Mutant(
        "a length may have a sign",
        "net/http1.py",
        '_LENGTH = re.compile(rb"[0-9]{1,18}")',
        '_LENGTH = re.compile(rb"[+]?[0-9]{1,18}")',
        HTTP1,
    ),
    Mutant(
        "any transfer coding is taken for chunked",
        "net/http1.py",
        'if coding.lower() != b"chunked":',
        "if False:",
        HTTP1,
    ),
    Mutant(
        "a field may end with a bare LF",
        "net/http1.py",
        'rb":" + _TEXT + rb"\\r\\n)*\\r\\n")',
        'rb":" + _TEXT + rb"\\r?\\n)*\\r\\n")',
        HTTP1,
    ),
    Mutant(
        "a space may stand before a colon",
        "net/http1.py",
        '_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":"',
        '_FIELDS = re.compile(rb"(?:" + _TOKEN + rb" ?:"',
        HTTP1,
    ),
    Mutant(
        "a chunk may be longer than its size",
        "net/http1.py",
        'if data[at : at + 2] != b"\\r\\n":',
        "if False:",
        HTTP1,
    ),
    Mutant(
        "a request may have two hosts",
        "net/http1.py",
        'raise BadMessage("a request needs one Host field")',
        "pass",
        HTTP1,
    ),
    Mutant(
        "fields that Connection names are passed on",
        "net/http1.py",
        "left_out.update(",
        "print(",
        "gateway/test_forwarding.py::test_fields_in_both_directions",
    ),
    Mutant(
        "a connection goes on behind what was malformed",
        "net/server.py",
        "self.answers.refuse(error.status, str(error), wait, closes=True)",
        "self.answers.refuse(error.status, str(error), wait)",
        EDGES,
    ),
    Mutant(
        "an upstream may switch to another protocol",
        "net/client.py",
        "if head.status == 101:",
        "if False:",
        "net/test_client.py::test_an_answer_that_is_cut_or_malformed",
    ),
    # Poisoned connections
    Mutant(
        "a connection is used again though more than the answer came",
        "net/client.py",
        "head.keeps and not rest and not unread",
        "head.keeps and not unread",
        "net/test_client.py::test_whole_answers",
    ),
    Mutant(
        "a connection is used again though bytes came meanwhile",
        "net/client.py",
        "return self._poll is None or not self._poll.poll(0)",
        "return True",
        "net/test_client.py::test_a_kept_connection_with_unread_bytes_is_not_used",
    ),
    Mutant(
        "a connection is used again though the server closes it",
        "net/client.py",
        "head.keeps and not rest and not unread",
        "not rest and not unread",
        "net/test_client.py::test_whole_answers",
    ),
    Mutant(
        "a connection is used again though its request is not written",
        "net/client.py",
        "head.keeps and not rest and not unread",
        "head.keeps and not rest",
        CONNECTIONS,
    ),
    Mutant(
        "an upstream whose answers are others' comes back without a restart",
        "gateway/cluster.py",
        "await cluster.until_restart(endpoint)",
        "pass",
        f"{CLUSTER}::test_an_upstream_whose_stub_stood_still",
    ),
    # What must not be repeated
    Mutant(
        "every route may be repeated",
        "gateway/routes.py",
        "return self._route(OTHERS, False)",
        "return self._route(OTHERS, True)",
        f"{HEDGING}::test_which_routes_are_hedged",
    ),
    Mutant(
        "a client cannot say that its request must not be repeated",
        "gateway/run.py",
        'head.known.get(b"x-hedge", b"").lower() != b"off"',
        "True",
        HEDGING,
    ),
    Mutant(
        "requests of a sequence are repeated",
        "gateway/run.py",
        "repeatable = not is_stateful(head, body)",
        "repeatable = True",
        HEDGING,
    ),
    Mutant(
        "requests of a sequence over gRPC are repeated",
        "gateway/grpc.py",
        "any(word in message for word in STATEFUL)",
        "False",
        "gateway/test_grpc.py",
    ),
    Mutant(
        "the scheduler copies what must not be repeated",
        "scheduler/dispatch.py",
        "elif attempt.query.repeatable:",
        "else:",
        "gateway/test_grpc.py",
    ),
    Mutant(
        "what broke off is sent again though it must not be repeated",
        "gateway/dispatcher.py",
        "if not call.repeatable or failure.cause is Cause.NO_FILES",
        "if failure.cause is Cause.NO_FILES",
        f"{HEDGING}::test_what_must_not_be_repeated_reaches_one_upstream",
    ),
    Mutant(
        "what must not be repeated goes on a connection that may be closing",
        "gateway/attempts.py",
        "LONGEST_IDLE if self.call.repeatable else FRESH",
        "LONGEST_IDLE",
        LIMITS,
    ),
    Mutant(
        "what must not be repeated is written again on another connection",
        "gateway/attempts.py",
        "error.stale and self.call.repeatable and not self._again",
        "error.stale and not self._again",
        f"{HEDGING}::test_what_must_not_be_repeated_reaches_one_upstream",
    ),
    # Copies and failures
    Mutant(
        "copies have no budget",
        "scheduler/budget.py",
        "if self.tokens < min(work + left, BUCKET):",
        "if False:",
        "scheduler/test_hedging.py",
    ),
    Mutant(
        "failed requests are sent again without end",
        "gateway/dispatcher.py",
        "taken = self._retries >= 1.0",
        "taken = True",
        f"{CLUSTER}::test_failed_requests_are_not_sent_again_without_end",
    ),
    Mutant(
        "what kills upstreams is sent to all of them",
        "gateway/dispatcher.py",
        "MOST_BREAKS = 2",
        "MOST_BREAKS = 9",
        f"{CLUSTER}::test_a_request_that_breaks_two_upstreams_is_sent_to_no_third",
    ),
    Mutant(
        "the last upstreams are ejected as well",
        "gateway/cluster.py",
        "if sound and (endpoint.on_probation",
        "if (endpoint.on_probation",
        f"{CLUSTER}::test_what_all_upstreams_say_is_the_requests_fault",
    ),
    Mutant(
        "no upstream is ejected for its failures",
        "gateway/cluster.py",
        "endpoint.failures >= MOST_FAILURES",
        "False",
        f"{CLUSTER}::test_an_upstream_that_fails_requests_is_made_up_for_and_ejected",
    ),
    Mutant(
        "an upstream that comes back has all its lives",
        "gateway/cluster.py",
        "if sound and (endpoint.on_probation or ",
        "if sound and (",
        CONNECTIONS,
    ),
    Mutant(
        "copies go to the worker that is late",
        "scheduler/assigner.py",
        "if worker not in at and worker not in failed and worker not in holders:",
        "if True:",
        "scheduler/test_hedging.py",
    ),
    Mutant(
        "a query that no worker can answer is tried for ever",
        "scheduler/completion.py",
        "if not query.is_waiting or not (final or query.losses >= self._on.rules.max_losses):",
        "if not query.is_waiting or not final:",
        "scheduler/test_losses.py",
    ),
    # Answers that are released
    Mutant(
        "answers below the threshold are released",
        "serving/gate.py",
        "self.watch.releasing and found.confidence >= threshold",
        "self.watch.releasing",
        "serving/test_gate.py",
    ),
    Mutant(
        "answers are released though traffic broke the limit",
        "serving/gate.py",
        "self.watch.releasing and found.confidence >= threshold",
        "found.confidence >= threshold",
        "serving/test_gate.py",
    ),
    Mutant(
        "a request's own limit is overlooked",
        "serving/gate.py",
        "return lower[0] if lower else self.limits[-1]",
        "return self.limit",
        "serving/test_gate.py",
    ),
    Mutant(
        "answers that are not finite are released",
        "serving/dispatch.py",
        "elif not math.isfinite(found.confidence):",
        "elif False:",
        "serving/test_decoding.py",
    ),
    Mutant(
        "thresholds are accepted without a test",
        "protect/bound.py",
        "limit, horizon)[first:] <= RISK",
        "limit, horizon)[first:] <= 0.5",
        "protect/test_bound.py",
    ),
    Mutant(
        "the threshold may follow one that failed",
        "protect/bound.py",
        "count = len(kept) if kept.all() else int(np.argmin(kept))",
        "count = len(kept) - int(np.argmax(kept[::-1])) if kept.any() else 0",
        "protect/test_bound.py",
    ),
    Mutant(
        "a part that changed since keeps its calibration",
        "protect/calibration.py",
        'known = self.parts.get(f"{method}-k{k}") == digest',
        "known = True",
        "protect/test_calibration.py",
    ),
    # Networks, codes and files
    Mutant(
        "an inverse that did not converge is returned",
        "nn/iresnet.py",
        "raise NotConverged(float(residual.max()), open_rows.numel(), max_iterations)",
        "return solution",
        "nn/test_inverse.py",
    ),
    Mutant(
        "an inverse of NaN converges",
        "nn/iresnet.py",
        "is_open = ~(residual <= tolerance)",
        "is_open = residual > tolerance",
        "nn/test_inverse.py",
    ),
    Mutant(
        "a parity makes up for two",
        "codes/rules.py",
        "if len(available) >= size:\n            return _everyone(size)\n"
        "        return _here(available, size)\n\n\n@dataclass(frozen=True)\nclass AnswersAll",
        "if len(available) >= size - 1:\n            return _everyone(size)\n"
        "        return _here(available, size)\n\n\n@dataclass(frozen=True)\nclass AnswersAll",
        "codes/test_rules.py",
    ),
    Mutant(
        "Berrut's interpolant has no signs",
        "codes/berrut.py",
        "signs = 1.0 - 2.0 * (rank % 2).to(nodes)",
        "signs = torch.ones_like(nodes)",
        "codes/test_berrut.py",
    ),
    Mutant(
        "a crash leaves a part of a file",
        "common/files.py",
        'with name.open("xb") as file:',
        'target.write_bytes(content[:1])\n        with name.open("xb") as file:',
        "test_files.py",
    ),
    Mutant(
        "weights of another format are read",
        "models/checkpoint.py",
        "if version != FORMAT_VERSION:",
        "if False:",
        "test_checkpoint.py",
    ),
    Mutant(
        "a backup serves another model than it was made for",
        "protect/folder.py",
        "if found.model.digest != model.source.digest:",
        "if False:",
        "protect/test_served.py",
    ),
    Mutant(
        "a worker computes other weights than the front end has seen",
        "models/source.py",
        "if self.digest:",
        "if False:",
        "models/test_weights_beside.py",
    ),
    Mutant(
        "stopped workers outlive the front end",
        "serving/workers/process.py",
        "fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())",
        "pass",
        "serving/workers/test_lifetimes.py",
    ),
)
