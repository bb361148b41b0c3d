"""The baselines: images and order of a run, a filter set on training masks alone, losses by hand."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vesselrl.data.dataset import TrainBatch
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.data.splits import read_split
from vesselrl.evaluation.compare import compare_runs, load_runs
from vesselrl.experiment.config import get_preset
from vesselrl.scoring.overlap import dice
from vesselrl.training import train as training
from vesselrl.training.baselines import Frangi, UNet, best_frangi, load_control
from vesselrl.training.supervised import SupervisedUpdate, flip, mask_cldice_loss, mask_loss

CONTROLS = ("unet", "frangi")


def short_run(data_root: Path, output: Path, **changes: object) -> Path:
    settings = {"data_root": str(data_root), "output_dir": str(output), "max_train_samples": None}
    return training.train(get_preset("debug", **(settings | changes)), ["vesselrl", "train"]).folder


@pytest.fixture(scope="module")
def control_runs(angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder per control; the best U-Net is not the untrained one."""
    output = tmp_path_factory.mktemp("controls")
    runs = {}
    for control in CONTROLS:
        name = output / control
        run = short_run(angiograms, name, control=control, num_epochs=8, batch_size=4, val_freq=100)
        runs[control] = run.rename(name / control)
    return runs


@pytest.fixture(params=CONTROLS)
def control_run(request: pytest.FixtureRequest, control_runs: dict[str, Path]) -> Path:
    return control_runs[request.param]


def info_of(run: Path) -> dict:
    return json.loads((run / "training_info.json").read_text())


def settings_of(run: Path, which: str = "best") -> dict:
    return json.loads((run / f"{which}_control" / "control.json").read_text())


# ---- The U-Net


def bars(height: int = 40, width: int = 56) -> TrainBatch:
    """Two dark bars on noise."""
    rng, truth = np.random.default_rng(0), np.zeros((height, width), bool)
    truth[10:14] = truth[:, 20:24] = True
    image = np.where(truth, 90, 150) + rng.integers(-10, 10, truth.shape)
    images = [np.repeat(image.astype(np.uint8)[..., None], 3, axis=2)] * 2
    return TrainBatch(keys=["a", "b"], images=images, truths=[truth, truth], topologies=[])


def unet_update(**settings: object) -> SupervisedUpdate:
    torch.manual_seed(42)
    model = UNet()
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=4e-3)
    return SupervisedUpdate(
        model, optimizer, get_preset("debug", control="unet", **settings), np.random.default_rng(0)
    )


def test_gradients_reach_the_unet_and_its_loss_falls() -> None:
    update = unet_update()
    model = update.model
    assert model.distance() == 0
    losses = [update.step(bars())["train/loss"]]
    # A bias before a normalisation has a gradient of 0, so a few layers have only the one of their weights.
    reached = {name for name, weight in model.trainable.items() if weight.grad.abs().max() > 1e-7}
    convolutions = {name for name in model.trainable if name.endswith("conv.weight")}
    assert convolutions
    assert convolutions <= reached
    losses += [update.step(bars())["train/loss"] for _ in range(25)]
    assert 0 < losses[-1] < 0.7 * losses[0]
    assert model.distance() > 0
    assert dice(model.predict(bars().images[0]).mask, bars().truths[0]) > 0.9
    other = unet_update(sft_loss="bce_dice_cldice").step(bars())["train/loss"]
    assert abs(losses[0] - other) > 0.01  # the loss is the one asked for


def test_the_unet_shows_each_image_flipped_with_its_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net cannot learn images whose masks are flipped otherwise; here the pair is looked at itself."""
    update, seen = unet_update(), []
    monkeypatch.setattr(update.model, "batch_logits", lambda images, keys: seen.append(images) or 1 / 0)
    for _ in range(20):
        with pytest.raises(ZeroDivisionError):
            update.step(bars())
    assert len({image.tobytes() for images in seen for image in images}) == 4
    rng = np.random.default_rng(0)
    for _ in range(20):
        image, truth = flip(bars().images[0], bars().truths[0], rng)
        assert ((image[..., 0] < 120) == truth).all()


@pytest.mark.parametrize("size", [(37, 50), (64, 48), (9, 100)])
def test_the_unet_takes_images_of_any_size(size: tuple[int, int]) -> None:
    model = UNet()
    image = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    prediction = model.predict(image)
    assert prediction.mask.shape == prediction.probabilities.shape == prediction.logits.shape == size
    assert prediction.mask.dtype == bool
    assert (prediction.mask == (prediction.probabilities > 0.5)).all()
    # Brightness and contrast are normalised away; an image without any is no division by 0.
    assert np.isfinite(model.predict(np.zeros((*size, 3), np.uint8)).logits).all()
    # Rows below the image are padding: what is cut away does not depend on where the padding ends.
    if size == (64, 48):
        grey = torch.from_numpy(image[..., 1].astype(np.float32))
        with torch.no_grad():
            logits = model.net(((grey - grey.mean()) / grey.std())[None, None])[0, 0]
        assert np.allclose(prediction.logits, logits.numpy(), atol=1e-5)


def test_order_and_passes_are_those_of_the_model(
    angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple] = []
    step = SupervisedUpdate.step

    def recorded(self: SupervisedUpdate, batch: TrainBatch) -> dict[str, float]:
        seen.append((tuple(batch.keys), [image.tobytes() for image in batch.images]))
        return step(self, batch)

    monkeypatch.setattr(SupervisedUpdate, "step", recorded)
    settings = {"num_epochs": 2, "batch_size": 6, "num_passes": 3, "augment": "light", "val_freq": 100}
    orders = []
    for changes in ({"stage": "sft"}, {"control": "unet"}):
        short_run(angiograms, tmp_path, **settings, **changes)
        orders.append(list(seen))
        seen.clear()
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2 * 3 * -(-16 // 6)
    shown = Counter(key for keys, _ in orders[0] for key in keys)
    assert len(shown) == 16
    assert set(shown.values()) == {2 * 3}  # epochs x passes, as often as PPO looks at each


# ---- The filter


def test_the_filter_is_set_on_training_masks_alone(
    control_runs: dict[str, Path], angiograms: Path, tmp_path: Path
) -> None:
    """Masks are turned upside down: as many vessel pixels as before, at other places."""
    run = control_runs["frangi"]
    split = read_split(run / "data_split.json", find_samples(angiograms))
    results = {}
    for subsets in (("val", "test"), ("train",)):
        data = shutil.copytree(angiograms, tmp_path / subsets[0])
        for stem in {sample.image_path.stem for subset in subsets for sample in getattr(split, subset)}:
            path = data / "masks" / f"{stem}.png"
            Image.fromarray(np.flipud(np.array(Image.open(path)))).save(path)
        results[subsets] = short_run(data, tmp_path / "runs" / subsets[0], control="frangi")
        again = (results[subsets] / "data_split.json").read_text()
        assert again == (run / "data_split.json").read_text()
    assert settings_of(results["val", "test"]) == settings_of(run)
    assert info_of(results["val", "test"])["test_metrics"] != info_of(run)["test_metrics"]
    assert settings_of(results["train",]) != settings_of(run)


def test_the_filter_is_the_best_of_its_grid_on_the_training_images(angiograms: Path) -> None:
    """Found again by trying thresholds one by one."""
    samples = find_samples(angiograms)[:6]
    found = Frangi(*best_frangi(samples))

    def score(model: Frangi) -> float:
        scores: dict[str, list] = {}
        for sample in samples:
            mask = model.predict(load_image(sample)).mask
            scores.setdefault(sample.patient, []).append(dice(mask, load_mask(sample)))
        return float(np.mean([np.mean(values) for values in scores.values()]))

    best = score(found)
    tried = [score(Frangi(found.sigmas, 0.05 * one / (1 - one))) for one in np.arange(0.1, 1, 0.1)]
    assert best >= max(tried) - 1e-12
    assert min(tried) < best - 0.1
    assert best >= max(score(Frangi(sigmas)) for sigmas in ((2,), (3,), (2, 3), (2, 3, 4)))
    image = bars().images[0].copy()
    image[..., [0, 2]] = 7  # dark vessels, in the green channel
    assert dice(Frangi((2,)).predict(image).mask, bars().truths[0]) > 0.7
    assert dice(Frangi((2,)).predict(255 - image).mask, bars().truths[0]) < 0.3


def test_validation_does_not_choose_between_start_and_filter(
    angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "best_frangi", lambda samples, progress: ((3,), 1e6))  # finds nothing
    run = short_run(angiograms, tmp_path, control="frangi")
    assert settings_of(run) == settings_of(run, "final")
    assert settings_of(run)["threshold"] == 1e6
    assert info_of(run)["test_metrics"]["after"]["dice"] == 0


# ---- Run folders


def test_a_control_run_is_a_run(control_run: Path, finished_run: Path) -> None:
    own = {"best_control", "final_control", "checkpoint_epoch"}
    names, expected = (
        {path.name.replace("_lora", "_control").rstrip("_0123456789") for path in run.iterdir()}
        for run in (control_run, finished_run)
    )
    assert names - own == expected - own
    assert own - {"checkpoint_epoch"} <= names
    info, model_info = info_of(control_run), info_of(finished_run)
    assert info.keys() == model_info.keys()
    assert info["test_metrics"].keys() == {"before", "after"}
    assert info["adapter_delta_norm"] > 0
    assert "CONTROL: a" in (control_run / "report.md").read_text()


def test_controls_stand_in_one_table_with_a_run_but_have_no_base(
    control_runs: dict[str, Path], finished_run: Path
) -> None:
    runs, skipped = load_runs([*control_runs.values(), finished_run])
    assert skipped == {}
    table = compare_runs(runs)
    assert {line["run"] for line in table.lines} == {*CONTROLS, finished_run.name}
    assert table.gains.keys() == {finished_run.name}
    assert table.deploy not in CONTROLS
    assert any("no test scores of a base model" in note for note in table.notes)
    against = compare_runs(runs, baseline="frangi")
    assert against.gains.keys() == {"unet", finished_run.name}


def test_loaded_controls_predict_what_the_run_scored(control_run: Path, angiograms: Path) -> None:
    model = load_control(control_run)
    rows = {row["key"]: row for row in json.loads((control_run / "test_after.json").read_text())["rows"]}
    test = read_split(control_run / "data_split.json", find_samples(angiograms)).test
    assert rows.keys() == {sample.key for sample in test}
    for sample in test:
        prediction = model.predict(load_image(sample))
        assert dice(prediction.mask, load_mask(sample)) == rows[sample.key]["dice"]
        assert ((prediction.probabilities > 0.5) == prediction.mask).all()
        assert prediction.probabilities.dtype == prediction.logits.dtype == np.float32
    assert np.mean([row["dice"] for row in rows.values()]) > 0.1


def test_what_is_no_control_run_is_none(finished_run: Path, control_runs: dict, tmp_path: Path) -> None:
    assert load_control(finished_run) is None
    broken = shutil.copytree(control_runs["unet"] / "best_control", tmp_path / "broken")
    assert isinstance(load_control(broken), UNet)
    weights = load_file(broken / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no control that can be read .* nan instead of numbers"):
        load_control(broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="holds no control that can be read"):
        load_control(broken)
    (broken / "control.json").write_text('{"format": "vesselrl control 0"}')
    with pytest.raises(ValueError, match="is not of the format"):
        load_control(broken)


# ---- Losses


def test_soft_cldice_by_hand() -> None:
    """A line of 9 px of which 6 are found: a line 1 px wide is its own skeleton.

    tprec = (6 + 1) / (6 + 1), tsens = (6 + 1) / (9 + 1), 1 - 2 * 0.7 / 1.7 = 3 / 17.
    """
    truth, logits = torch.zeros(2, 16, 20), torch.full((2, 16, 20), -40.0)
    truth[:, 8, 5:14] = 1
    logits[0, 8, 5:11] = logits[1, 8, 5:14] = 40.0
    structure = 2 * mask_cldice_loss(logits, truth) - mask_loss(logits, truth)
    assert structure[0] == pytest.approx(3 / 17, abs=1e-3)
    assert structure[1] == pytest.approx(0, abs=1e-3)


def test_soft_cldice_pulls_at_a_gap_and_needs_no_vessel() -> None:
    truth, logits = torch.zeros(1, 16, 20), torch.full((1, 16, 20), -3.0)
    truth[0, 8, 2:18] = 1
    logits[0, 8, 2:18] = 3.0
    logits[0, 8, 9:11] = -3.0
    logits.requires_grad_()
    gradients = [
        torch.autograd.grad(loss(logits, truth).sum(), logits)[0] for loss in (mask_loss, mask_cldice_loss)
    ]
    assert all((gradient[0, 8, 9:11] < 0).all() for gradient in gradients)
    # One half of the plain loss is left; the rest of the pull is clDice's.
    assert (gradients[1][0, 8, 9:11] < 0.5 * gradients[0][0, 8, 9:11]).all()
    empty = mask_cldice_loss(logits, torch.zeros_like(truth))
    assert torch.isfinite(empty).all()


def test_a_wide_vessel_has_a_centre_line() -> None:
    """20 px wide, as wide as any vessel here: the erosions reach its middle, so a lost stretch is paid."""
    truth, logits = torch.zeros(1, 40, 60), torch.full((1, 40, 60), -40.0)
    truth[0, 10:30, 5:55] = 1
    logits[0, 10:30, 5:30] = 40.0
    structure = 2 * mask_cldice_loss(logits, truth) - mask_loss(logits, truth)
    assert 0.15 < float(structure) < 0.5


def test_mask_loss_by_hand() -> None:
    truth = torch.tensor([[[1.0, 0.0]]])
    soft_dice = (2 * 0.5 + 1) / (1 + 1 + 1)
    assert float(mask_loss(torch.zeros(1, 1, 2), truth)) == pytest.approx(np.log(2) + 1 - soft_dice)
    assert float(mask_loss(torch.tensor([[[50.0, -50.0]]]), truth)) == pytest.approx(0, abs=1e-6)
