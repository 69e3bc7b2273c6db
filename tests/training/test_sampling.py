"""Data sets of fusion targets: what is sampled, kept and refused."""

from __future__ import annotations

from pathlib import Path

import torch

from codedinvnet.data import split_indices
from codedinvnet.evaluation import stages
from codedinvnet.models.checkpoint import load_checkpoint
from codedinvnet.models.coded import prepare
from codedinvnet.training.network import load_trained_network
from tests.training.runs import CPU, fusion_data, shared_network


def test_targets_embed_to_the_mean_latent(pixels: stages.Run) -> None:
    data = fusion_data(pixels)
    assert data.groups.shape == (40, 2)
    source = pixels.images("train")
    rows, _ = split_indices(len(source), 100, pixels.settings.seed)
    assert set(data.groups.flatten().tolist()) <= set(rows.tolist())
    assert bool((data.groups[:, 0] != data.groups[:, 1]).all())
    network = load_trained_network(pixels.settings, pixels.network_folder, CPU)[0].network
    images = prepare(source.batch(data.groups.flatten())[0], 2)
    with torch.no_grad():
        mean = network(images).unflatten(0, (-1, 2)).mean(1)
        average = images.unflatten(0, (-1, 2)).mean(1)
        found = (network(data.targets) - mean).abs().max()
        trivial = (network(average) - mean).abs().max()
    assert float(found) < 2e-3
    assert float(trivial) > 5 * float(found)  # the average image alone is not the answer


def test_resumed_sampling_keeps_a_whole_data_set_and_makes_a_damaged_one_again(
    pixels: stages.Run, tmp_path: Path
) -> None:
    run = shared_network(pixels, tmp_path)
    report = stages.sample(run, 2)
    (path,) = (run.fusion_folder(2) / "data").iterdir()
    whole, kept = {k: t.clone() for k, t in load_checkpoint(path)[0].items()}, path.stat()
    resumed = shared_network(pixels, tmp_path, resume=-1)
    assert stages.sample(resumed, 2) == report
    assert report["largest_latent_error"] > 0
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (kept.st_mtime_ns, kept.st_ino)
    content = path.read_bytes()
    path.write_bytes(content[:500])
    stages.sample(resumed, 2)
    again = load_checkpoint(path)[0]
    assert torch.equal(again["groups"], whole["groups"])
    assert torch.equal(again["targets"], whole["targets"])
