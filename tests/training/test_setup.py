"""Data of a run, its caveats, and its batches in an order of its own for every pass."""

import json
import re
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from vesselrl.data.augment import get_augmentation
from vesselrl.data.dataset import BatchSource, VesselDataset
from vesselrl.data.samples import find_samples
from vesselrl.data.tiles import Tiling
from vesselrl.errors import DataError, RefusedError
from vesselrl.evaluation.evaluate import caveats_of_built_in
from vesselrl.evaluation.results import Caveat
from vesselrl.experiment.config import PRESETS, TrainConfig
from vesselrl.experiment.run_folder import RunFolder
from vesselrl.scoring.topology import topology
from vesselrl.training.setup import RunData, check_disk, make_model, prepare_data, read_ahead


def prepared(tmp_path: Path, angiograms: Path, **options: object) -> RunData:
    places = {"output_dir": str(tmp_path), "data_root": str(angiograms), "model_path": "/model"}
    return prepare_data(TrainConfig().with_(**places | options), RunFolder.create(tmp_path))


def test_a_batch_is_made_while_the_one_before_is_learned_from() -> None:
    made, asked = [threading.Event() for _ in range(3)], []

    def batches():
        for number, event in enumerate(made):
            event.set()
            yield SimpleNamespace(keys=[number])
        raise DataError("The next image is damaged.")

    ahead = read_ahead(batches(), SimpleNamespace(fetch_ahead=asked.extend))
    for number, event in enumerate(made[1:]):
        assert next(ahead).keys == [number]
        assert event.wait(60)
    assert next(ahead).keys == [2]
    with pytest.raises(DataError):
        next(ahead)
    assert asked == [0, 1, 2]


def keys_of(data: RunData) -> list[set[str]]:
    return [{sample.key for sample in subset} for subset in (data.train, data.val, data.test)]


def test_a_start_brings_its_split_or_a_caveat(finished_run: Path, angiograms: Path, tmp_path: Path) -> None:
    # Of an adapter without its run the training patients are unknown: some may be in the new test subset.
    alone = shutil.copytree(finished_run / "best_lora", tmp_path / "alone")
    data = prepared(tmp_path, angiograms, init_lora=str(alone), split_seed=7)
    assert list(data.test_caveats) == [Caveat.UNKNOWN_START]
    data = prepared(tmp_path, angiograms, init_lora=str(finished_run), split_seed=7)
    samples = json.loads((finished_run / "data_split.json").read_text())["samples"]
    assert keys_of(data) == [set(samples[name]) for name in ("train", "val", "test")]
    assert not data.test_caveats
    for option in ({"fold": "2/5"}, {"split_unit": "frame"}):
        with pytest.raises(DataError, match="goes on with that run's split"):
            prepared(tmp_path, angiograms, init_lora=str(finished_run), **option)
    assert "U-Net" in prepared(tmp_path, angiograms, control="unet").test_caveats[Caveat.CONTROL]
    assert list(prepared(tmp_path, angiograms, model_path=None).test_caveats) == [Caveat.MINIATURE]
    assert list(caveats_of_built_in(None, "/model")) == [Caveat.SYNTHETIC]


def test_look_alikes_in_two_subsets_stop_or_are_a_caveat(angiograms, tmp_path, monkeypatch) -> None:
    found = Mock(side_effect=DataError("2 pairs of images look like frames of one run."))
    monkeypatch.setattr("vesselrl.training.setup.check_near_duplicates", found)
    with pytest.raises(DataError, match="--near_duplicates allow"):
        prepared(tmp_path / "a", angiograms)
    data = prepared(tmp_path / "b", angiograms, near_duplicates="allow")
    assert list(data.test_caveats) == [Caveat.NEAR_DUPLICATES]


def test_a_run_that_goes_on_needs_room_for_the_rest_alone(tmp_path: Path, monkeypatch) -> None:
    values = Mock(**{"numel.return_value": 10**6, "element_size.return_value": 4})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=50_000_000))
    for name, is_enough in (("state.txt", False), ("resume.safetensors", True)):
        (tmp_path / name).write_bytes(bytes(60_000_000))
        with nullcontext() if is_enough else pytest.raises(RefusedError, match="50 MB free; 109 MB"):
            check_disk(TrainConfig(), Mock(trainable={"a": values}), RunFolder(tmp_path))


def test_frames_that_are_a_patient_each_are_said_aloud(angiograms: Path, tmp_path: Path, caplog) -> None:
    root = shutil.copytree(angiograms, tmp_path / "data")
    for file in sorted(root.rglob("*.png")):  # to SANA_000001
        file.rename(file.with_name(re.sub(r"ZHANG_(\w+)\(.*_(\d+)\.png", r"\g<1>_\g<2>.png", file.name)))
    data = prepared(tmp_path, root)
    assert list(data.test_caveats) == [Caveat.UNCLEAR_PATIENTS]
    assert "PATIENTS: Frames that count as a patient each: 20 of 20 patients have one image" in caplog.text


def keys(source: BatchSource, epoch: int, skip: int = 0) -> list[str]:
    return [key for batch in source.epoch(epoch, skip) for key in batch.keys]


def test_every_pass_has_an_order_of_its_own_and_can_be_entered_anywhere(angiograms: Path) -> None:
    dataset = VesselDataset(find_samples(angiograms)[:10])
    source = BatchSource(dataset, 3, 1, num_epochs=2, num_passes=lambda epoch: 3 if epoch == 1 else 1)
    first, second = keys(source, 1), keys(source, 2)
    assert source.num_steps == source.num_batches(1) + source.num_batches(2) == 12 + 4
    orders = [tuple(first[:10]), tuple(first[10:20]), tuple(first[20:]), tuple(second)]
    assert len(set(orders)) == 4
    wanted = sorted(sample.key for sample in dataset.samples)
    assert all(sorted(order) == wanted for order in orders)
    once = BatchSource(dataset, 3, seed=1, num_epochs=2)
    assert (tuple(keys(once, 1)), tuple(keys(once, 2))) == (orders[0], orders[3])
    sizes = 3 * [3, 3, 3, 1]
    assert all(keys(source, 1, skip) == first[sum(sizes[:skip]) :] for skip in range(13))


def test_augmentation_changes_image_truth_and_topology_anew_in_every_pass(angiograms: Path) -> None:
    dataset = VesselDataset(find_samples(angiograms)[:4], augmentation=get_augmentation("strong"), seed=3)
    source = BatchSource(dataset, 4, seed=3, num_passes=lambda epoch: 2)
    one, other = source.epoch(1)
    for truth, shape in zip(one.truths + other.truths, one.topologies + other.topologies, strict=True):
        assert np.array_equal(shape.skeleton, topology(truth).skeleton)
    later = dict(zip(other.keys, other.truths, strict=True))
    assert any(not np.array_equal(truth, later[key]) for key, truth in zip(one.keys, one.truths, strict=True))
    again = next(source.epoch(1))
    assert all(np.array_equal(a, b) for a, b in zip(one.images, again.images, strict=True))


def test_every_pass_shows_other_crops_the_same_after_a_resume_and_keeps_nothing(angiograms, tiny_checkpoint):
    samples, places = find_samples(angiograms)[:4], []
    dataset = VesselDataset(samples, seed=3, tiling=Tiling(40, 40))
    source = BatchSource(dataset, 1, seed=3, num_passes=lambda epoch: 3)
    batches = list(source.epoch(1))
    for batch in batches:
        (image,), (truth,), (shape,) = batch.images, batch.truths, batch.topologies
        whole, mask = dataset[[sample.key for sample in samples].index(batch.keys[0])][:2]
        windows = np.lib.stride_tricks.sliding_window_view(whole, (40, 40, 3))[:, :, 0]
        ((row, column),) = np.argwhere((windows == image).all(axis=(2, 3, 4)))
        assert np.array_equal(mask[row : row + 40, column : column + 40], truth)
        assert np.array_equal(shape.skeleton, topology(truth).skeleton)
        places.append((int(row), int(column)))
    assert len(set(places)) == len(places) == 12
    later = next(source.epoch(1, skip=7))
    assert later.keys == batches[7].keys
    assert np.array_equal(later.images[0], batches[7].images[0])
    changed = {"model_path": str(tiny_checkpoint), "sanity_overfit": 4, "augment": "strong"}
    data = RunData(samples, samples[:1], [], {}, {}, {})
    for tile_px, repeats in ((None, True), (64, True), (40, False)):  # of 64 px; the square has 128
        policy, tiling = make_model(PRESETS["debug"].with_(tile_px=tile_px, **changed), "cpu", data)
        assert policy.keys_repeat == VesselDataset(samples, tiling=tiling).repeats == repeats
        assert policy.predictor.tiling == tiling == Tiling.of_model(tile_px, 128)
