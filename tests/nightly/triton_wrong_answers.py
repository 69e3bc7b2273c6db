"""Show that Triton's Python backend can answer a request with the content of an earlier one.

    python triton_wrong_answers.py models  # writes models/echo, then waits for the server
    while true; do tritonserver --model-repository models; done

The model returns its input, and every request has another. The script stops the backend's stub for
0.3 to 4 seconds while clients send requests. If the stub gives no sign of life for a second, Triton
answers "Stub process ... is not healthy" but leaves the request in the stub's queue. The stub goes
on and answers it, and the next request gets that answer, under its own id.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import urllib.request as http
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

URL, STOPS, CLIENTS = "http://127.0.0.1:8000/v2/models/echo/infer", 40, 4
CONFIG = """backend: "python"
input [ { name: "x" data_type: TYPE_INT64 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ] } ]
"""
MODEL = f"""import sys; sys.path[:0] = {sys.argv[2:]}  # for another numpy
import triton_python_backend_utils as pb
class TritonPythonModel:
    def execute(self, requests):
        xs = (pb.get_input_tensor_by_name(request, "x") for request in requests)
        return [pb.InferenceResponse([pb.Tensor("y", x.as_numpy())]) for x in xs]
"""


def ask(number: int) -> str:
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [number]}
    body = json.dumps({"id": str(number), "inputs": [tensor]}).encode()
    try:
        with http.urlopen(URL, body, timeout=30) as reply:
            found = json.load(reply)
    except OSError as error:  # Triton says so, or is starting
        return type(error).__name__
    if (got := found["outputs"][0]["data"][0]) == number:
        return "right"
    print(f"sent id {number}, x = {number}; got id {found['id']}, y = {got}", flush=True)
    return "WRONG"


def load(number: int) -> None:
    while not over:
        count[ask(number)] += 1
        number += CLIENTS
        time.sleep(0.02)


def send(number: int) -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may have ended
            if b"stub\0%b/1/model.py" % str(model).encode() in path.read_bytes():
                os.kill(int(path.parent.name), number)


model = Path(sys.argv[1]) / "echo"
(model / "1").mkdir(parents=True, exist_ok=True)
(model / "config.pbtxt").write_text(CONFIG)
(model / "1" / "model.py").write_text(MODEL)
over, count = list[bool](), Counter[str]()
with ThreadPoolExecutor(CLIENTS) as pool:
    clients = pool.map(load, range(1, CLIENTS + 1))
    for _ in range(STOPS):
        while ask(0) != "right":
            time.sleep(1.0)
        send(signal.SIGSTOP)
        time.sleep(random.uniform(0.3, 4.0))
        send(signal.SIGCONT)
    over.append(True)
print(f"{STOPS} stops: {dict(count)}")
