"""Learning is real: gradients reach the adapters and nothing else, and only a reward can move the policy."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vesselrl.data.dataset import TrainBatch
from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.experiment.config import get_preset
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, SCOPES, attach_lora
from vesselrl.models.sa2va import DecodedMasks
from vesselrl.scoring.overlap import dice
from vesselrl.scoring.rewards import MultiObjectiveReward, Reward, SimpleDiceReward
from vesselrl.scoring.topology import topology
from vesselrl.training import ppo
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.supervised import SupervisedUpdate

SETTINGS = get_preset("debug", num_samples=3, num_regions=2)


def crossing_lines(side: int, count: int = 2) -> TrainBatch:
    """Dark crossing lines on a grey ground, and their masks."""
    images, truths = [], []
    for k in range(count):
        truth = np.zeros((side, side), bool)
        truth[side // 2 + 3 * k : side // 2 + 3 * k + 3, 2:-2] = True
        truth[2:-6, side // 3 : side // 3 + 2] = True
        noise = np.random.default_rng(k).integers(0, 30, (side, side, 3))
        images.append((170 - 90 * truth[..., None] + noise).astype(np.uint8))
        truths.append(truth)
    keys = [f"P00{k}_S1_F0001" for k in range(count)]
    return TrainBatch(keys, images, truths, [topology(truth) for truth in truths])


def make_update(tiny_checkpoint, reward: Reward | None = None, rate: float = 1e-3, **settings) -> PPOUpdate:
    torch.manual_seed(0)
    model, processor = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(model, SCOPES, LORA_PRESETS["medium"].projections, 4, 8)
    policy = MaskPolicy(peft_model, processor, "Please segment the blood vessel.")
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=rate, weight_decay=0.01)
    return PPOUpdate(policy, optimizer, reward or MultiObjectiveReward(), SETTINGS.with_(**settings))


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


# ---- On the real model classes


def test_ppo_changes_lora_weights_and_nothing_else_and_repeats_with_its_seed(tiny_checkpoint) -> None:
    update, again = make_update(tiny_checkpoint), make_update(tiny_checkpoint)
    before = snapshot(update.policy.peft_model)
    metrics = update.step(crossing_lines(64))
    names = changed(before, update.policy.peft_model)
    assert all(".lora_" in name for name in names)
    # Every component moves; the two hyper-networks of candidates that were not chosen have no gradient.
    still = {n for n in update.policy.trainable if ".lora_B." in n} - names
    assert all("output_hypernetworks_mlps" in name for name in still)
    for part in (".lm.", "text_hidden_fcs", "mask_decoder", "vision_encoder"):
        assert any(part in name for name in names), part
    assert metrics["train/grad_norm"] > 0
    assert without_times(again.step(crossing_lines(64))) == without_times(metrics)
    assert changed(snapshot(update.policy.peft_model), again.policy.peft_model) == set()


def test_supervised_changes_lora_weights_and_nothing_else(tiny_checkpoint) -> None:
    policy = make_update(tiny_checkpoint).policy
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=1e-3)
    before = snapshot(policy.peft_model)
    SupervisedUpdate(policy, optimizer, SETTINGS).step(crossing_lines(64))
    names = changed(before, policy.peft_model)
    assert names
    assert all(".lora_" in name for name in names)


def test_a_constant_reward_changes_nothing(tiny_checkpoint) -> None:
    class Constant(MultiObjectiveReward):
        def overlap_terms(self, tp, fp, fn):
            return {"dice": np.zeros(np.shape(tp)) + 1.0}

        def structure_terms(self, pred, gt, gt_topology=None):
            return {"topology": 0.5}

    update = make_update(tiny_checkpoint, Constant())
    before = snapshot(update.policy.peft_model)
    for _ in range(3):
        metrics = update.step(crossing_lines(64))
    assert changed(before, update.policy.peft_model) == set()
    assert metrics["train/zero_variance_groups"] == 1.0
    assert metrics["train/grad_norm"] == 0.0


def test_a_reward_beyond_all_numbers_is_named(tiny_checkpoint) -> None:
    class Huge(MultiObjectiveReward):
        def overlap_terms(self, tp, fp, fn):
            return {name: term * 1e37 for name, term in super().overlap_terms(tp, fp, fn).items()}

    update = make_update(tiny_checkpoint, Huge())
    before = snapshot(update.policy.peft_model)
    with pytest.raises(LearningError, match=r"the reward is the cause, with values of .*e\+3"):
        update.step(crossing_lines(64))
    assert changed(before, update.policy.peft_model) == set()


def test_logits_that_are_no_numbers_are_no_empty_masks(tiny_checkpoint, monkeypatch) -> None:
    update, logits = make_update(tiny_checkpoint), MaskPolicy.logits
    monkeypatch.setattr(MaskPolicy, "logits", lambda *given: [one * float("nan") for one in logits(*given)])
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        update.step(crossing_lines(64))


def test_first_pass_has_ratio_one_and_no_divergence(tiny_checkpoint) -> None:
    """Old log-probabilities are those of the policy that sampled; later passes have moved away."""
    small, large = crossing_lines(64, 1), crossing_lines(80, 1)  # sizes in a batch may differ
    both = TrainBatch(["a", "b"], small.images + large.images, small.truths + large.truths,
                      small.topologies + large.topologies)  # fmt: skip
    first = make_update(tiny_checkpoint, num_passes=1).step(both)
    assert first["train/first_ratio_gap"] <= 1e-4
    assert abs(first["train/kl_ref"]) <= 1e-6
    later = make_update(tiny_checkpoint, rate=0.1, num_passes=3).step(both)
    assert later["train/first_ratio_gap"] <= 1e-4
    assert later["train/ratio_gap"] > 1e-3
    assert later["train/approx_kl"] > 0


# ---- The self-checks find what they are for


def test_dropout_during_rl_is_caught(tiny_checkpoint) -> None:
    update = make_update(tiny_checkpoint)
    update.policy.peft_model.eval = lambda: update.policy.peft_model.train()  # somebody turns dropout on
    for name, module in update.policy.peft_model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.5)
    with torch.no_grad():
        for name, parameter in update.policy.trainable.items():
            if ".lora_B." in name:
                parameter.add_(0.1)
    with pytest.raises(LearningError, match="ratio before the first update"):
        update.step(crossing_lines(64))


def test_another_reference_or_equal_samples_are_caught(tiny_checkpoint, monkeypatch) -> None:
    update = make_update(tiny_checkpoint)
    monkeypatch.setattr(update.policy, "reference_logits", lambda *_: [torch.full((64, 64), 5.0)] * 2)
    with pytest.raises(LearningError, match="KL to the reference"):
        update.step(crossing_lines(64))
    monkeypatch.setattr(ppo, "sample_masks", lambda logits, count, *_: torch.stack([logits > 0] * count))
    with pytest.raises(LearningError, match="All 3 sampled masks"):
        update.step(crossing_lines(64))


def test_a_detached_forward_pass_is_caught(tiny_checkpoint, monkeypatch) -> None:
    """The prototype trained through functions under no_grad."""
    update = make_update(tiny_checkpoint)
    encode = update.policy.model.encode_image
    monkeypatch.setattr(update.policy.model, "encode_image", torch.no_grad()(encode))
    with pytest.raises(LearningError, match=r"received no gradient.*vision_encoder"):
        update.step(crossing_lines(64))
    frozen = next(p for p in update.policy.peft_model.parameters() if not p.requires_grad)
    frozen.grad = torch.zeros_like(frozen)
    with pytest.raises(LearningError, match="1 frozen weights received a gradient"):
        update.policy.check_gradients()


def test_a_learning_rate_of_zero_is_caught(tiny_checkpoint) -> None:
    with pytest.raises(LearningError, match="adapter has moved by 0"):
        make_update(tiny_checkpoint, rate=0.0).step(crossing_lines(64))


@pytest.mark.parametrize("count", [1, 2])
def test_a_language_model_that_does_not_see_the_image_stops_the_run(tiny_checkpoint, count) -> None:
    """Also where a step has a single image, as in the preset full."""
    update = make_update(tiny_checkpoint)
    batch = crossing_lines(64, count)
    blind = update.policy.model.seg_states(update.policy.prepare(batch.images))
    update.policy.model.seg_states = lambda inputs: blind[: len(inputs.sizes)]
    with pytest.raises(LearningError, match="does not see the image"):
        update.step(batch)


# ---- On a toy: a table of logits is the whole policy


class ToyPolicy(torch.nn.Module):
    """The interface of MaskPolicy around one table of logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(logits.clone())
        self.trainable = {"table": self.table}
        self.reference = logits
        self.model = SimpleNamespace(device=torch.device("cpu"))

    @property
    def peft_model(self):
        return self

    def prepare(self, images):
        return None

    def decode(self, inputs, keys):
        return DecodedMasks(self.table[None, None, None], torch.zeros(1, 1, 1))

    def logits(self, decoded, choice, inputs):
        return [decoded.logits[0, 0, 0]]

    def reference_logits(self, inputs, keys, choice):
        return [self.reference]


def toy_update(logits: torch.Tensor, reward: Reward, rate: float = 0.0, **settings) -> PPOUpdate:
    policy = ToyPolicy(logits)
    optimizer = torch.optim.Adam([policy.table], lr=rate)
    update = PPOUpdate(policy, optimizer, reward, SETTINGS.with_(**settings))
    update.checked = True  # a table has no adapters to look at
    return update


def toy_rewards(seed: int, updates: int = 50) -> list[float]:
    """Reward of the greedy mask before each update."""
    update = toy_update(torch.zeros(16, 16) - 0.5, SimpleDiceReward(), 0.1, correlation_px=1.0, seed=seed)
    batch = crossing_lines(16, 1)
    return [update.step(batch)["train/greedy_reward"] for _ in range(updates)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_rises_on_a_toy(seed: int) -> None:
    rewards = toy_rewards(seed)
    assert rewards[0] == 0.0
    assert np.mean(rewards[-5:]) > 9.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_does_not_rise_when_credit_is_shuffled(seed: int, monkeypatch) -> None:
    """The same credit given to random pixels teaches nothing: what rises above is the reward's doing."""
    rng = np.random.default_rng(seed)
    assign = ppo.assign_credit

    def shuffled(*arguments):
        credit = assign(*arguments)
        order = rng.permutation(credit.overlap.size)
        parts = {name: getattr(credit, name) for name in ("overlap", "structure")}
        return replace(credit, **{k: part.ravel()[order].reshape(part.shape) for k, part in parts.items()})

    monkeypatch.setattr(ppo, "assign_credit", shuffled)
    assert np.mean(toy_rewards(seed)[-5:]) < 5.0


def bar() -> tuple[TrainBatch, torch.Tensor]:
    """A batch of one horizontal bar without an image, and logits that are sure of it."""
    truth = np.zeros((24, 24), bool)
    truth[11:13, 2:22] = True
    batch = TrainBatch(["a"], [np.zeros((24, 24, 3), np.uint8)], [truth], [topology(truth)])
    return batch, torch.where(torch.from_numpy(truth), 9.0, -9.0)


def test_structure_credit_alone_connects_a_broken_vessel() -> None:
    """Only topology and length pay (no Dice, no recall): the gap in a bar gets closed."""
    batch, logits = bar()
    logits = torch.where(logits > 0, 2.0, -5.0)
    logits[11:13, 9:12] = -0.7
    reward = MultiObjectiveReward(
        dice_weight=0, recall_weight=0, precision_weight=0, topology_weight=1, length_weight=1
    )
    update = toy_update(logits, reward, 0.05, num_samples=6, num_regions=4)
    for _ in range(60):
        update.step(batch)
    after = update.policy.table.detach()
    assert [topology((table > 0).numpy()).num_components for table in (logits, after)] == [2, 1]


def test_masks_are_scored_as_they_will_be_used() -> None:
    """A 2 x 2 speck is gone with a filter of 9 px; a gap at 0.12 is closed at any temperature."""
    batch, logits = bar()

    def foreground(table: torch.Tensor, **settings: float) -> float:
        update = toy_update(table, MultiObjectiveReward(), **settings)
        return update.collect(batch, [table])[1]["train/foreground"]

    speck, broken = logits.clone(), logits.clone()
    speck[2:4, 2:4] = 9.0
    assert foreground(speck) == pytest.approx(44 / 40)
    assert foreground(speck, min_component_px=9) == 1.0
    broken[11:13, 10:12] = -2.0  # at temperature 0.25 sampled at 0.0003
    assert [foreground(broken, close_gaps=0.05, temperature=one) for one in (1.0, 0.25)] == [1.0, 1.0]


def test_a_rollout_keeps_the_policy_that_sampled_and_the_credit_of_the_mask_in_use() -> None:
    """Old log-probabilities are those of the logits; credit is that in the greedy mask."""
    logits = 2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    batch = crossing_lines(16, 1)
    update = toy_update(logits, SimpleDiceReward(), temperature=1.5, advantage="plain")
    (image,), _, _ = update.collect(batch, [logits.requires_grad_(True)])
    assert not image.old_logprobs.requires_grad
    logits = logits.detach()
    policy_then = torch.distributions.Bernoulli(logits=logits / 1.5)
    actions = (torch.zeros(16, 16), torch.ones(16, 16))
    wanted = torch.stack([policy_then.log_prob(action) for action in actions])
    assert torch.allclose(image.old_logprobs, wanted, atol=1e-5)
    greedy, truth = (logits > 0).numpy(), batch.truths[0]
    assert all(not np.array_equal(mask, greedy) for mask in image.masks.numpy())
    for row, column in [(0, 0), (8, 3), (5, 5), (15, 2), (9, 9)]:
        on, off = greedy.copy(), greedy.copy()
        on[row, column], off[row, column] = True, False
        worth = 10 * (dice(on, truth) - dice(off, truth))
        assert float(image.difference[row, column]) == pytest.approx(worth, abs=1e-4)
