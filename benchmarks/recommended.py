"""`python -m benchmarks recommended`: is what `protect` recommends the best on other inputs?

Ten models of different kinds are trained in seconds and protected. Every method of a protection is
then measured on inputs that neither the model nor the protection has seen. The models are others
than those by which the rule was made, and nobody chose among them or their seeds by what they gave.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pandas import DataFrame
from torch import Tensor, nn

from codedinvnet.cli import main
from codedinvnet.codes.rules import is_systematic
from codedinvnet.data import load_images
from codedinvnet.errors import UserError
from codedinvnet.evaluation import tables
from codedinvnet.files import read_json, write_json
from codedinvnet.models import OpenModel, open_model
from codedinvnet.protect.codes import decoded
from codedinvnet.protect.folder import DESCRIPTION, load_protection
from codedinvnet.protect.inputs import Inputs
from codedinvnet.protect.measure import DEAREST
from codedinvnet.protect.teacher import scores_of
from codedinvnet.provenance import describe_commit, describe_machine

K = 10
POINT = 0.01
"""The recommendation is right if no method agrees more often by more than this."""
FRESH = 2000
"""Other inputs at most."""
SEED = 2026
"""The seed of all models, of their data and of what they are trained on."""
STEPS = 300
"""Training steps of a network."""
WORDS, LENGTH = 40, 30
"""Of the sequences: their vocabulary and their length."""


@dataclass(frozen=True)
class Made:
    """A model, and inputs that it was not trained on.

    Attributes:
        path: of the model.
        inputs: (N, *shape); the first ones are for `protect`.
        split: how many those are.
    """

    path: Path
    inputs: np.ndarray
    split: int


def run(data_dir: Path, work: Path, out: Path, *, minutes: float) -> dict[str, Any]:
    """Protect and measure all models, and return a report; rows that `out` has are kept.

    Args:
        data_dir: folder of image sets.
        work: folder for what is made.
        out: the rows, as JSON.
        minutes: for each protection.

    Raises:
        UserError: if a package or an image set is missing, or `protect` failed.
    """
    rows: list[dict[str, Any]] = read_json(out)["rows"] if out.is_file() else []
    for name, make in MODELS.items():
        if any(row["model"] == name for row in rows):
            continue
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        row = {"model": name, **measured(make(folder, data_dir), folder, minutes)}
        rows.append(row)
        right = sum(row["right"] for row in rows)
        found = {"right": right, "models": len(rows), "rows": rows, "minutes": minutes}
        write_json(out, {**found, "commit": describe_commit(), "machine": describe_machine()})
        print(f"{name}: {row['recommended']}, right: {row['right']}", flush=True)
    return {"rows": rows, "table": table(rows)}


def measured(made: Made, folder: Path, minutes: float) -> dict[str, Any]:
    """Protect a model, and measure its methods on other inputs."""
    protection = folder / "protection"
    known, fresh = made.inputs[: made.split], made.inputs[made.split :][:FRESH]
    inputs = folder / "inputs.npy"
    np.save(inputs, known)
    words = ["--k", str(K), "--minutes", f"{minutes:g}"]
    if known.dtype == np.uint8:
        words += ["--scale", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        description = protected(made.path, inputs, protection, *words)
    model = open_model(made.path)
    assert model.signature.scores is not None
    other = Inputs({model.signature.inputs[0].name: fresh}, {})
    batches = np.split(np.arange(len(fresh)), range(250, len(fresh), 250))
    scores = np.concatenate([scores_of(model, other.batch(rows)) for rows in batches])
    frequent = int(np.bincount(scores.argmax(1)).argmax())
    found = {
        row["method"]: agreement(model, protection, row["method"], other, scores.argmax(1))
        for row in description["table"]
        if row["work"] <= DEAREST
    }
    guess = float((scores.argmax(1) == frequent).mean())
    best = max(found.values(), default=0.0)
    recommended = description["recommended"]
    mine = guess if recommended is None else found[recommended]
    return {
        "recommended": recommended,
        "right": bool(mine >= max(best, guess) - POINT),
        "agreement": {name: round(value, 4) for name, value in found.items()},
        "most_frequent": round(guess, 4),
        "inputs": len(fresh),
        "seconds": description["seconds"],
    }


def protected(model: Path, inputs: Path, out: Path, *options: str) -> dict[str, Any]:
    """Run `codedinvnet protect`, unless it has; return what it wrote of the protection.

    Raises:
        UserError: if it failed.
    """
    words = ["protect", str(model), "--inputs", str(inputs), "--out", str(out), *options]
    if not (out / DESCRIPTION).is_file() and main(words):
        raise UserError(f"{model}: codedinvnet protect failed")
    found: dict[str, Any] = read_json(out / DESCRIPTION)
    return found


def agreement(
    model: OpenModel, protection: Path, method: str, inputs: Inputs, wanted: np.ndarray
) -> float:
    """Return how often a method's answers to late queries are the model's own, as it is served."""
    scheme = load_protection(protection, model, method)
    k, rules = scheme.rules.k, scheme.rules
    if not is_systematic(rules):
        rows, scores, _ = decoded(scheme, inputs, np.arange(len(inputs)), seed=1)
        return float((scores.argmax(1) == wanted[rows]).mean())
    order = np.random.default_rng(1).permutation(len(inputs))
    hits = []
    for group in order[: len(order) // k * k].reshape(-1, k):
        (batch,) = inputs.batch(group).values()
        outputs = {
            number: scheme.compute(number, torch.from_numpy(batch[list(task.members)])[None]).output
            for number, task in rules.tasks(k).items()
        }
        for late in range(k):
            rest = {number: output for number, output in outputs.items() if number != late}
            answer = int(scheme.decode(rest, k)[late].argmax())
            hits.append(answer == wanted[group[late]])
    return float(np.mean(hits))


# The models


def sklearn(name: str) -> Any:
    """Import a module of scikit-learn, or of its converter to ONNX.

    Raises:
        UserError: if it is missing.
    """
    try:
        from importlib import import_module

        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing: pip install scikit-learn skl2onnx (nothing else needs them)"
        ) from error


def fitted_onnx(place: str, x: np.ndarray, y: np.ndarray, **options: Any) -> bytes:
    """Train scikit-learn's estimator, and return it as ONNX.

    Args:
        place: `module:Class`.
        x: inputs (N, features), called X there.
        y: classes (N,).
        options: of the estimator.
    """
    module, _, kind = place.partition(":")
    fitted = getattr(sklearn(module), kind)(**options).fit(x, y)
    onnx = sklearn("skl2onnx").to_onnx(fitted, x[:1], options={"zipmap": False})
    content: bytes = onnx.SerializeToString()
    return content


def _estimator(place: str, source: str, **options: Any) -> Callable[[Path, Path], Made]:
    """Return what trains scikit-learn's estimator and writes it as ONNX.

    Args:
        place: `module:Class`.
        source: "digits", or "synthetic" for 30 features of eight classes.
        options: of the estimator.
    """

    def make(folder: Path, data_dir: Path) -> Made:
        datasets = sklearn("sklearn.datasets")
        if source == "digits":
            x, y = datasets.load_digits(return_X_y=True)
            trained, split = 500, 900
        else:
            shape = {"n_samples": 9000, "n_features": 30, "n_informative": 14, "n_classes": 8}
            x, y = datasets.make_classification(**shape, random_state=SEED)
            trained, split = 2000, 5000
        order = np.random.default_rng(SEED).permutation(len(x))
        x, y = x[order].astype(np.float32), y[order]
        path = folder / "model.onnx"
        path.write_bytes(fitted_onnx(place, x[:trained], y[:trained], **options))
        return Made(path, x[trained:], split)

    return make


def _trained(network: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Train a network for a few steps."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (128,), generator=generator)
        loss = F.cross_entropy(network(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def _saved(network: nn.Module, x: Tensor, path: Path) -> Path:
    """Write a network as ONNX."""
    free = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        network, (x[:2],), path, input_names=["x"], dynamic_shapes=free, external_data=False
    )
    return path


def _network(build: Callable[[], nn.Module], dataset: str, file: str) -> Callable[..., Made]:
    """Return what trains a network on half of an image set's first 20,000 images.

    Args:
        build: makes it.
        dataset: "mnist" or "fashion".
        file: of the model.
    """

    def make(folder: Path, data_dir: Path) -> Made:
        images, labels = load_images(dataset, "train", data_dir=data_dir).batch(
            torch.arange(20_000)
        )
        x = images.float() / 255
        network = _trained(build(), x[:10_000], labels[:10_000])
        return Made(_saved(network, x, folder / file), x[10_000:].numpy(), 8000)

    return make


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(),
        nn.Linear(128, 10),
    )  # fmt: skip


def _strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, 2, 2), nn.GELU(), nn.Conv2d(24, 48, 5, 2, 2), nn.GELU(),
        nn.Conv2d(48, 96, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(96, 10),
    )  # fmt: skip


def _linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


class _Reader(nn.Module):
    """Pairs of neighbouring words, looked up in a table, and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 48)
        self.pair = nn.Linear(96, 192)
        self.classify = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        words = self.table(x)
        h = self.pair(torch.cat([words[:, :-1], words[:, 1:]], 2)).relu()
        scores: Tensor = self.classify(h.mean(1))
        return scores


def _sequences(folder: Path, data_dir: Path) -> Made:
    """Train a reader to tell which of four pairs of neighbouring words a sequence has most of."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randint(WORDS, (20_000, LENGTH), generator=generator)
    pairs = torch.arange(8).view(4, 2)
    places = torch.randint(LENGTH - 1, (len(x), 3), generator=generator)
    kinds = torch.randint(4, (len(x), 3), generator=generator)
    rows = torch.arange(len(x))
    for place, kind in zip(places.T, kinds.T, strict=True):
        x[rows, place], x[rows, place + 1] = pairs[kind].T
    first, second = (column[None, :, None] for column in pairs.T)
    met = (x[:, None, :-1] == first) & (x[:, None, 1:] == second)
    y = met.sum(2).argmax(1)
    network = _trained(_Reader(), x[:10_000], y[:10_000])
    return Made(_saved(network, x, folder / "model.onnx"), x[10_000:].numpy(), 8000)


MODELS: Mapping[str, Callable[[Path, Path], Made]] = {
    "digits, nearest neighbours": _estimator(
        "sklearn.neighbors:KNeighborsClassifier", "digits", n_neighbors=7
    ),
    "digits, extra trees": _estimator(
        "sklearn.ensemble:ExtraTreesClassifier", "digits", random_state=SEED
    ),
    "digits, logistic": _estimator(
        "sklearn.linear_model:LogisticRegression", "digits", max_iter=2000
    ),
    "synthetic, MLP": _estimator(
        "sklearn.neural_network:MLPClassifier", "synthetic", max_iter=300, random_state=SEED
    ),
    "synthetic, naive Bayes": _estimator("sklearn.naive_bayes:GaussianNB", "synthetic"),
    "synthetic, boosted stumps": _estimator(
        "sklearn.ensemble:AdaBoostClassifier", "synthetic", random_state=SEED
    ),
    "MNIST, MLP": _network(_mlp, "mnist", "model.onnx"),
    "MNIST, strided convolutions": _network(_strided, "mnist", "model.onnx"),
    "Fashion-MNIST, linear": _network(_linear, "fashion", "model.onnx"),
    "sequences, pairs": _sequences,
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows for a reader, as Markdown."""
    lines = []
    for row in rows:
        found = dict(row["agreement"])
        mine = found.pop(row["recommended"], row["most_frequent"])
        others = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items())
        lines.append(
            {
                "model": row["model"],
                "recommended": row["recommended"] or "none",
                "its agreement %": f"{100 * mine:.1f}",
                "others %": others,
                "right": "yes" if row["right"] else "no",
            }
        )
    right = sum(row["right"] for row in rows)
    told = f"{right} of {len(rows)} recommendations are right"
    return f"{tables.markdown(DataFrame(lines))}\n{told}"
