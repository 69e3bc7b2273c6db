from __future__ import annotations

import socket

from codedinvnet.serving.ray_pool import Actor, RayPool, last_line


def test_a_dead_actors_number_may_be_another_processs() -> None:
    pool = RayPool.__new__(RayPool)  # without Ray
    here, there = socket.gethostname(), "elsewhere"
    pool.actors = [Actor(None, here, 7), Actor(None, here, 8, dead="x"), Actor(None, there, 9)]
    assert [pool.pid(worker) for worker in range(3)] == [7, None, None]


def test_an_error_of_ray_comes_down_to_its_last_line() -> None:
    raised = (
        "The actor died because of an error raised in its creation task, ray::RayWorker (pid=7)\n"
        '  File "pool.py", line 97, in load\n'
        "codedinvnet.errors.UserError: no bundle 'nowhere'\n\n"
    )
    assert last_line(Exception(raised)) == "codedinvnet.errors.UserError: no bundle 'nowhere'"
    assert last_line(Exception()) == ""
