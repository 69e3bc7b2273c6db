"""A bundle's network behind LitServe, which `scheduling` compares the service with.

Arguments are a port and the bundle. LitServe is no dependency of this project.
"""

from __future__ import annotations

import base64
import sys
import time
from typing import Any

import litserve  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import torch

from codedinvnet.models.bundle import load_bundle


class Api(litserve.LitAPI):  # type: ignore[misc,unused-ignore]
    """Answers an image with its label, and with the seconds that the forward pass took."""

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = load_bundle(sys.argv[2]).model

    def decode_request(self, request: dict[str, str]) -> torch.Tensor:
        pixels = np.frombuffer(base64.b64decode(request["image"]), np.uint8)
        return torch.from_numpy(pixels.reshape(1, *self.model.settings.image_shape).copy())

    def predict(self, images: torch.Tensor) -> tuple[int, float]:
        began = time.perf_counter()
        with torch.inference_mode():
            label = int(self.model.classify(self.model.embed(images)).argmax())
        return label, time.perf_counter() - began

    def encode_response(self, found: tuple[int, float]) -> dict[str, Any]:
        return {"label": found[0], "seconds": found[1]}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1)
    how = {"generate_client_file": False, "log_level": "error"}
    server.run(host="127.0.0.1", port=int(sys.argv[1]), **how)
