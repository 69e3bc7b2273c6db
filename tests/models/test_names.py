"""Names and sizes of a `.pt2` file, which PyTorch pastes into Python text that it runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.models.program import load_program
from tests.models.test_refusals import MODEL, edited, refused


class Choosing(nn.Module):
    """Has a subgraph, a keyword argument, a weight in a module of an odd name, and legal names."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"the 1st-head": nn.Linear(4, 4)})
        self.requires_grad_(False)

    def forward(self, input: Tensor, größe_2: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        scores = self.heads["the 1st-head"](input) * scale + größe_2
        with torch.no_grad():
            chosen = torch.cond(scores.sum() > 0, torch.sin, torch.cos, (scores,))
        return {"the scores": chosen}


@pytest.fixture(scope="module")
def choosing_pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = torch.zeros(2, 4)
    axes = {name: {0: torch.export.Dim.DYNAMIC} for name in ("input", "größe_2", "scale")}
    program = torch.export.export(Choosing(), (batch, batch), {"scale": batch}, dynamic_shapes=axes)
    path = tmp_path_factory.mktemp("choosing") / "a.pt2"
    torch.export.save(program, path)
    return path


def more(inputs: list[Any], specs: list[Any], argument: dict[str, Any]) -> None:
    inputs.append(argument)
    specs.append({"user_input": {"arg": argument}})


def an_input(module: Any, code: str) -> None:
    graph = module["graph"]
    graph["tensor_values"][f"x={code}"] = graph["tensor_values"]["input"]
    tensor = {"as_tensor": {"name": f"x={code}"}}
    more(graph["inputs"], module["signature"]["input_specs"], tensor)


def a_size_as_input(module: Any, code: str) -> None:
    graph = module["graph"]
    graph["sym_int_values"][f"x={code}"] = {"as_int": 1}
    number = {"as_sym_int": {"as_name": f"x={code}"}}
    more(graph["inputs"], module["signature"]["input_specs"], number)


def an_object_as_input(module: Any, code: str) -> None:
    graph = module["graph"]
    custom = {"name": f"x={code}", "class_fqn": "a"}
    graph["custom_obj_values"] = {custom["name"]: custom}
    graph["inputs"].append({"as_custom_obj": custom})
    spec = {"custom_obj": {"arg": custom, "custom_obj_name": "a"}}
    module["signature"]["input_specs"].append(spec)


def a_constant_input(module: Any, code: str) -> None:
    module["graph"]["inputs"].append({"as_int": 1})
    spec = {"constant_input": {"name": f"x={code}", "value": {"as_int": 1}}}
    module["signature"]["input_specs"].append(spec)


def cond(module: Any) -> Any:
    (node,) = (node for node in module["graph"]["nodes"] if node["target"].endswith(".cond"))
    return node


def an_input_of_a_subgraph(module: Any, code: str) -> None:
    graph = cond(module)["inputs"][1]["arg"]["as_graph"]["graph"]
    (values,) = graph["inputs"]
    graph["tensor_values"][f"x={code}"] = graph["tensor_values"][values["as_tensor"]["name"]]
    graph["inputs"].append({"as_tensor": {"name": f"x={code}"}})


def a_subgraph(module: Any, code: str) -> None:
    graph = cond(module)["inputs"][1]["arg"]["as_graph"]
    graph["name"] = f'a", {code}, "b'


def an_argument_of_a_higher_order_operator(module: Any, code: str) -> None:
    given = copy.deepcopy(cond(module)["inputs"][0])
    cond(module)["inputs"].append({**given, "kind": 2, "name": f"a={code},b"})


def a_node(module: Any, code: str) -> None:
    module["graph"]["nodes"][0]["name"] = f"{code};a"


def forward_arg_names(module: Any, code: str) -> None:
    signature = module["module_call_graph"][0]["signature"]
    signature["forward_arg_names"].append(f"x={code}")


def a_keyword(module: Any, code: str) -> None:
    signature = module["module_call_graph"][0]["signature"]
    spec = json.loads(signature["in_spec"])
    spec[1]["children_spec"][1]["context"] = json.dumps([f"scale={code}"])
    signature.update(in_spec=json.dumps(spec), forward_arg_names=None)


def a_weight(module: Any, code: str) -> None:
    """Its name is in quotes, and has no full stop but between attributes."""
    spec = next(spec for spec in module["signature"]["input_specs"] if "parameter" in spec)
    spec["parameter"]["parameter_name"] = f'a", {code}, "'


def an_attribute_of_a_class(module: Any, code: str) -> None:
    spec = next(spec for spec in module["signature"]["input_specs"] if "parameter" in spec)
    spec["parameter"]["parameter_name"] = "__class__.__call__"


def sizes(module: Any) -> Any:
    return module["graph"]["tensor_values"]["input"]["sizes"]


def a_size(module: Any, code: str) -> None:
    sizes(module)[0]["as_expr"]["expr_str"] = code


def a_size_in_a_comment(module: Any, code: str) -> None:
    """SymPy takes the line breaks out, which turns comments and quotes into something else."""
    hidden = f"Symbol('a\\\n', 'f' #{{{code}}}\n \\\n'c')"
    sizes(module)[0]["as_expr"]["expr_str"] = hidden


def the_hint_of_a_size(module: Any, code: str) -> None:
    """SymPy may be given it; PyTorch 2.13 makes the first one of a size a number before."""
    for meta in list(module["graph"]["tensor_values"].values())[1:]:
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["hint"] = {"as_int": code}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (an_input, "a name is 'x=open"),
        (a_size_as_input, "a name is 'x=open"),
        (an_object_as_input, "a name is 'x=open"),
        (a_constant_input, "a name is 'x=open"),
        (an_input_of_a_subgraph, "a name is 'x=open"),
        (a_subgraph, "a name is 'a.*open"),
        (an_argument_of_a_higher_order_operator, "a name is 'a=open"),
        (a_node, "a name is 'open"),
        (forward_arg_names, "a name is .*x=open"),
        (a_keyword, "a keyword argument is .*scale=open"),
        (a_weight, "a weight's name is .*open"),
        (an_attribute_of_a_class, "a weight's name is '__class__.__call__'"),
        (a_size, "a size is .open"),
        (a_size_in_a_comment, "a size is .*open"),
        (the_hint_of_a_size, "a number is .open"),
    ],
)
def test_text_of_a_program_is_not_run(
    change: Callable[[Any, str], None],
    told: str,
    tmp_path: Path,
    choosing_pt2: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    def write(files: dict[str, bytes]) -> None:
        description = json.loads(files[MODEL])
        change(description["graph_module"], 'open("ran","w")')
        files[MODEL] = json.dumps(description).encode()

    path = edited(choosing_pt2, tmp_path / "b.pt2", write)
    refused(f"is not loaded, since it could do more than compute: {told}", path)
    assert not Path("ran").exists()


@pytest.mark.parametrize("spec", ["[1]", "[" * 100_000, '[1, {"type": null}]'])
def test_a_description_of_another_form_is_told_in_one_line(
    spec: str, tmp_path: Path, choosing_pt2: Path
) -> None:
    def write(files: dict[str, bytes]) -> None:
        description = json.loads(files[MODEL])
        signature = description["graph_module"]["module_call_graph"][0]["signature"]
        assert signature["in_spec"]
        signature["in_spec"] = spec
        files[MODEL] = json.dumps(description).encode()

    path = edited(choosing_pt2, tmp_path / "b.pt2", write)
    refused("is truncated or no .pt2 file: ", path)


def test_legal_names_are_loaded(choosing_pt2: Path) -> None:
    program = load_program(choosing_pt2.read_bytes(), "a.pt2")
    module, batch = program.module(), torch.ones(3, 4)
    assert module(batch, batch, scale=batch)["the scores"].shape == (3, 4)
