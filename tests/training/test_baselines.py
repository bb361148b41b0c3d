"""The baselines: a U-Net that learns, a filter set on training masks alone, losses by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from monai.losses import SoftclDiceLoss
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tests.training.runs import train_debug
from vesselrl.data.dataset import TrainBatch
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.data.splits import read_split
from vesselrl.experiment.config import PRESETS, TrainConfig
from vesselrl.launch import main
from vesselrl.scoring.overlap import dice
from vesselrl.training import baselines, supervised
from vesselrl.training import train as training
from vesselrl.training.baselines import Frangi, UNet, best_frangi, load_control
from vesselrl.training.supervised import SFT_LOSSES, SupervisedUpdate, mask_cldice_loss, mask_loss


@pytest.fixture(scope="module", params=["unet", "frangi"])
def control_run(request, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a control; the best U-Net is not the untrained one."""
    settings = {"data_root": angiograms, "max_train_samples": None, "num_epochs": 3, "batch_size": 4}
    settings |= {"control": request.param, "val_freq": 100}
    return train_debug(tmp_path_factory.mktemp("controls"), **settings).folder


TRUTH = np.zeros((40, 56), bool)
TRUTH[10:14] = TRUTH[:, 20:24] = True
IMAGE = np.where(TRUTH, 90, 150) + np.random.default_rng(0).integers(-10, 10, TRUTH.shape)
IMAGE = np.repeat(IMAGE.astype(np.uint8)[..., None], 3, axis=2)  # two dark bars on noise
BARS = TrainBatch(["a", "b"], images=[IMAGE, IMAGE], truths=[TRUTH, TRUTH], topologies=[], size=2)


def unet_update(**settings: object) -> SupervisedUpdate:
    torch.manual_seed(42)
    model = UNet()
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=4e-3)
    config = PRESETS["debug"].with_(control="unet", **settings)
    return SupervisedUpdate(model, optimizer, config, np.random.default_rng(0))


def test_gradients_reach_the_unet_and_its_loss_falls() -> None:
    update = unet_update()
    model = update.model
    losses = [update.step(BARS)["train/loss"]]
    # A bias before a normalisation has a gradient of 0, so a few layers have only the one of their weights.
    reached = {name for name, weight in model.trainable.items() if weight.grad.abs().max() > 1e-7}
    assert reached >= {name for name in model.trainable if name.endswith("conv.weight")} != set()
    losses += [update.step(BARS)["train/loss"] for _ in range(25)]
    assert 0 < losses[-1] < 0.7 * losses[0]
    assert dice(model.predict(IMAGE).mask, TRUTH) > 0.9
    others = [unet_update(sft_loss=name).step(BARS)["train/loss"] for name in SFT_LOSSES]
    assert others[0] == losses[0]
    assert min(np.diff(sorted(others))) > 0.01  # the loss is the one asked for


def test_the_unet_shows_each_image_flipped_with_its_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net cannot learn images whose masks are flipped otherwise; here the pair is looked at itself."""
    update, images, truths, fovs = unet_update(), [], [], []
    update.checked = True  # nothing is learned here
    blank = torch.zeros(TRUTH.shape)
    monkeypatch.setattr(update.model, "batch_logits", lambda shown, keys: images.extend(shown) or [blank] * 2)
    nothing = torch.zeros(1, requires_grad=True)

    def loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        fovs.append(logits[0].numpy() == 0)
        truths.append(truth[0].numpy())
        return nothing

    monkeypatch.setattr(update, "loss", loss)
    for _ in range(20):
        update.step(replace(BARS, fovs=BARS.truths))
    for image, truth, fov in zip(images, truths, fovs, strict=True):
        assert ((image[..., 0] < 120) == truth).all()
        assert (fov == truth).all()
    assert len({image.tobytes() for image in images}) == 4


@pytest.mark.parametrize("size", [(37, 50), (64, 48), (9, 100)])
def test_the_unet_takes_images_of_any_size(size: tuple[int, int]) -> None:
    """Rows below the image are padding: what is cut away does not depend on where the padding ends."""
    model = UNet()
    image = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    prediction = model.predict(image)
    assert prediction.mask.shape == prediction.probabilities.shape == prediction.logits.shape == size
    # Brightness and contrast are normalised away; an image without any is no division by 0.
    assert np.isfinite(model.predict(np.zeros((*size, 3), np.uint8)).logits).all()
    if size == (64, 48):
        grey = torch.from_numpy(image[..., 1].astype(np.float32))
        with torch.no_grad():
            logits = model.net(((grey - grey.mean()) / grey.std())[None, None])[0, 0]
        assert np.allclose(prediction.logits, logits.numpy(), atol=1e-5)


def test_the_filter_is_the_best_of_its_grid(angiograms: Path) -> None:
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
    image = IMAGE.copy()
    image[..., [0, 2]] = 7  # dark vessels, in the green channel
    assert dice(Frangi((2,)).predict(image).mask, TRUTH) > 0.7


def test_training_images_alone_choose_the_filter(angiograms: Path, tmp_path: Path, monkeypatch) -> None:
    """Validation does not: it would choose the start here, for this filter finds nothing."""
    choose = Mock(return_value=((3,), 1e6))
    monkeypatch.setattr(training, "best_frangi", choose)
    done = train_debug(tmp_path, data_root=angiograms, max_train_samples=None, control="frangi")
    split = read_split(done.folder / "data_split.json", find_samples(angiograms))
    assert {sample.key for sample in choose.call_args.args[0]} == {sample.key for sample in split.train}
    assert load_control(done.folder).threshold == 1e6


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


def test_what_is_no_control_run_is_none(finished_run: Path, tmp_path: Path) -> None:
    assert load_control(finished_run) is None
    UNet().save(tmp_path)
    assert isinstance(load_control(tmp_path), UNet)
    weights = load_file(tmp_path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not as it was saved"):
        load_control(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"holds no control that can be read .* nan instead of numbers"):
        load_control(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="holds no control that can be read"):
        load_control(tmp_path)
    (tmp_path / "control.json").write_text('{"format": "vesselrl control 0"}')
    with pytest.raises(ValueError, match="is not of the format"):
        load_control(tmp_path)


def write_fundus(root: Path, are_bright: bool = False) -> Path:
    """Twelve photographs as of STARE, bright and red, with dark vessels 1 to 3 px wide; or negatives."""
    rng, t = np.random.default_rng(0), np.linspace(0, 1, 30)[:, None]
    for number in range(12):
        mask = np.zeros((96, 96), np.uint8)
        for width in (1, 2, 3, 2, 1):
            start, way = rng.uniform(0, 96, 2), rng.uniform(-96, 96, 2)
            points = start + t * way + 0.2 * np.sin(2 * np.pi * t) * way[::-1]
            cv2.polylines(mask, [np.round(points).astype(np.int32)], False, 255, width)
        glow = 110 * cv2.GaussianBlur(rng.standard_normal((96, 96)), (0, 0), 8)[..., None]
        dark = cv2.GaussianBlur(mask / 255, (0, 0), 0.7)[..., None] * (45, 75, 45)
        image = glow - dark + (215, 175, 105) + rng.normal(0, 7, (96, 96, 1))
        image = np.clip(255 - image if are_bright else image, 0, 255).astype(np.uint8)
        for folder, pixels in (("images", image), ("masks", mask), ("fov", np.full_like(mask, 255))):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


@pytest.mark.parametrize("are_bright", [False, True])
def test_the_fit_of_a_model_is_measured_beside_a_filter_for_either_polarity(
    tmp_path, monkeypatch, are_bright
) -> None:
    monkeypatch.setattr(baselines, "FIT_PX", 80)  # smaller than the images and their fields of view
    samples = find_samples(write_fundus(tmp_path, are_bright))
    data = Mock(train=samples[:4], val=samples[4:])
    masks = [load_mask(sample) for sample in samples[4:]]
    rows = [{"key": s.key, "dice": 0.1 * k, "foreground": 0.5} for k, s in enumerate(samples[4:])]
    fit = baselines.measure_fit(TrainConfig(), data, rows)
    assert (fit["images"], fit["dice"]) == (8, pytest.approx(0.35))
    assert fit["true_foreground"] == pytest.approx(np.mean(masks), abs=0.01)
    low, high = sorted((fit["frangi_dark"], fit["frangi_bright"]))
    assert (fit["frangi_bright"] == high, low < 0.3, high > 0.7) == (are_bright, True, True)
    assert fit["teaching"].startswith(baselines.INVERT) == are_bright
    for settings in ({"model_path": "random"}, {"control": "unet"}):
        assert baselines.measure_fit(TrainConfig().with_(**settings), data, rows) == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_advice_for_unknown_images_followed_as_printed_doubles_their_dice(
    tmp_path, monkeypatch, caplog
) -> None:
    """Twelve easy images, of which four are shown six times: a real set needs more."""
    monkeypatch.setattr(baselines, "TEACHING_PASSES", 24)
    root, output = write_fundus(tmp_path / "data"), tmp_path / "output"
    first = f"train --data_root {root} --output_dir {output} --max_train_samples 4 --num_epochs 1"
    assert main([*first.split(), "--num_regions", "4", "--num_workers", "1"]) == 0
    (run,) = output.glob("sa2va_*")
    (issue,) = json.loads((run / "diagnosis.json").read_text())["findings"]
    said = f"{issue['sign']} {issue['advice']}"
    assert "the model does not know such images" in said
    assert said in caplog.text
    report = (run / "report.md").read_text()
    assert said in report
    assert report.index("MINIATURE: ") < report.index("Dice on")
    options = re.search("Teach it: (.*)\\.", said)[1].split()
    assert main(["train", "--config", str(run), *options]) == 0
    taught = max(output.glob("sa2va_*"))
    info = json.loads((taught / "training_info.json").read_text())
    assert info["args"]["stage"] == "sft+rl"
    for before, after in ((info["initial_metrics"], info["best_metrics"]), info["test_metrics"].values()):
        assert before["dice"] < 0.3
        assert after["dice"] > 2 * before["dice"]


def soft_cldice_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The half of the loss that is not `mask_loss`."""
    return 2 * mask_cldice_loss(logits, truth) - mask_loss(logits, truth)


def test_soft_cldice_is_that_of_monai() -> None:
    truth = torch.stack([torch.from_numpy(TRUTH).float(), torch.zeros(TRUTH.shape)])
    truth[1, 5:26, :30] = 1
    noise = functional.avg_pool2d(torch.randn(2, 40, 56, generator=torch.manual_seed(0)), 3, 1, 1)
    logits = (4 * truth - 2 + 5 * noise).requires_grad_()
    monai = SoftclDiceLoss(iter_=10, reduction="none")(torch.sigmoid(logits)[:, None], truth[:, None])
    ours = soft_cldice_loss(logits, truth)
    assert ours.tolist() == pytest.approx(monai.tolist(), abs=1e-6)
    slope, expected = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, monai))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


def test_soft_cldice_sees_wide_vessels() -> None:
    """20 px wide, as wide as any vessel here: the erosions reach its middle, so a lost stretch is paid."""
    truth, logits = torch.zeros(1, 40, 60), torch.full((1, 40, 60), -40.0)
    truth[0, 10:30, 5:55] = 1
    logits[0, 10:30, 5:30] = 40.0
    assert 0.15 < float(soft_cldice_loss(logits, truth)) < 0.5


def test_mask_loss_by_hand() -> None:
    truth = torch.tensor([[[1.0, 0.0]]])
    soft_dice = (2 * 0.5 + 1) / (1 + 1 + 1)
    assert float(mask_loss(torch.zeros(1, 1, 2), truth)) == pytest.approx(np.log(2) + 1 - soft_dice)
    assert float(mask_loss(torch.tensor([[[50.0, -50.0]]]), truth)) == pytest.approx(0, abs=1e-6)


def test_scnp_takes_the_worst_logit_of_the_same_class_around(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, logits = torch.zeros(1, 5, 5), torch.full((1, 5, 5), -2.0)
    truth[0, :, 2], logits[0, :, 2] = 1, torch.tensor([3.0, 1, 2, -1, 4])
    logits[0, 0, 0], logits[0, 2, 4], logits[0, 4, 0] = 0.5, 1, -9
    left = [0.5, 0.5, -2, -2, -2]
    right = [-2.0, 1, 1, 1, -2]
    worst = torch.tensor([left, left, [1, 1, -1, -1, -1], right, right]).mT[None]
    expected = mask_loss(worst, truth)
    scnp = SFT_LOSSES["bce_dice_scnp"]
    slope = torch.autograd.grad(scnp(logits.requires_grad_(), truth).sum(), logits)[0][0, :, 2]
    assert torch.sign(slope).tolist() == [0, -1, 0, -1, 0]  # only the worst are moved
    assert scnp(logits, truth).tolist() == expected.tolist()
    monkeypatch.setattr(supervised, "mask_loss", lambda logits, truth: logits)
    assert torch.equal(scnp(logits, truth), worst)


def test_skeleton_recall_by_hand() -> None:
    """A line of 5 px, 3 found: 1 - (3 + 1) / (5 + 1). A square: 13 px lie up to two steps from its centre."""
    truth, logits = torch.ones(2, 5, 5), torch.full((2, 5, 5), -50.0)
    truth[0, [0, 1, 3, 4]] = 0
    logits[0, 2, :3] = logits[0, 0] = 50.0
    logits[1, 1:4] = 50.0  # 3 + 5 + 3 of them
    more = SFT_LOSSES["bce_dice_skeleton_recall"](logits, truth) - mask_loss(logits, truth)
    assert more.tolist() == pytest.approx([1 / 3, 2 / 14], abs=1e-6)


@pytest.mark.parametrize("name", SFT_LOSSES)
def test_losses_are_finite_without_vessel_or_background_and_reach_the_logits(name: str) -> None:
    for truth in (torch.zeros(1, 7, 9), torch.ones(1, 7, 9)):
        logits = torch.linspace(-3, 3, 63).view(1, 7, 9).requires_grad_()
        loss = SFT_LOSSES[name](logits, truth)
        slope = torch.autograd.grad(loss.sum(), logits)[0]
        assert torch.isfinite(torch.cat([loss, slope.flatten()])).all()
        assert slope.abs().max() > 1e-3
