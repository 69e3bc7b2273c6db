"""ONNX files that have weights in other files beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from codedinvnet.common.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.models.probe import probe_inputs
from tests.models import factories
from tests.models.factories import made


def by_pytorch(queries: dict[str, np.ndarray]) -> np.ndarray:
    """Return what PyTorch makes of queries by the model `mlp`."""
    with torch.inference_mode():
        found: np.ndarray = made(factories.mlp)[0](*map(torch.from_numpy, queries.values())).numpy()
    return found


def test_weights_beside_an_onnx_file_count(tmp_path: Path) -> None:
    path = factories.save_onnx(factories.mlp, tmp_path / "mlp.onnx", external=True)
    model = open_model(path)
    weights = tmp_path / "mlp.onnx.data"
    queries = probe_inputs(model.signature.inputs)
    np.testing.assert_allclose(model.run(queries)["logits"], by_pytorch(queries), rtol=1e-4)
    content = weights.read_bytes()
    weights.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match="restart the service"):
        model.source.open()
    weights.unlink()
    with pytest.raises(UserError, match=r"weights in mlp\.onnx\.data, which is not in its folder"):
        open_model(path)


def test_links_of_a_cache_to_a_model_and_its_weights(tmp_path: Path) -> None:
    model = open_model(factories.linked_onnx(factories.mlp, tmp_path, "blobs/bbb"))
    queries = probe_inputs(model.signature.inputs)
    np.testing.assert_allclose(model.run(queries)["logits"], by_pytorch(queries), rtol=1e-4)


def test_a_link_to_weights_elsewhere_is_refused(tmp_path: Path) -> None:
    path = factories.linked_onnx(factories.mlp, tmp_path, "elsewhere/bbb")
    with pytest.raises(
        UserError, match=r"weights in model\.onnx\.data, which is not in its folder"
    ):
        open_model(path)


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd"])
def test_weights_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = constant_elsewhere(tmp_path / "model" / "a.onnx", name, tmp_path / "weights")
    with pytest.raises(UserError, match="which is not in its folder"):
        open_model(path)


def constant_elsewhere(path: Path, name: str, weights: Path) -> Path:
    """Write a model that adds 0, 1, 2, 3, which a Constant node has in another file."""
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    weights.write_bytes(tensor.raw_data)
    set_external_data(tensor, name)
    tensor.ClearField("raw_data")
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor)]
    nodes.append(helper.make_node("Add", ["x", "w"], ["sum"]))
    value: list[factories.Value] = [("x", TensorProto.FLOAT, [None, 4])]
    outputs: list[factories.Value] = [("sum", TensorProto.FLOAT, [None, 4])]
    return factories.write_graph(path, nodes, value, outputs)
