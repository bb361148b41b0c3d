"""Fields of view: found in the layouts that have them, moved with the image, and nothing outside counts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.data.test_formats import SQUARE, failure, record, write_image, write_mask, write_records
from tests.training.test_ppo import crossing_lines, toy_update
from vesselrl.data.augment import Augmentation
from vesselrl.data.check import check_data
from vesselrl.data.dataset import BatchSource, VesselDataset
from vesselrl.data.repair import repair_data
from vesselrl.data.samples import find_samples, load_fov, load_image, load_mask
from vesselrl.evaluation.evaluate import evaluate_masks, evaluate_variants, predict_each
from vesselrl.experiment.config import PRESETS
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward, SimpleDiceReward
from vesselrl.training.supervised import SFT_LOSSES, SupervisedUpdate

HALF = np.arange(16)[None, :] < np.full((12, 1), 8)  # the left half of 16×12 px


@pytest.mark.parametrize(
    ("image", "label", "fov"),
    [
        ("images/21_training.tif", "1st_manual/21_manual1.gif", "mask/21_training_mask.gif"),  # DRIVE
        ("images/01_dr.png", "manual1/01_dr.tif", "mask/01_dr_mask.tif"),  # HRF
        ("images/a.png", "masks/a.png", "fov/a.png"),
        ("a/1.png", "labels/1.png", "FOV masks/1_fov.png"),
        ("1.png", "1_gt.png", "fov/1.png"),
        ("images/run/frame_0001.png", "masks/run/frame_0001.png", "fov/run.png"),
    ],
)
def test_fields_of_view_lie_beside_images_and_labels(tmp_path: Path, image, label, fov) -> None:
    write_image(tmp_path / image)
    write_mask(tmp_path / label, np.ones((12, 16), bool) & (np.arange(16) % 3 == 0))
    write_mask(tmp_path / fov, HALF)
    (sample,) = find_samples(tmp_path)
    assert sample.mask_path == tmp_path / label
    np.testing.assert_array_equal(load_fov(sample), HALF)
    np.testing.assert_array_equal(load_mask(sample), HALF & (np.arange(16) % 3 == 0))
    repair_data(tmp_path, copy := tmp_path.with_name(f"{tmp_path.name} copy"))
    np.testing.assert_array_equal(load_fov(*find_samples(copy)), HALF)


def test_a_field_of_view_lies_also_beside_the_images_that_are_given(tmp_path: Path) -> None:
    for folder in ("images", "1st_manual", "mask"):
        write_mask(tmp_path / "training" / folder / "1.png", HALF)
    assert find_samples(tmp_path, image_dir="training/images", mask_dir="training/1st_manual")[0].fov_path


def test_a_folder_mask_alone_holds_labels_and_a_small_field_of_view_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a/images/1.png")
    write_mask(tmp_path / "a/mask/1.png")
    (sample,) = find_samples(tmp_path / "a")
    assert (sample.mask_path, load_fov(sample)) == (tmp_path / "a/mask/1.png", None)
    root = write_records(tmp_path / "b", *(record(f"train_00{k}.png", [SQUARE]) for k in range(3)))
    write_mask(root / "fov/train_000.png", HALF)
    write_mask(root / "fov/train_001.png")  # a vessel
    (fault,), (warning, *_) = (check_data(root).of(severity) for severity in ("error", "warning"))
    assert (fault.code, fault.record[:25]) == ("small_fov", "annotations.json record 1")
    assert "field of view: it shows 10% of the image" in fault.message
    assert (warning.code, warning.record[:25]) == ("no_fov", "annotations.json record 2")
    write_mask(root / "fov/train_000.png", np.ones((9, 9), bool))
    assert "the field of view has 9×9 px, its image 16×12 px" in failure(root)


def disc_data(root: Path) -> VesselDataset:
    """A bright disc on black, with a vessel across that the label follows beyond it."""
    disc = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 28
    line = np.abs(np.mgrid[:64, :64][0] - 30.5) < 3
    write_image(root / "images/1.png", np.where(disc, np.where(line, 150, 220), 0).astype(np.uint8))
    write_mask(root / "masks/1.png", line)
    write_mask(root / "fov/1.png", disc)
    plan = Augmentation(flips=True, quarter_turns=True, rotation_deg=30, scale=1.3, elastic_px=6)
    return VesselDataset(find_samples(root), augmentation=plan)


def test_the_field_of_view_moves_with_the_image(tmp_path: Path) -> None:
    source = BatchSource(disc_data(tmp_path), 1, seed=0, num_epochs=20)
    for epoch in range(1, 21):
        (batch,) = source.epoch(epoch)
        (image,), (truth,), (fov,) = batch.images, batch.truths, batch.fovs
        assert np.mean(fov == (image[..., 0] >= 100)) > 0.995
        assert truth.any()
        assert not (truth & ~fov).any()


def test_scores_are_those_of_an_image_cut_to_its_field_of_view(tmp_path: Path) -> None:
    """A rectangular field of view is a crop; the prediction is wild outside of it."""
    rng, inside = np.random.default_rng(3), np.zeros((40, 48), bool)
    inside[8:32, 4:44] = True
    image, truth = rng.integers(0, 180, (40, 48), np.uint8), rng.random((40, 48)) < 0.4
    write_image(tmp_path / "a/images/1.png", image)
    write_mask(tmp_path / "a/masks/1.png", truth)
    write_mask(tmp_path / "a/fov/1.png", inside)
    write_image(tmp_path / "b/images/1.png", image[8:32, 4:44])
    write_mask(tmp_path / "b/masks/1.png", truth[8:32, 4:44])

    def predict(image: np.ndarray) -> SimpleNamespace:
        probabilities = image[..., 0].astype(np.float32) / 255
        return SimpleNamespace(mask=probabilities > 0.5, probabilities=probabilities)

    found = []
    for samples in map(find_samples, (tmp_path / "a", tmp_path / "b")):
        predicted = predict_each(predict, samples, post=PostProcessing(min_component_px=6))
        result = evaluate_variants(samples, predicted, {}, SimpleDiceReward())[""]
        pairs = [(predict(load_image(sample)).mask, load_mask(sample)) for sample in samples]
        rows = (*result.rows, *evaluate_masks(samples, pairs, SimpleDiceReward()).rows)
        found.append([result.calibration, *(r | dict.fromkeys(("foreground", "truth_hash")) for r in rows)])
    ((prediction, _),) = predict_each(predict, find_samples(tmp_path / "a"))
    assert not (prediction.mask | (prediction.probabilities > 0))[~inside].any()
    assert str(found[0]) == str(found[1])  # nan is no number that equals itself


@pytest.mark.parametrize("learner", ["rl", *SFT_LOSSES])
def test_a_step_is_the_same_whatever_lies_outside(learner: str) -> None:
    """No gradient comes from outside, nor does any of it change the loss; inside there is one."""
    batch, fov = crossing_lines(16, 1), np.ones((16, 16), bool)
    fov[:, :4] = fov[13:] = False
    batch.truths[0][~fov] = False
    batch = replace(batch, fovs=[fov])
    found = []
    for value in (-3.0, 0.0, 8.0):
        logits = torch.linspace(-1, 1, 256).reshape(16, 16)
        logits[~torch.from_numpy(fov)] = value
        update = toy_update(logits, MultiObjectiveReward(), 0.01, num_passes=1, target_kl=1e9)
        table = update.policy.trainable["table"]
        if learner != "rl":
            model = SimpleNamespace(trainable={"table": table})
            model.batch_logits = lambda *_, table=table: [table * 1]
            config = PRESETS["debug"].with_(stage="sft", sft_loss=learner)
            update = SupervisedUpdate(model, update.optimizer, config)
            update.checked = True
        metrics = update.step(batch)
        found.append({name: value for name, value in metrics.items() if not name.startswith("time/")})
        assert table.grad[torch.from_numpy(fov)].any()
        assert not table.grad[~torch.from_numpy(fov)].any()
    assert found[0] == found[1] == found[2]
