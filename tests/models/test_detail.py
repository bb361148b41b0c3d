"""The detail head: its own small net, from file to file, and in training, reference and merged copy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet
from safetensors.torch import load_file, save_file

from tests.training.runs import metrics_of, train_debug
from vesselrl.data.dataset import TrainBatch
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.errors import CheckpointError
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import SUMS_FILE
from vesselrl.inference.merge import merge
from vesselrl.inference.predictor import Predictor
from vesselrl.models import sa2va
from vesselrl.models.checkpoint import DETAIL_HEAD, PRETRAINED_HEAD, load_detail_head, load_sa2va
from vesselrl.models.lora import LORA_PRESETS, attach_lora, load_adapter
from vesselrl.models.sa2va import FEATURES, DetailHead, GreyUNet, upsample
from vesselrl.scoring.overlap import dice
from vesselrl.scoring.topology import topology
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.supervised import SupervisedUpdate


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8))


@pytest.fixture
def policy(tiny_checkpoint: Path) -> MaskPolicy:
    model, processor = load_sa2va(tiny_checkpoint)
    size = LORA_PRESETS["medium"]._replace(rank=4, alpha=8)
    peft_model = attach_lora(model, ("projector", "mask_decoder"), size)
    model.detail = load_detail_head().requires_grad_(True)
    return MaskPolicy(peft_model, processor, "Segment.")


@torch.no_grad()
def test_the_head_is_monais_unet_on_standardised_grey_and_scaled_logits(pixels: torch.Tensor) -> None:
    """By hand: replicated to a multiple of 16 below and to the right, logits of at most 10 over 4."""
    head, logits = load_detail_head(), torch.linspace(-40, 40, 48 * 40).view(48, 40)
    net = BasicUNet(2, in_channels=2, out_channels=1, features=FEATURES)
    net.load_state_dict(head.unet.state_dict())
    grey, coarse = (pixels.numpy() - pixels.numpy().mean()) / pixels.numpy().std(), logits.numpy()
    given = np.pad(np.stack([grey, coarse.clip(-10, 10) / 4]), ((0, 0), (0, 0), (0, 8)), mode="edge")
    expected = net(torch.from_numpy(given.astype(np.float32))[None])[0, 0, :, :40]
    torch.testing.assert_close(head(pixels, logits), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (20, 33), (64, 64), (65, 130)])
def test_brightness_and_contrast_do_not_matter_at_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net, image = GreyUNet().eval(), torch.rand(size) * 100
    result = net(image)
    assert result.shape == size
    assert bool(torch.isfinite(result).all())
    if min(size) > 1:
        torch.testing.assert_close(net(2 * image + 30), result, atol=1e-3, rtol=0)


def test_both_gradients_arrive_and_the_reference_keeps_its_own_head(policy: MaskPolicy) -> None:
    images = list(np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8))
    assert policy.counts["detail_head"] == sum(p.numel() for p in DetailHead().parameters())
    logits = policy.batch_logits(images, ["a", "b"])
    inputs = policy.prepare(images)
    decoded = policy.decode(inputs, ["a", "b"])
    without, head = policy.model, policy.model.detail
    without.detail = None
    coarse = policy.logits(decoded, decoded.best(), inputs)
    without.detail = head
    for one, low, image in zip(logits, coarse, images, strict=True):
        torch.testing.assert_close(one, head(torch.from_numpy(image[..., 1]), low))
    sum(one.square().mean() for one in logits).backward()
    policy.check_gradients()
    reached = {name for name, p in policy.trainable.items() if p.grad is not None and bool(p.grad.any())}
    assert {name.split(".")[2] for name in reached} == {"detail", "text_hidden_fcs", "sam"}
    next(iter(head.parameters())).grad = None
    with pytest.raises(Exception, match=r"1 of \d+ adapter matrices received no gradient, such as .*detail"):
        policy.check_gradients()
    with torch.no_grad():
        start = [one.detach().clone() for one in logits]
        for parameter in head.parameters():
            parameter.add_(0.1)
        reference = policy.reference_logits(inputs, ["a", "b"], decoded.best())
        now = policy.logits(policy.decode(inputs, ["a", "b"]), decoded.best(), inputs)
    for first, ref, moved in zip(start, reference, now, strict=True):
        assert torch.equal(first, ref)
        assert not torch.allclose(first, moved, atol=0.1)


def test_deep_supervision_scores_both_masks_and_hides_those_of_the_decoder_from_every_other_image(
    policy: MaskPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps by hand: BCE and soft Dice of head and decoder, whose logits the head sees of one image."""
    monkeypatch.setattr(sa2va, "upsample", lambda *given: [one - 9 for one in upsample(*given)])
    rng, keys = np.random.default_rng(0), ["a", "b"]
    images = list(rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8))
    truths = [rng.random((64, 64)) < 0.2 for _ in keys]
    config = TrainConfig().with_(stage="sft", detail_head="pretrained", deep_supervision=0.25)
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=1e-3)
    update, head = SupervisedUpdate(policy, optimizer, config), policy.head
    for shown in (1, 0):
        with torch.no_grad():
            policy.model.detail = None
            coarse = policy.batch_logits(images, keys)
            policy.model.detail = head
            grey = [torch.from_numpy(image[..., 1]) for image in images]
            fine = [head(grey[k], coarse[k] * (k == shown)) for k in (0, 1)]
        pairs = [(fine[k], truths[k], 0.5) for k in (0, 1)] + [(coarse[k], truths[k], 0.125) for k in (0, 1)]
        expected = 0.0
        for logits, truth, weight in pairs:
            p, t = torch.sigmoid(logits).double().numpy(), truth.astype(float)
            cross = -np.mean(t * np.log(p) + (1 - t) * np.log1p(-p))
            expected += weight * (cross + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
        batch = TrainBatch(keys, images, truths, [topology(truth) for truth in truths], size=2)
        assert update.step(batch)["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert update.state_dict()["num_steps"] == 2


def test_a_matrix_that_has_learned_may_fall_silent_and_one_that_has_not_may_not(policy, caplog) -> None:
    """As where the head does all and the decoder's hyper-networks have died, before the first step of PPO."""
    for parameter in policy.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    parts = ("output_hypernetworks_mlps.", "final_attn_token_to_image.")
    silent = [n for n in policy.trainable if ".lora_B." in n and any(part in n for part in parts)]
    for name in silent:
        policy.trainable[name].grad.zero_()
        policy.trainable[name].data.fill_(0.1)
    policy.check_gradients()
    assert "4 adapter matrices get no gradient any more" in caplog.text
    policy.trainable[silent[0]].data.zero_()
    with pytest.raises(Exception, match=r"1 of \d+ adapter matrices received no gradient"):
        policy.check_gradients()


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short supervised training with a detail head, whose weights it has changed."""
    settings = {"model_path": tiny_checkpoint, "data_root": angiograms, "stage": "sft"}
    settings |= {"detail_head": "pretrained"}
    output = tmp_path_factory.mktemp("detail")
    return train_debug(output, **settings, learning_rate=0.02, max_train_samples=None, val_freq=100).folder


def test_at_the_end_it_is_told_what_the_head_can_do_alone(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the head from its file, given 0 in place of Sa2VA's logits, which are lowered here to matter."""
    monkeypatch.setattr(sa2va, "upsample", lambda *given: [one - 9 for one in upsample(*given)])
    settings = {"model_path": tiny_checkpoint, "data_root": angiograms, "stage": "sft"}
    run = train_debug(tmp_path, **settings, detail_head="pretrained").folder
    info = json.loads((run / "training_info.json").read_text(encoding="utf-8"))
    keys = [row["key"] for row in json.loads((run / "val_latest.json").read_text(encoding="utf-8"))["rows"]]
    head, scores = load_detail_head(run / "final_lora" / DETAIL_HEAD), {}
    for sample in (one for one in find_samples(angiograms) if one.key in keys):
        grey = torch.from_numpy(load_image(sample)[..., 1])
        mask = head(grey, torch.zeros(grey.shape)) > 0
        scores.setdefault(sample.patient, []).append(dice(mask.numpy(), load_mask(sample)))
    expected = np.mean([np.mean(one) for one in scores.values()])
    assert info["fit"]["head_alone"] == pytest.approx(expected, abs=1e-6)
    assert info["final_metrics"]["dice"] != pytest.approx(expected, abs=1e-6)


def test_a_merged_copy_keeps_the_head_beside_it(run: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Masks and logits of copy and head are those of base, adapter and head; without it they differ."""
    adapter, merged = run / "final_lora", tmp_path / "merged"
    trained, first = (load_file(file) for file in (adapter / DETAIL_HEAD, PRETRAINED_HEAD))
    assert trained.keys() == first.keys()
    assert any(not torch.equal(trained[name], first[name]) for name in trained)
    assert 0 <= merge(tiny_checkpoint, adapter, merged)["dice_without_head"] < 1
    assert {file.name for file in merged.glob("*.safetensors")} == {"model.safetensors", DETAIL_HEAD}
    image = np.random.default_rng(1).integers(0, 255, (80, 70, 3), dtype=np.uint8)
    both = Predictor.from_pretrained(tiny_checkpoint, adapter, device="cpu")
    assert all(torch.equal(value, trained[name]) for name, value in both.model.detail.state_dict().items())
    pair = both.predict(image)
    copy = Predictor.from_pretrained(merged, device="cpu").predict(image)
    np.testing.assert_allclose(copy.logits, pair.logits, atol=1e-3)
    (merged / DETAIL_HEAD).unlink()
    whole = Predictor.from_pretrained(merged, device="cpu").predict(image)
    assert np.abs(whole.logits - pair.logits).max() > 0.1


@pytest.mark.parametrize("fault", ["cut", "nan", "other"])
def test_a_damaged_head_is_named(run: Path, tiny_checkpoint: Path, tmp_path: Path, fault: str) -> None:
    folder = Path(shutil.copytree(run / "best_lora", tmp_path / "adapter"))
    (folder / SUMS_FILE).unlink()
    tensors = load_file(folder / DETAIL_HEAD)
    name = sorted(tensors)[0]
    if fault == "cut":
        (folder / DETAIL_HEAD).write_bytes((folder / DETAIL_HEAD).read_bytes()[:1000])
    elif fault == "nan":
        save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, folder / DETAIL_HEAD)
    else:
        save_file({name: tensors[name]}, folder / DETAIL_HEAD)
    with pytest.raises(CheckpointError, match="detail_head"):
        load_adapter(load_sa2va(tiny_checkpoint)[0], folder)


def test_a_run_is_compared_with_the_base_model_without_a_head(run, tiny_checkpoint, angiograms) -> None:
    """`before` is the base model's own mask; step 0 of the curves has the untrained head."""
    alone = Predictor.from_pretrained(tiny_checkpoint, device="cpu")
    samples = {sample.key: sample for sample in find_samples(angiograms)}
    for name in ("val_before", "test_before"):
        for row in json.loads((run / f"{name}.json").read_text())["rows"]:
            sample = samples[row["key"]]
            expected = dice(alone.predict(load_image(sample)).mask, load_mask(sample))
            assert row["dice"] == pytest.approx(expected, abs=1e-6), name
    (first, *_) = [one for one in metrics_of(run) if "val/dice" in one]
    before = json.loads((run / "training_info.json").read_text())["initial_metrics"]["dice"]
    assert first["step"] == 0
    assert abs(first["val/dice"] - before) > 0.01
