"""The scheduler's numbers: each with its unit, what it means, and why it has this value.

`python -m benchmarks tuning` halves and doubles each in the simulator, and prints what that does.
Record 62 has its table. *No cell moves* says that neither changes a quantile by more than seeds do.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Numbers that no user sets. Times in *service times* are of an ordinary task."""

    # What is known of running times

    times_kept: int = 1000
    """Running times of a kind that quantiles are of. No cell moves."""
    times_needed: int = 20
    """Running times of a kind before anything is known of it. Ten and 40 move two cells at
    most."""
    times_refreshed: int = 50
    """New running times after which quantiles are computed again. 100 raises p99 of held answers by
    7 %."""
    normal: float = 0.75
    """The share of the tasks that take no longer than is *normal*. With 0.875 p99 beside a slow
    server rises by 14 %."""
    late: float = 0.95
    """The share of the tasks that take no longer than is *late*. 0.975 and 0.9 both raise p99.9
    under Pareto blocks by a tenth."""
    late_factor: float = 1.05
    """How many times as long as that share a late task has run: equal times are not late. 1.025
    raises p99.9 under Pareto blocks by 10 %, 1.1 raises p99 of a busy gateway by 10 %."""
    latest: float = 3.0
    """How many times as long as normal a task has run that is late in any case. Where many
    straggle, the share `late` is of stragglers. 2 and 5 move one cell at most."""
    equal_times: float = 1e-6
    """Seconds by which two times of one event may differ, by rounding. No cell moves."""
    together: int = 8
    """Tasks that a worker has at a time are timed by their number up to this one. 4 and 16 move one
    cell at most."""

    # Which workers are slow

    slow: float = 2.0
    """How many times as long as normal a slow worker takes, and a straggler at least. Three, or no
    such rule, nearly double p99 with a slow server; 1.5 moves no cell."""
    retry: float = 2.0
    """After how many times its last running time a slow worker is tried again. One and four raise
    p99 of coded groups under bursts by 13 and 17 %."""
    most_strikes: int = 9
    """How often that time is doubled at most: 512 times as long. No cell moves."""
    few_slow: float = 1 / 3
    """The largest share of the workers, or one, that can be slow while the others are not. An
    eighth would double p99.9 where bursts slow three of eleven (record 57)."""

    # What stragglers cost, and how busy the workers are

    overhead_memory: int = 500
    """Answers that the cost of stragglers is an average of, and tasks that a normal time is. No
    cell moves."""
    first_overhead: float = 0.03
    """What stragglers cost before anything is known, in service times a task. Half of it lowers the
    extra work of `auto` with a code by 2 %; no quantile moves."""
    most_overhead: float = 10.0
    """Service times that one answer counts at most. No cell moves."""
    load_memory: int = 500
    """Queries that the load is an average of. 250 raises p99.9 under Pareto blocks at 70 % by a
    third; 1000 moves no cell."""

    # Which worker takes which task

    ramp: float = 10.0
    """Seconds that a worker which is back may be cold at most: what has done no task in that time
    does long ones, and must not be idle for longer. One that has done some is known by then."""
    turns: float = 3.0
    """The most turns, times the workers that are up, that others may have before one that answered
    with an error. By strict turns, requests of two routes that alternate meet one of two upstreams
    each: with two of three failing, 300 of 600 got errors, and 9 to 19 so. If all turns strayed,
    gateways that decide alone would collide: p99 of 16 before 64 servers was 73 ms for 38."""
    ahead: float = 0.5
    """Tasks that wait for each worker where one gets more than it computes at once (record 58). One
    raises p50 and p99 of a gateway at 90 % by a sixth; without the rule p50 is ten times as long
    where servers compute four at once and times vary."""
    overtaking_probe: int = 20
    """One task in so many goes behind a late one, to see whether it overtakes that. Without probes
    no p99 moves; p50 by 3 % where answers are held, 9 % the other way where times vary."""
    overtaking_memory: int = 5
    """How many of these are remembered. No cell moves."""

    keys_kept: int = 1 << 14
    """Beginnings that are remembered of each worker, which takes about 3 MB: of prompts 4 MB, or a
    million tokens, more than the cache of most servers of language models holds."""
    stays: float = 2.0
    """How long a task waits for a worker that has cached more of it, times what going elsewhere
    costs: it costs the task that time, and others the use of a slot for as long."""
    first_rate: float = 6e-5
    """Seconds that a byte of a prompt is taken to cost before any time is known: 4,000 tokens a
    second."""
    prompts_kept: int = 100
    """The last prompts whose times `Pace` goes by, and a fifth of that of each size class."""
    least_spread: float = 1024.0
    """Bytes between prompts before their times say what a byte takes."""
    least_base: float = 1e-3
    """Seconds that every prompt takes at least: less is the network's noise."""

    # How many tasks a worker computes at once, where that is found (record 58)

    first_slots: int = 3
    """The number before anything is known of any worker. Six raises p99.9 with a slow server by
    80 %, two raises p99 at 90 % by 11 %."""
    shrink_evidence: float = 4.0
    """Service times, in all, that others were ahead before the number shrinks. Two raises p99 at 90
    % by 11 %."""
    grow_evidence: float = 2.0
    """The same before it grows. Five for both let p99.9 under blocks rise from 31 to 75 ms. One
    raises p99 of held answers by 13 %, four that with a slow server by 16 %."""
    serial: float = 0.6
    """Tasks that were longer by this share of that time were not computed together: the share is
    near 0 or near 1. 0.8 raises p99 of held answers by 15 %, 0.2 that with a slow server by 16
    %."""
    alone_after: int = 200
    """Tasks for each slot, none of which had its worker to itself, until the next one gets it.
    After 50 this alone raised p99 by half at 80 % busy. No cell moves."""
    alone_step: float = 0.1
    """The share by which the time of a task alone moves towards each new one. 0.05 raises p99 where
    times vary by 4 %, 0.2 that at 90 % by 13 %."""

    # Copies of late queries

    most_copies: int = 2
    """Copies of one query. No cell moves."""
    worth: float = 0.2
    """The share of the square of what it takes that a copy must save, times the busy share of the
    slots by the idle one. 0.15 does more extra work everywhere, 0.3 raises p99.9 of exponential
    times at 60 % from 63 to 69 ms (record 57)."""
    least_idle: float = 0.03
    """The idle share counts as this at least: a stall of many service times is worth a copy of one
    while all are busy. 0.05 raises p50 where workers are overloaded (record 57). No cell moves."""
    race_memory: int = 100
    """Copies that savings and costs are averages of. Few copies save much and most save nothing:
    the average of 20 falls by chance to where copies stop, and only probes bring them back (p99.9
    of exponential times that vary by 30 %: 198 ms, and 144 with 100; record 57)."""
    race_prior: int = 10
    """Copies before the first, each of which is taken to have saved what it took. With one of them
    copies stop where the first few lose: p99.9 of bursts where times vary by 30 % is 250 ms, and
    167 with ten; with five it is 179."""
    race_probe: int = 200
    """Where copies do not pay, one of so many is sent. No cell moves."""
    longest_copy: float = 10.0
    """Service times that a copy takes at most: what is longer has stalled, and may be no work.
    Without it p99.9 of held answers at 90 % rises (record 57)."""
    most_saved: float = 100.0
    """Service times that a copy saves at most: what is longer is a hang. No cell moves."""
    later: float = 4.0
    """How many times as late a query is whose copies are judged apart, and 8 times that again.
    Judged together, copies of very late queries stop where bursts hit calls of four: p99.9 49 ms
    for 43 (eight seeds; in two of them 131 for 54 and 103 for 78)."""

    # The budget of extra work

    bucket: float = 10.0
    """Service times that may be saved up. 20 raises p99.9 under Pareto blocks by 38 %."""
    budget_memory: int = 500
    """Queries that the reported extra work is an average of. No cell moves."""
    reserve: float = 1.0
    """Service times that extra tasks which may yield leave for late queries. No cell moves."""
    most_charged: float = 20.0
    """Service times that a copy is charged at most: three let half-long requests do 29 % extra work
    (record 57). No cell moves."""

    # Extra tasks of a code

    most_backups: int = 2
    """Extra tasks for one late query at a time. No cell moves."""
    yields_after: float = 130.0
    """Needed tasks that may wait for each slot behind an extra one, times what stragglers cost,
    times the idle share. No cell moves."""
    yields_at: float = 4.0
    """The same, at most. No cell moves."""
    extra_retries: int = 2
    """How often a group's lost extra tasks are sent again. No cell moves."""
    patience: float = 0.1
    """Seconds that a lost query hopes to be decoded; then it is sent again. What it waits for may
    be on a worker that hangs. No cell moves. A prompt whose copy is not sent waits as long until
    that is considered again."""
    grace: float = 0.5
    """Seconds beyond its deadline that a query waits for what is being decoded for it. No cell
    moves."""

    # What `auto` does (record 40)

    auto_looks: int = 50
    """Queries between two decisions. No cell moves."""
    fill_memory: int = 50
    """Groups that the fill is an average of. No cell moves."""
    cheap: float = 0.5
    """Service times below which an extra task for one query is cheap. No cell moves."""
    codes_from: float = 0.02
    """Service times a task that stragglers cost where groups are coded; half of that to stop. No
    quantile moves; 0.04 does 2 % less work."""
    codes_busy: float = 0.5
    """The busy share up to which coding begins; a tenth more to stop. 0.25 raises p99.9 of `auto`
    with a code under exponential stragglers by 29 %."""


TUNING = Tuning()
