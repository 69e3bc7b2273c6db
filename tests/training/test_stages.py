from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet import stages, training
from codedinvnet.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.config import (
    DataSettings,
    EncoderSettings,
    PixelFusionSettings,
    RecoveryFusionSettings,
    parse_settings,
)
from codedinvnet.data import load_images, split_indices
from codedinvnet.errors import UserError
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.coded import CodedModel, prepare
from codedinvnet.nn.iresnet import IResNet
from codedinvnet.nn.lipschitz import constrained_layers
from codedinvnet.training.fusion_data import FusionData, draw_groups, load_fusion_data
from codedinvnet.training.loop import LATEST, train_stage
from codedinvnet.training.network import NetworkStage, load_trained_network
from codedinvnet.training.pixels import VERSION, PixelStage
from codedinvnet.training.recovery import RecoveryStage
from tests.conftest import digests, make_run, tiny_settings, write_images
from tests.data.files import write_folder

CPU = torch.device("cpu")
SHARDED = {"groups": 200}  # a second shard at one batch a shard


def pixel_run(save_dir: Path, data_dir: Path, resume: int = 0, **fusion: Any) -> stages.Run:
    raw = tiny_settings("pixels")
    raw["fusion"].update(fusion)
    return make_run(raw, save_dir, data_dir, resume)


@pytest.fixture(scope="module")
def pixels(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    """A run of the paper's objective with a trained network; its k = 2 is trained."""
    run = pixel_run(tmp_path_factory.mktemp("pixels"), data_dir)
    stages.train(run)
    stages.sample(run, 2)
    stages.fuse(run, 2)
    return run


def fusion_data(run: stages.Run) -> FusionData:
    _, header = load_checkpoint(run.network_folder / "network.safetensors")
    weights = header["network_weights"]
    return load_fusion_data(run.settings, run.fusion_folder(2), 2, weights)


def shared_network(pixels: stages.Run, save_dir: Path, **options: Any) -> stages.Run:
    """Return a run of its own folder with the trained network of `pixels`."""
    assert pixels.data_dir is not None
    run = pixel_run(save_dir, pixels.data_dir, **options)
    run.network_folder.parent.mkdir(parents=True, exist_ok=True)
    if not run.network_folder.exists():
        run.network_folder.symlink_to(pixels.network_folder)
    return run


def test_all_stages_of_the_papers_objective(pixels: stages.Run) -> None:
    report = stages.test_fusion(pixels, 2)
    written = json.loads((pixels.fusion_folder(2) / "evaluation.json").read_text())
    assert written == report
    assert (report["split"], report["k"], report["images"]) == ("test", 2, 200)
    assert 0.3 < report["normal_accuracy"] <= 1  # chance is 0.1
    bundle = load_bundle(pixels.fusion_folder(2) / "bundle")
    assert bundle.info.group_sizes == (2,)
    assert bundle.model.recovery_head is None
    assert constrained_layers(bundle.model) == []  # folded
    network, head, _ = load_trained_network(pixels.settings, pixels.network_folder, CPU)
    images = pixels.images("test").batch(torch.arange(50))[0]
    with torch.no_grad():
        expected = head(network(prepare(images, 2))).softmax(1)
    torch.testing.assert_close(bundle.classify(bundle.embed(images)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "lean"])
def test_only_a_unet_starts_as_pix2pix_does(
    kind: str, pixels: stages.Run, bundle_folder: Path
) -> None:
    fusion = pixels.settings.fusion
    assert isinstance(fusion, PixelFusionSettings)
    description = load_bundle(bundle_folder).info.model
    encoder = EncoderSettings(kind=kind, width=4)  # type: ignore[arg-type]
    model = CodedModel(description.model_copy(update={"encoder": encoder})).eval()
    data = fusion_data(pixels)
    source = pixels.images("train")
    stage = PixelStage(pixels.settings, fusion, source, model, data, 2, CPU)
    first = next(stage.discriminator.parameters()).detach()
    assert float(first.std()) == pytest.approx(0.02, rel=0.2)
    x, _ = stage.batch(0)
    if kind == "lean":  # its correction to the average image starts at nothing
        assert torch.equal(model.encoder(x).parity, x.mean(dim=1))
    else:
        first = next(model.encoder.parameters()).detach()
        assert float(first.std()) == pytest.approx(0.02, rel=0.3)  # of 64 weights


def test_inversion_of_the_trained_network(pixels: stages.Run) -> None:
    report = stages.test_inversion(pixels)
    assert report["images"] == 200
    assert report["largest_error"] < 1e-4
    assert report["not_converged"] == 0
    assert report["iterations"] > 1
    assert report["largest_singular_value"] <= report["coefficient"] + 1e-5


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


def test_reproduce_counts_the_time_of_sampling(pixels: stages.Run, tmp_path: Path) -> None:
    run = shared_network(pixels, tmp_path, resume=-1)
    report = stages.reproduce(run, 2)
    trained = load_bundle(report["bundle"]).info.provenance.seconds
    sampled = json.loads((run.fusion_folder(2) / "sample.json").read_text())
    assert report["seconds"] == pytest.approx(trained + sampled["seconds"], abs=0.06)
    (path,) = shards(run)
    tensors, header = load_checkpoint(path)
    save_checkpoint(path, tensors, {**header, "seconds": 70.0})  # as if that had taken longer
    again = stages.reproduce(run, 2)
    assert again["seconds"] == pytest.approx(trained + 70, abs=0.06)
    assert report["test_k2"] == again["test_k2"]


@pytest.mark.parametrize("damaged", ["{", "[]", "{}"])
def test_a_damaged_report_of_sampling(damaged: str, tmp_path: Path) -> None:
    assert stages.sampling_seconds(tmp_path) == 0
    (tmp_path / "sample.json").write_text(damaged)
    with pytest.raises(UserError, match=r"sample\.json"):
        stages.sampling_seconds(tmp_path)


def test_groups_use_all_rows_before_repeating() -> None:
    rows = torch.arange(100, 112)
    groups = draw_groups(rows, 10, 3, torch.Generator().manual_seed(0))
    assert groups.shape == (10, 3)
    for first in (0, 4):
        assert sorted(groups[first : first + 4].flatten().tolist()) == rows.tolist()
    assert all(len(set(group)) == 3 for group in groups.tolist())
    with pytest.raises(UserError, match="groups of 13 cannot be drawn from 12"):
        draw_groups(rows, 1, 13, torch.Generator())


def shards(run: stages.Run) -> list[Path]:
    return sorted((run.fusion_folder(2) / "data").iterdir())


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


def test_a_shard_that_states_no_error_is_made_anew(pixels: stages.Run, tmp_path: Path) -> None:
    stages.sample(shared_network(pixels, tmp_path), 2)
    run = shared_network(pixels, tmp_path, resume=-1)
    (path,) = shards(run)
    tensors, header = load_checkpoint(path)
    del header["largest_latent_error"]  # as an older release left it
    save_checkpoint(path, tensors, header)
    assert stages.sample(run, 2)["largest_latent_error"] > 0
    assert load_checkpoint(path)[1]["largest_latent_error"] > 0


def test_sampling_without_resume_makes_every_shard_anew(pixels: stages.Run, tmp_path: Path) -> None:
    run = shared_network(pixels, tmp_path, **SHARDED)
    stages.sample(run, 2, shard_batches=1)
    inodes = [path.stat().st_ino for path in shards(run)]
    stages.sample(run, 2, shard_batches=1)
    assert all(path.stat().st_ino != old for path, old in zip(shards(run), inodes, strict=True))


@pytest.mark.parametrize("resume", [0, -1])
@pytest.mark.parametrize(("before", "after"), [(1, 16), (16, 1)])
def test_another_shard_size_replaces_the_data_set(
    before: int, after: int, resume: int, pixels: stages.Run, tmp_path: Path
) -> None:
    stages.sample(shared_network(pixels, tmp_path, **SHARDED), 2, shard_batches=before)
    run = shared_network(pixels, tmp_path, resume=resume, **SHARDED)
    stages.sample(run, 2, shard_batches=after)
    data = fusion_data(run)
    assert len(data.groups) == 200
    groups = draw_groups(
        split_indices(800, 100, 3)[0], 200, 2, torch.Generator().manual_seed(3 + 2)
    )
    assert torch.equal(data.groups, groups)


def test_a_smaller_data_set_leaves_no_stale_shards(pixels: stages.Run, tmp_path: Path) -> None:
    stages.sample(shared_network(pixels, tmp_path, **SHARDED), 2, shard_batches=1)
    run = shared_network(pixels, tmp_path, groups=50)
    stages.sample(run, 2, shard_batches=1)
    assert [path.stem for path in shards(run)] == ["train-00000"]


def test_fuse_without_data(pixels: stages.Run, tmp_path: Path) -> None:
    run = shared_network(pixels, tmp_path)
    with pytest.raises(UserError, match=r"no fusion data set in .*generate it first"):
        stages.fuse(run, 2)


def test_fuse_with_half_of_the_shards(pixels: stages.Run, tmp_path: Path) -> None:
    run = shared_network(pixels, tmp_path, **SHARDED)
    stages.sample(run, 2, shard_batches=1)
    shards(run)[0].unlink()
    with pytest.raises(UserError, match="holds 72 of 200 groups: finish it"):
        stages.fuse(run, 2)
    assert not (run.fusion_folder(2) / "bundle").exists()


def test_fuse_with_data_of_other_settings(pixels: stages.Run, tmp_path: Path) -> None:
    stages.sample(shared_network(pixels, tmp_path), 2)
    run = shared_network(pixels, tmp_path, groups=41)
    with pytest.raises(UserError, match=r"generated with other settings \(groups 40 -> 41\)"):
        stages.fuse(run, 2)


def test_every_stage_refuses_what_a_later_one_could_not_do(
    pixels: stages.Run, tmp_path: Path
) -> None:
    run = shared_network(pixels, tmp_path, batch_size=30)
    before = digests(tmp_path)
    for stage in (stages.train, stages.sample, stages.fuse, stages.reproduce):
        with pytest.raises(UserError, match=r"do not make one step.* = 60"):
            stage(run, 2)
    assert digests(tmp_path) == before
    assert not run.fusion_folder(2).exists()


def test_stages_in_the_wrong_order(pixels: stages.Run, data_dir: Path, tmp_path: Path) -> None:
    run = pixel_run(tmp_path, data_dir)
    for stage in (stages.sample, stages.fuse):
        with pytest.raises(UserError, match=r"no trained network at .*train it first"):
            stage(run, 2)
    with pytest.raises(UserError, match="no trained fusion encoder at"):
        stages.test_fusion(shared_network(pixels, tmp_path), 2)
    assert not (run.fusion_folder(2)).exists()


def test_recovery_objective_has_no_data_set(recovery_run: stages.Run) -> None:
    with pytest.raises(UserError, match="has no fusion data set"):
        stages.sample(recovery_run, 4)


def test_recovery_run_leaves_its_phases(recovery_run: stages.Run) -> None:
    folder = recovery_run.fusion_folder(4)
    phases = {}
    for phase in ("recovery", "joint"):
        _, header = load_checkpoint(folder / phase / "last.safetensors")
        found = header["validation"]
        phases[phase] = (header["stage"], header["epoch"], sorted(found))
        score = found["validation_normal"] + found["validation_recovered_k4"]
        assert header["score"] == pytest.approx(score)
    figures = ["validation_normal", "validation_recovered_k2", "validation_recovered_k4"]
    assert phases == {"recovery": ("recovery", 2, figures), "joint": ("joint", 2, figures)}


def test_figures_are_of_the_weights_that_ship(
    recovery_run: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exaggerated(network: IResNet) -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)

    shutil.copytree(recovery_run.save_dir, tmp_path, dirs_exist_ok=True)
    run = replace(recovery_run, save_dir=tmp_path, resume=LATEST)
    before = stages.fuse(run, 4)
    monkeypatch.setattr(stages, "constrain_exactly", exaggerated)
    report = stages.fuse(run, 4)
    bundle = load_bundle(report.pop("bundle"))
    assert bundle.info.figures["validation"] == report
    assert report["validation_normal"] < before["validation_normal"] - 0.3
    images, labels = stages.evaluation_images(bundle, "validation", run.data_dir).batch(
        torch.arange(100)
    )
    answers = bundle.classify(bundle.embed(images)).argmax(1)
    assert float((answers == labels).float().mean()) == pytest.approx(report["validation_normal"])


def test_frozen_phase_leaves_f_and_g_and_the_joint_phase_trains_them(
    recovery_run: stages.Run,
) -> None:
    folder = recovery_run.fusion_folder(4)
    trained, _ = load_checkpoint(recovery_run.network_folder / "network.safetensors")
    frozen, _ = load_checkpoint(folder / "recovery" / "last.safetensors")
    joint, _ = load_checkpoint(folder / "joint" / "last.safetensors")
    weights = [key for key in trained if key.endswith("weight")]
    assert weights
    assert all(torch.equal(trained[key], frozen[f"model.{key}"]) for key in weights)
    assert not any(torch.equal(trained[key], joint[f"model.{key}"]) for key in weights)
    moved = [key for key in frozen if key.startswith(("model.encoder", "model.recovery_head"))]
    assert not any(torch.equal(frozen[key], joint[key]) for key in moved if key.endswith("weight"))


def test_resumed_fusion_equals_an_unbroken_one(
    recovery_run: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recovery_run.data_dir is not None
    raw = tiny_settings("recovery")
    run = make_run(raw, tmp_path, recovery_run.data_dir)
    run.folder.mkdir(parents=True)
    run.network_folder.symlink_to(recovery_run.network_folder)
    real = RecoveryStage.start_epoch
    for phase, broken in (("recovery", 1), ("joint", 0), ("joint", 1)):

        def breaks(
            self: RecoveryStage,
            epoch: int,
            generator: torch.Generator,
            phase: str = phase,
            broken: int = broken,
        ) -> None:
            if (self.name, epoch) == (phase, broken):
                raise KeyboardInterrupt
            real(self, epoch, generator)

        monkeypatch.setattr(RecoveryStage, "start_epoch", breaks)
        with pytest.raises(KeyboardInterrupt):
            stages.fuse(make_run(raw, tmp_path, recovery_run.data_dir, resume=-1), 4)
        assert not (run.fusion_folder(4) / "bundle").exists()
    monkeypatch.setattr(RecoveryStage, "start_epoch", real)
    stages.fuse(make_run(raw, tmp_path, recovery_run.data_dir, resume=-1), 4)
    expected, _ = load_checkpoint(recovery_run.fusion_folder(4) / "bundle" / "weights.safetensors")
    found, _ = load_checkpoint(run.fusion_folder(4) / "bundle" / "weights.safetensors")
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_what_was_made_before_an_option_was_there_is_used(
    pixels: stages.Run, tmp_path: Path
) -> None:
    run = shared_network(pixels, tmp_path)
    stages.sample(run, 2)
    older = tmp_path / "older"
    shutil.copytree(pixels.network_folder, older)
    for path in (older / "network.safetensors", *shards(run)):
        tensors, header = load_checkpoint(path)
        del header["settings"]["network"]["head_pooled"], header["settings"]["data"]["image_size"]
        save_checkpoint(path, tensors, header)
    load_trained_network(run.settings, older, CPU)
    kept = [path.stat().st_mtime_ns for path in shards(run)]
    stages.sample(replace(run, resume=LATEST, shared_network=older), 2)
    assert [path.stat().st_mtime_ns for path in shards(run)] == kept
    fusion_data(run)


def test_the_networks_own_training_section_counts(pixels: stages.Run, tmp_path: Path) -> None:
    run = shared_network(pixels, tmp_path)
    training = run.settings.training.model_copy(update={"epochs": 5, "weight_decay": 0.1})
    run = replace(run, settings=run.settings.model_copy(update={"training": training}))
    told = r"epochs 5 -> 3, weight_decay 0.1 -> 0.0005"
    for stage in (stages.sample, stages.fuse):
        with pytest.warns(UserWarning, match=told):
            stage(run, 2)
    info = load_bundle(run.fusion_folder(2) / "bundle").info
    assert info.provenance.settings == pixels.settings
    _, header = load_checkpoint(run.fusion_folder(2) / "last.safetensors")
    assert header["settings"]["training"] == pixels.settings.training.model_dump(mode="json")


def test_a_network_of_options_that_are_gone(pixels: stages.Run, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pixels.network_folder, tmp_path / "n")) / "network.safetensors"
    tensors, header = load_checkpoint(path)
    header["settings"]["training"]["momentum"] = 0.9
    save_checkpoint(path, tensors, header)
    with pytest.raises(UserError, match=r"n/network.safetensors: unknown key 'training.momentum'"):
        stages.sample(replace(pixels, save_dir=tmp_path, shared_network=tmp_path / "n"), 2)


def network_weights(path: Path) -> str | None:
    """Return the digest of the network that a header states, or that it depends on."""
    _, header = load_checkpoint(path)
    found: str | None = {**header["settings"], **header}.get("network_weights")
    return found


def rewritten(data_dir: Path, root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy an image folder, and change what both of its files hold."""
    shutil.copytree(data_dir, root)
    for path in (root / "mnist").glob("*.npz"):
        with np.load(path) as found:
            arrays = dict(found)
        change(arrays)
        np.savez(path, **arrays)
    return root


def in_another_order(arrays: dict[str, Any]) -> None:
    arrays["images"], arrays["labels"] = arrays["images"][::-1], arrays["labels"][::-1]


def with_another_class(arrays: dict[str, Any]) -> None:
    arrays["classes"] = np.array([*map(str, arrays["classes"]), "none of these"])


def test_no_stage_goes_on_with_images_in_another_order(pixels: stages.Run, tmp_path: Path) -> None:
    assert pixels.data_dir is not None
    other = rewritten(pixels.data_dir, tmp_path / "data", in_another_order)
    run = replace(shared_network(pixels, tmp_path), data_dir=other)
    told = "has other training images than the network was trained on, or has them in another order"
    for stage in (stages.sample, stages.fuse):
        with pytest.raises(UserError, match=told):
            stage(run, 2)
    with pytest.raises(UserError, match=told):
        stages.train(replace(run, resume=LATEST))
    bundle = load_bundle(shutil.copytree(pixels.fusion_folder(2) / "bundle", tmp_path / "bundle"))
    assert bundle.info.provenance.images == pixels.images("train").digest()
    with pytest.raises(UserError, match="than bundle 'mnist' was trained on"):
        stages.evaluation_images(bundle, "validation", other)
    stages.evaluation_images(bundle, "test", other)  # of the test split the order does not matter
    run.network_folder.unlink()
    shutil.copytree(pixels.network_folder, run.network_folder)
    path = run.network_folder / "network.safetensors"
    tensors, header = load_checkpoint(path)
    del header["settings"]["images"]  # as of an older release
    save_checkpoint(path, tensors, header)
    stages.sample(run, 2)


def test_no_stage_goes_on_with_images_of_other_classes(pixels: stages.Run, tmp_path: Path) -> None:
    assert pixels.data_dir is not None
    other = rewritten(pixels.data_dir, tmp_path / "data", with_another_class)
    run = replace(shared_network(pixels, tmp_path), data_dir=other)
    shutil.copytree(pixels.fusion_folder(2), run.fusion_folder(2))
    told = "has other classes than the (trained network|fusion encoder): label 10 is none of these"
    for stage in (stages.sample, stages.fuse, stages.test_fusion):
        with pytest.raises(UserError, match=told):
            stage(run, 2)
    with pytest.raises(UserError, match=told):
        stages.test_inversion(run)


def test_a_fusion_that_starts_over_leaves_no_bundle_to_test(
    pixels: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shared_network(pixels, tmp_path)
    shutil.copytree(pixels.fusion_folder(2), run.fusion_folder(2))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages, "train_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages.fuse(run, 2)
    with pytest.raises(UserError, match="no trained fusion encoder at"):
        stages.test_fusion(run, 2)
    assert load_bundle(run.fusion_folder(2) / "bundle-before-1").info.group_sizes == (2,)


def test_a_bundle_of_other_settings_is_not_tested(pixels: stages.Run, tmp_path: Path) -> None:
    run = shared_network(pixels, tmp_path, groups=50)
    shutil.copytree(pixels.fusion_folder(2), run.fusion_folder(2))
    with pytest.raises(UserError, match=r"other settings \(fusion.groups 40 -> 50\): train it"):
        stages.test_fusion(run, 2)
    flags = shared_network(pixels, tmp_path, batch_size=5, learning_rate=0.5)
    assert stages.test_fusion(flags, 2)["k"] == 2  # as main.py may have changed them


def test_a_bundle_says_what_trained_it_and_not_what_ran_last(
    pixels: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shared_network(pixels, tmp_path, resume=LATEST)
    shutil.copytree(pixels.fusion_folder(2), run.fusion_folder(2))
    before = load_bundle(run.fusion_folder(2) / "bundle").info.provenance
    for module in (stages, training.loop):
        for what in ("commit", "machine", "command"):
            monkeypatch.setattr(module, f"describe_{what}", lambda what=what: f"another {what}")
    stages.fuse(run, 2)
    assert load_bundle(run.fusion_folder(2) / "bundle").info.provenance == before
    stages.fuse(replace(run, resume=0), 2)
    after = load_bundle(run.fusion_folder(2) / "bundle").info.provenance
    found = (after.commit, after.machine, after.command)
    assert found == ("another commit", "another machine", "another command")


def test_a_resumed_fusion_of_the_papers_objective_equals_an_unbroken_one(
    pixels: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shared_network(pixels, tmp_path, resume=LATEST)
    shutil.copytree(pixels.fusion_folder(2) / "data", run.fusion_folder(2) / "data")
    real = PixelStage.start_epoch

    def breaks(self: PixelStage, epoch: int, generator: torch.Generator) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        real(self, epoch, generator)

    with monkeypatch.context() as patched:
        patched.setattr(PixelStage, "start_epoch", breaks)
        with pytest.raises(KeyboardInterrupt):
            stages.fuse(run, 2)
    stages.fuse(run, 2)
    expected, _ = load_checkpoint(pixels.fusion_folder(2) / "last.safetensors")
    found, _ = load_checkpoint(run.fusion_folder(2) / "last.safetensors")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_an_inverse_that_is_not_finite_is_told(
    pixels: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = IResNet.inverse
    monkeypatch.setattr(
        IResNet, "inverse", lambda *args, **options: real(*args, **options) * math.nan
    )
    with pytest.raises(UserError, match="inverse of a mean latent is not finite"):
        stages.sample(shared_network(pixels, tmp_path), 2)
    report = stages.test_inversion(pixels)
    assert (report["measured"], report["not_converged"]) == (0, 200)
    assert report["largest_error"] is None


def train_otherwise(run: stages.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a run's network anew with the same settings but, as elsewhere, other roundings."""

    def otherwise(stage: NetworkStage, folder: Path, *, seed: int, **options: Any) -> Any:
        return train_stage(stage, folder, seed=seed + 1, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training.network, "train_stage", otherwise)
        stages.train(replace(run, resume=0))


def forget_network(path: Path) -> None:
    """Leave out what older releases did not state of a checkpoint."""
    tensors, header = load_checkpoint(path)
    header.pop("network_weights", None)
    header["settings"].pop("network_weights", None)
    save_checkpoint(path, tensors, header)


def test_a_network_is_named_by_its_weights(
    pixels: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(pixels, save_dir=tmp_path, resume=LATEST)
    shutil.copytree(pixels.network_folder, run.network_folder)
    path = run.network_folder / "network.safetensors"
    before = network_weights(path)
    assert before
    monkeypatch.setattr(training.network, "constrain_exactly", lambda network: None)
    stages.train(run)  # finished long ago; only the last correction comes out otherwise
    assert network_weights(path) == before
    train_otherwise(run, monkeypatch)
    assert network_weights(path) != before


def fused(pixels: stages.Run, save_dir: Path) -> stages.Run:
    """Return a finished run of its own, which goes on."""
    run = replace(pixels, save_dir=save_dir, resume=LATEST)
    shutil.copytree(pixels.network_folder, run.network_folder)
    stages.sample(run, 2)
    stages.fuse(run, 2)
    return run


def test_a_training_of_an_older_objective_is_not_gone_on_with(
    pixels: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fused(pixels, tmp_path)
    stages.fuse(run, 2)  # finished, and kept
    monkeypatch.setattr("codedinvnet.stages.VERSION", VERSION + 1)
    with pytest.raises(UserError, match=r"last.* \(objective_version 2 -> 3\): start over"):
        stages.fuse(run, 2)


def test_nothing_goes_on_with_targets_of_another_network(
    pixels: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fused(pixels, tmp_path)
    train_otherwise(run, monkeypatch)
    with pytest.raises(UserError, match=r"train-00000.* \(network_weights .*: generate it anew"):
        stages.fuse(run, 2)
    before = load_checkpoint(shards(run)[0])[0]["targets"]
    stages.sample(run, 2)
    assert not torch.equal(load_checkpoint(shards(run)[0])[0]["targets"], before)
    with pytest.raises(UserError, match=r"last.* \(network_weights .*: start over"):
        stages.fuse(run, 2)
    # What states no network is of an older release, and taken.
    for path in (shards(run)[0], run.fusion_folder(2) / "last.safetensors"):
        forget_network(path)
    stages.fuse(run, 2)


def test_no_encoder_goes_on_with_another_network(
    recovery_run: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(recovery_run.save_dir, tmp_path, dirs_exist_ok=True)
    run = replace(recovery_run, save_dir=tmp_path, resume=LATEST)
    last = run.fusion_folder(4) / "joint" / "last.safetensors"
    assert network_weights(last) == network_weights(run.network_folder / "network.safetensors")
    train_otherwise(run, monkeypatch)
    with pytest.raises(UserError, match=r"recovery/last.* \(network_weights .*: start over"):
        stages.fuse(run, 4)
    for phase in ("recovery", "joint"):
        forget_network(run.fusion_folder(4) / phase / "last.safetensors")
    stages.fuse(run, 4)


def test_a_network_of_other_settings_is_refused(recovery_run: stages.Run) -> None:
    # Another seed splits the images otherwise: validation images would have been trained on.
    assert recovery_run.data_dir is not None
    before = digests(recovery_run.save_dir)
    raw = tiny_settings("recovery")
    raw["seed"] = 4
    run = make_run(raw, recovery_run.save_dir, recovery_run.data_dir)
    with pytest.raises(UserError, match="seed 3 -> 4"):
        stages.fuse(run, 4)
    assert digests(recovery_run.save_dir) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_irevnet_run(
    precision: str, data_dir: Path, tmp_path: Path, bfloat16_instructions: None
) -> None:
    raw = tiny_settings("recovery", "irevnet")
    raw["training"]["precision"] = precision
    run = make_run(raw, tmp_path, data_dir)
    stages.train(run)
    stages.fuse(run, 4)
    report = stages.test_fusion(run, 4)
    assert report["normal_accuracy"] > 0.3  # chance is 0.1
    inversion = stages.test_inversion(run)
    assert inversion["largest_error"] < 1e-4
    assert "largest_singular_value" not in inversion


def test_density_estimation_learns(data_dir: Path, tmp_path: Path) -> None:
    raw = tiny_settings()
    raw["training"].update(objective="density", epochs=3, batch_size=100)
    run = make_run(raw, tmp_path, data_dir)
    header = stages.train(run)
    first = load_bits(run, raw, data_dir)
    after = header["validation"]["validation_bits_per_dimension"]
    assert math.isfinite(after)
    assert after < first - 0.1
    for refuses in (stages.fuse, stages.reproduce):  # reproduce before it trains
        with pytest.raises(UserError, match="'density' trains no head"):
            refuses(run, 2)


def load_bits(run: stages.Run, raw: dict[str, Any], data_dir: Path) -> float:
    """Return the bits per dimension of the untrained, initialised network."""

    stage = NetworkStage(
        parse_settings(raw, "here"), load_images("mnist", "train", data_dir=data_dir), CPU
    )
    stage.initialise()
    torch.manual_seed(0)
    score, scalars = stage.validate()
    assert scalars["validation_bits_per_dimension"] == -score
    return -score


def test_density_is_validated_in_the_middle_of_each_grey_level(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny_settings()
    raw["training"].update(objective="density")
    run = make_run(raw, tmp_path, data_dir)
    stage = NetworkStage(run.settings, run.images("train"), CPU)
    seen: list[torch.Tensor] = []

    def bits(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.new_zeros(len(x))

    monkeypatch.setattr(stage, "bits_per_dimension", bits)
    stage.validate()
    levels = torch.cat(seen) * 256 - 0.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert (round(float(levels.min())), round(float(levels.max()))) == (0, 255)


def test_more_in_a_batch_than_training_images(data_dir: Path, tmp_path: Path) -> None:
    raw = tiny_settings()
    raw["training"]["batch_size"] = 701
    with pytest.raises(UserError, match="batch_size 701 is more than the 700 training images"):
        stages.train(make_run(raw, tmp_path, data_dir))


def test_no_such_device() -> None:
    with pytest.raises(UserError, match="cannot use the device 'abacus'"):
        stages.choose_device("abacus")
    assert stages.choose_device("cpu") == CPU


@pytest.mark.parametrize("encoder", ["lean", "mosaic"])
def test_training_on_the_shipped_images_beats_chance_by_far(encoder: str, tmp_path: Path) -> None:
    """800 images to train on, 100 to choose the epoch, 100 held out (of 10 classes)."""
    data = write_images(tmp_path / "data", train=900, test=100)
    raw = tiny_settings("recovery")
    raw["network"].update(blocks=[1, 1, 1], strides=[1, 2, 2], hidden=[16, 32, 32])
    raw["training"].update(epochs=10)
    raw["fusion"].update(
        batch_size=32,
        steps_per_epoch=30,
        epochs=2,
        joint_batch_size=16,
        joint_epochs=2,
        head_hidden=64,
        encoder={"kind": encoder, "width": 8, "side_features": 8},
    )
    if encoder == "mosaic":  # whose finest cells are one place of the latent
        raw["fusion"].update(latent_weight=0.0, normal_share=0.5)
        raw["network"].update(blocks=[1, 1], strides=[1, 2], hidden=[16, 32])
    run = make_run(raw, tmp_path / "runs", data)
    stages.train(run)
    stages.fuse(run, 4)
    bundle = load_bundle(run.fusion_folder(4) / "bundle")
    for k in (2, 4):
        report = evaluation_report(bundle, run.images("test"), split="test", k=k)
        shuffled = evaluation_report(
            bundle, run.images("test"), split="test", k=k, shuffle_parity=True
        )
        assert report["images"] == 100
        assert report["normal_accuracy"] > 0.7
        assert report["recovered_accuracy"] > 0.65
        assert report["worst_position_accuracy"] > 0.55
        assert report["agreement"] > 0.6
        assert shuffled["normal_accuracy"] == report["normal_accuracy"]
        assert shuffled["recovered_accuracy"] < 0.3


def test_a_network_without_a_bound_has_no_inverse_but_recovers(
    data_dir: Path, tmp_path: Path
) -> None:
    raw = tiny_settings()
    raw["network"]["coefficient"] = None
    raw["training"]["learning_rate"] = 0.01
    run = make_run(raw, tmp_path, data_dir)
    stages.train(run)
    network, _, _ = load_trained_network(run.settings, run.network_folder, CPU)
    assert constrained_layers(network) == []
    assert isinstance(network, IResNet)
    assert network.largest_singular_value() > 1.0  # nothing held it
    stages.fuse(run, 4)
    assert stages.test_fusion(run, 4)["normal_accuracy"] > 0.3  # chance is 0.1


def test_the_encoder_alone_learns_from_latents(data_dir: Path, tmp_path: Path) -> None:
    raw = tiny_settings()
    raw["fusion"] |= {
        "decoded_weight": 0.0,
        "latent_weight": 1.0,
        "joint_epochs": 0,
        "epochs": 4,
        "steps_per_epoch": 30,
        "learning_rate": 0.005,
        "head_hidden": 0,
        "encoder": {"kind": "lean", "width": 4},
    }
    run = make_run(raw, tmp_path, data_dir)
    stages.train(run)
    stages.fuse(run, 4)
    bundle = load_bundle(run.fusion_folder(4) / "bundle")
    assert bundle.model.recovery_head is None
    images = run.images("test").batch(torch.arange(200))[0].unflatten(0, (50, 4))
    mean = bundle.embed(images.flatten(0, 1)).unflatten(0, (50, 4)).mean(1)
    trained = (bundle.encode(images).latent - mean).square().mean()
    average = (bundle.with_pixel_mean().encode(images).latent - mean).square().mean()
    assert float(trained) < float(average)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixup", ["none", "manifold"])
def test_the_network_trains_in_the_precision_that_was_asked_for(
    precision: str, mixup: str, data_dir: Path, tmp_path: Path, bfloat16_instructions: None
) -> None:
    raw = tiny_settings("recovery", "irevnet")
    raw["training"] |= {"precision": precision, "mixup": mixup}
    run = make_run(raw, tmp_path, data_dir)
    stage = NetworkStage(run.settings, run.images("train"), CPU)
    convolutions = [m for m in stage.network.modules() if isinstance(m, torch.nn.Conv2d)]
    seen: list[torch.dtype] = []
    convolutions[-1].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    seen.clear()  # of the initialisation
    stage.step(0, 0)
    assert seen == [getattr(torch, precision)]
    assert stage.head.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("joint", [False, True])
def test_reduced_precision_is_of_passes_that_train(
    joint: bool,
    recovery_run: stages.Run,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16_instructions: None,
) -> None:
    bundle = load_bundle(recovery_run.fusion_folder(4) / "bundle")
    settings = recovery_run.settings.model_copy(
        update={
            "training": recovery_run.settings.training.model_copy(update={"precision": "bfloat16"})
        }
    )
    assert isinstance(settings.fusion, RecoveryFusionSettings)
    stage = RecoveryStage(
        settings, settings.fusion, recovery_run.images("train"), bundle.model, CPU, joint=joint
    )
    asked = []
    forward = bundle.model.network.forward

    def recorded(x: torch.Tensor) -> torch.Tensor:
        asked.append(torch.is_autocast_enabled("cpu") and torch.is_grad_enabled())
        return forward(x)

    monkeypatch.setattr(bundle.model.network, "forward", recorded)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    before = len(asked)
    stage.step(0, 0)
    assert any(asked[before:]) == joint
    assert all(p.dtype == torch.float32 for p in bundle.model.parameters())


def test_a_step_sees_as_many_images_whatever_the_groups_size(recovery_run: stages.Run) -> None:
    stage = recovery_stage(recovery_run)
    seen = []
    real = stage.source.batch

    def batch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(rows))
        return real(rows)

    stage.source = SimpleNamespace(batch=batch, name="counted")
    stage.latents = torch.zeros(700, *stage.model.latent_shape)
    for index in range(12):
        stage.step(0, index)
    assert set(seen) <= {32, 30}  # 8 groups of 4, 10 of 3, 16 of 2
    assert len(set(seen)) == 2


@pytest.mark.parametrize(("epoch", "training"), [(0, True), (3, True), (4, False)])
def test_batch_statistics_settle_before_joint_training_ends(
    recovery_run: stages.Run, epoch: int, training: bool
) -> None:
    stage = recovery_stage(recovery_run, joint=True, joint_epochs=5)
    stage.model.train()
    stage.start_epoch(epoch, torch.Generator())
    assert stage.model.network.training is stage.model.encoder.training is training


def recovery_stage(run: stages.Run, joint: bool = False, **fusion: int) -> RecoveryStage:
    settings = run.settings
    assert isinstance(settings.fusion, RecoveryFusionSettings)
    model = load_bundle(run.fusion_folder(4) / "bundle").model
    model.train()
    chosen = settings.fusion.model_copy(update=fusion)
    return RecoveryStage(settings, chosen, run.images("train"), model, CPU, joint=joint)


def test_images_in_folders_are_read_at_the_size_of_the_settings(tmp_path: Path) -> None:
    write_folder(tmp_path / "own" / "train")
    source = stages.images_of(DataSettings(name="own", image_size=16), "train", tmp_path, False)
    assert source.shape == (3, 16, 16)
