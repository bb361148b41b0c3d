"""Data of a run, its caveats, its batches in the same order for every stage, and the learning rate."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from vesselrl.data.augment import get_augmentation
from vesselrl.data.dataset import BatchSource, VesselDataset
from vesselrl.data.samples import find_samples
from vesselrl.data.splits import Split, write_split
from vesselrl.errors import DataError
from vesselrl.evaluation.results import Caveat
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder
from vesselrl.scoring.topology import topology
from vesselrl.training.setup import RunData, prepare_data, staged_warm_cosine, warm_cosine

# ---- Data


def prepared(tmp_path: Path, angiograms: Path, **options: object) -> RunData:
    config = TrainConfig().with_(output_dir=str(tmp_path), **({"data_root": str(angiograms)} | options))
    return prepare_data(config, RunFolder.create(tmp_path))


def test_folds_test_every_patient_once(angiograms: Path, tmp_path: Path) -> None:
    tested = []
    for number in range(1, 4):
        data = prepared(tmp_path / str(number), angiograms, fold=f"{number}/3")
        subsets = [{s.patient for s in subset} for subset in (data.train, data.val, data.test)]
        assert sum(map(len, subsets)) == len(set.union(*subsets))
        tested += sorted(subsets[2])
    assert len(tested) == len(set(tested)) == 10


def test_an_adapter_without_its_run_is_a_caveat(finished_run: Path, angiograms: Path, tmp_path: Path) -> None:
    """Its training patients are unknown, so some may be in the new test subset."""
    alone = shutil.copytree(finished_run / "best_lora", tmp_path / "alone")
    data = prepared(tmp_path, angiograms, init_lora=str(alone), split_seed=7)
    assert list(data.test_caveats) == [Caveat.UNKNOWN_START]
    known = prepared(tmp_path / "known", angiograms, init_lora=str(finished_run), split_seed=7)
    assert not known.test_caveats
    control = prepared(tmp_path / "control", angiograms, control="unet")
    assert "U-Net" in control.test_caveats[Caveat.CONTROL]


@pytest.mark.parametrize("option", [{"fold": "2/5"}, {"split_unit": "frame"}])
def test_a_run_cannot_go_on_with_another_split(
    finished_run: Path, angiograms: Path, tmp_path: Path, option: dict
) -> None:
    with pytest.raises(DataError, match="goes on with that run's split"):
        prepared(tmp_path, angiograms, init_lora=str(finished_run), **option)


def test_look_alikes_in_two_subsets_stop_or_are_a_caveat(
    angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(split: object, load: object) -> None:
        raise DataError("2 pairs of images look like frames of one run.")

    monkeypatch.setattr("vesselrl.training.setup.check_near_duplicates", found)
    with pytest.raises(DataError, match="--near_duplicates allow"):
        prepared(tmp_path / "a", angiograms)
    data = prepared(tmp_path / "b", angiograms, near_duplicates="allow")
    assert list(data.test_caveats) == [Caveat.NEAR_DUPLICATES]


def test_frames_that_are_a_patient_each_are_said_aloud(
    angiograms: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(angiograms, tmp_path / "data")
    for file in sorted(root.rglob("*.png")):  # to SANA_000001
        file.rename(file.with_name(re.sub(r"ZHANG_(\w+)\(.*_(\d+)\.png", r"\g<1>_\g<2>.png", file.name)))
    data = prepared(tmp_path, root)
    assert list(data.test_caveats) == [Caveat.UNCLEAR_PATIENTS]
    assert "PATIENTS: Frames that count as a patient each: 20 of 20 patients have one image" in caplog.text


def test_several_errors_are_counted(angiograms: Path, tmp_path: Path) -> None:
    data = shutil.copytree(angiograms, tmp_path / "data")
    for file in sorted((data / "images").iterdir())[:2]:
        file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"the file is damaged.*first of 2 errors; `vesselrl data check"):
        prepared(tmp_path / "run", data)


def test_a_given_split_is_used_as_it_is(angiograms: Path, tmp_path: Path) -> None:
    samples = find_samples(angiograms)
    patients = sorted({s.patient for s in samples})
    parts = (patients[:3], patients[3:5], patients[5:7])
    subsets = [tuple(s for s in samples if s.patient in part) for part in parts]
    write_split(tmp_path / "published.json", Split(*subsets, seed=1))
    data = prepared(tmp_path, angiograms, split_file=str(tmp_path / "published.json"), split_seed=9)
    assert [{s.key for s in subset} for subset in (data.train, data.val, data.test)] == [
        {s.key for s in subset} for subset in subsets
    ]


# ---- Batches


@pytest.fixture
def dataset(angiograms: Path) -> VesselDataset:
    return VesselDataset(find_samples(angiograms)[:10])


def keys(source: BatchSource, epoch: int, skip: int = 0) -> list[str]:
    return [key for batch in source.epoch(epoch, skip) for key in batch.keys]


def test_every_image_once_an_epoch_in_an_order_of_its_own(dataset: VesselDataset) -> None:
    source = BatchSource(dataset, 3, seed=1, num_epochs=2)
    first, second = keys(source, 1), keys(source, 2)
    assert sorted(first) == sorted(second) == sorted(sample.key for sample in dataset.samples)
    assert first != second
    assert first == keys(BatchSource(dataset, 3, seed=1), 1)
    assert [len(batch.keys) for batch in source.epoch(1)] == [3, 3, 3, 1]
    assert source.num_steps == 8


def test_every_pass_of_an_epoch_has_an_order_of_its_own_and_can_be_entered_anywhere(
    dataset: VesselDataset,
) -> None:
    source = BatchSource(dataset, 3, 1, num_epochs=2, num_passes=lambda epoch: 3 if epoch == 1 else 1)
    first, second = keys(source, 1), keys(source, 2)
    assert source.num_steps == 3 * 4 + 4
    assert (source.num_batches(1), source.num_batches(2)) == (12, 4)
    orders = [tuple(first[:10]), tuple(first[10:20]), tuple(first[20:]), tuple(second)]
    assert len(set(orders)) == 4
    assert {frozenset(order) for order in orders} == {frozenset(sample.key for sample in dataset.samples)}
    once = BatchSource(dataset, 3, seed=1, num_epochs=2)
    assert (tuple(keys(once, 1)), tuple(keys(once, 2))) == (orders[0], orders[3])
    sizes = [len(batch.keys) for batch in source.epoch(1)]
    assert all(keys(source, 1, skip) == first[sum(sizes[:skip]) :] for skip in range(13))


def test_easy_images_come_first_and_all_are_open_in_the_second_half(dataset: VesselDataset) -> None:
    difficulties = [index / 9 for index in range(10)]
    source = BatchSource(dataset, 2, seed=1, num_epochs=4, difficulties=difficulties)
    seen = [set(keys(source, epoch)) for epoch in (1, 2, 3, 4)]
    order = [sample.key for sample in dataset.samples]
    assert seen[0] == set(order[: len(seen[0])])  # the easiest ones, and only they
    assert 0 < len(seen[0]) < len(seen[1]) < 10
    assert len(seen[2]) == len(seen[3]) == 10
    assert source.num_steps == sum(len(list(source.epoch(epoch))) for epoch in (1, 2, 3, 4))


def test_augmentation_changes_picture_truth_and_topology_together_anew_in_every_pass(
    angiograms: Path,
) -> None:
    dataset = VesselDataset(find_samples(angiograms)[:4], augmentation=get_augmentation("strong"), seed=3)
    source = BatchSource(dataset, 4, seed=3, num_passes=lambda epoch: 2)
    one, other = source.epoch(1)
    for truth, shape in zip(one.truths + other.truths, one.topologies + other.topologies, strict=True):
        assert np.array_equal(shape.skeleton, topology(truth).skeleton)
    later = dict(zip(other.keys, other.truths, strict=True))
    assert any(not np.array_equal(truth, later[key]) for key, truth in zip(one.keys, one.truths, strict=True))
    again = next(source.epoch(1))
    assert all(np.array_equal(a, b) for a, b in zip(one.images, again.images, strict=True))


# ---- Learning rate


def test_warm_up_then_half_a_cosine_to_zero_in_each_stage() -> None:
    # 10 steps of warm-up; step 55 is half way through the other 90.
    assert [warm_cosine(step, 100, 0.1) for step in (0, 9, 10, 55)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert [warm_cosine(step, 10, 0.0) for step in (10, 11, 50)] == pytest.approx([0.0] * 3)
    assert warm_cosine(0, 1, 0.05) == 1.0
    stages = [(10, 2.0), (100, 0.1)]  # a peak of 2, then of 0.1
    rates = [staged_warm_cosine(step, stages, 0.1) for step in (0, 1, 10, 19, 20, 65, 110, 200)]
    assert rates == pytest.approx([2.0, 2.0, 0.01, 0.1, 0.1, 0.05, 0.0, 0.0])
    assert staged_warm_cosine(9, stages, 0.1) < 0.1  # the first stage has all but ended
