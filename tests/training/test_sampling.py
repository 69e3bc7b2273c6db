"""Data sets of fusion targets: what is sampled, kept and refused."""

from __future__ import annotations

from pathlib import Path

import torch

from codedinvnet.data import split_indices
from codedinvnet.evaluation import stages
from codedinvnet.models.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.models.coded import prepare
from codedinvnet.training.network import load_trained_network
from tests.training.runs import CPU, SHARDED, fusion_data, shards, shared_network


def test_targets_embed_to_the_mean_latent(pixels: stages.Run) -> None:
    data = fusion_data(pixels)
    assert data.groups.shape == (40, 2)
    source = pixels.images("train")
    rows, _ = split_indices(len(source), 100, pixels.settings.seed)
    assert set(data.groups.flatten().tolist()) <= set(rows.tolist())
    assert bool((data.groups[:, 0] != data.groups[:, 1]).all())
    network, _, _ = load_trained_network(pixels.settings, pixels.network_folder, CPU)
    images = prepare(source.batch(data.groups.flatten())[0], 2)
    with torch.no_grad():
        mean = network(images).unflatten(0, (-1, 2)).mean(1)
        average = images.unflatten(0, (-1, 2)).mean(1)
        found = (network(data.targets) - mean).abs().max()
        trivial = (network(average) - mean).abs().max()
    assert float(found) < 2e-3
    assert float(trivial) > 5 * float(found)  # the average image alone is not the answer


def test_resumed_sampling_keeps_whole_shards_and_mends_others(
    pixels: stages.Run, tmp_path: Path
) -> None:
    run = shared_network(pixels, tmp_path, **SHARDED)
    report = stages.sample(run, 2, shard_batches=1)
    paths = shards(run)
    assert [path.stem for path in paths] == ["train-00000", "train-00001"]
    whole = [{k: t.clone() for k, t in load_checkpoint(path)[0].items()} for path in paths]
    paths[1].write_bytes(paths[1].read_bytes()[:500])
    tensors, header = load_checkpoint(paths[0])
    save_checkpoint(paths[0], tensors, {**header, "seconds": 70.0})  # as if it had taken longer
    kept = paths[0].stat()
    resumed = shared_network(pixels, tmp_path, resume=-1, **SHARDED)
    again = stages.sample(resumed, 2, shard_batches=1)
    assert shards(run) == paths
    assert (paths[0].stat().st_mtime_ns, paths[0].stat().st_ino) == (kept.st_mtime_ns, kept.st_ino)
    for path, before in zip(paths, whole, strict=True):
        after = load_checkpoint(path)[0]
        assert torch.equal(after["groups"], before["groups"])
        assert torch.equal(after["targets"], before["targets"])
    # The report is of kept shards, too.
    assert again["largest_latent_error"] == report["largest_latent_error"] > 0
    assert 70 <= again["seconds"] < 80
    paths[1].unlink()
    third = stages.sample(resumed, 2, shard_batches=1)
    assert 70 <= third["seconds"] < 80
    assert third["largest_latent_error"] == report["largest_latent_error"]
