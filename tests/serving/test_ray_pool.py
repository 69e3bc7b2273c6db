from __future__ import annotations

from codedinvnet.serving.ray_pool import last_line


def test_an_error_of_ray_comes_down_to_its_last_line() -> None:
    raised = (
        "The actor died because of an error raised in its creation task, ray::RayWorker (pid=7)\n"
        '  File "pool.py", line 97, in load\n'
        "codedinvnet.errors.UserError: no bundle 'nowhere'\n\n"
    )
    assert last_line(Exception(raised)) == "codedinvnet.errors.UserError: no bundle 'nowhere'"
    assert last_line(Exception()) == ""
