"""Learning is real: gradients reach the adapters and nothing else, and only a reward can move the policy."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vesselrl.training.checks import check_gradients

from vesselrl.errors import LearningError
from vesselrl.experiment.config import get_preset
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, SCOPES, attach_lora
from vesselrl.models.sa2va import DecodedMasks
from vesselrl.scoring.overlap import dice
from vesselrl.scoring.rewards import MultiObjectiveReward, SimpleDiceReward
from vesselrl.scoring.topology import topology
from vesselrl.training import ppo as ppo_module
from vesselrl.training.batches import TrainBatch
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.ppo import PPOUpdate, check_first_ratio, check_samples_differ, check_seg_embedding
from vesselrl.training.supervised import SupervisedUpdate, mask_loss

SETTINGS = get_preset("debug", num_samples=3, num_regions=2)


def drawn_batch(side: int, count: int = 2) -> TrainBatch:
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


def make_update(tiny_checkpoint, scope=SCOPES, reward=None, settings=SETTINGS, rate=1e-3) -> PPOUpdate:
    torch.manual_seed(0)
    model, processor = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(model, scope, LORA_PRESETS["medium"].projections, 4, 8)
    policy = MaskPolicy(peft_model, processor, "Please segment the blood vessel.")
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=rate, weight_decay=0.01)
    return PPOUpdate(policy, optimizer, reward or MultiObjectiveReward(), settings)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


# ---- On the real model classes


def test_ppo_changes_lora_weights_and_nothing_else(tiny_checkpoint) -> None:
    update = make_update(tiny_checkpoint)
    before = snapshot(update.policy.peft_model)
    figures = update.step(drawn_batch(64))
    names = changed(before, update.policy.peft_model)
    assert all(".lora_" in name for name in names)
    # Every component moves; the two hyper-networks of candidates that were not chosen have no gradient.
    still = {n for n in update.policy.trainable if ".lora_B." in n} - names
    assert all("output_hypernetworks_mlps" in name for name in still)
    for part in (".lm.", "text_hidden_fcs", "mask_decoder", "vision_encoder"):
        assert any(part in name for name in names), part
    assert figures["train/grad_norm"] > 0


def test_supervised_changes_lora_weights_and_nothing_else(tiny_checkpoint) -> None:
    policy = make_update(tiny_checkpoint).policy
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=1e-3)
    before = snapshot(policy.peft_model)
    SupervisedUpdate(policy, optimizer, SETTINGS).step(drawn_batch(64))
    names = changed(before, policy.peft_model)
    assert names
    assert all(".lora_" in name for name in names)


def test_a_constant_reward_changes_nothing(tiny_checkpoint) -> None:
    class Constant(MultiObjectiveReward):
        def overlap_terms(self, tp, fp, fn):
            return {"dice": np.zeros(np.shape(tp)) + 1.0}

        def structure_terms(self, pred, gt, gt_topology=None):
            return {"topology": 0.5}

    update = make_update(tiny_checkpoint, reward=Constant())
    before = snapshot(update.policy.peft_model)
    for _ in range(3):
        figures = update.step(drawn_batch(64))
    assert changed(before, update.policy.peft_model) == set()
    assert figures["train/zero_variance_groups"] == 1.0
    assert figures["train/grad_norm"] == 0.0


def test_first_pass_has_ratio_one_and_no_divergence(tiny_checkpoint) -> None:
    """Old log-probabilities are those of the policy that drew the masks; later passes have moved away."""
    update = make_update(tiny_checkpoint, settings=replace(SETTINGS, num_passes=1))
    first = update.step(drawn_batch(64))
    assert first["train/first_ratio_gap"] <= 1e-4
    assert abs(first["train/kl_ref"]) <= 1e-6
    second = make_update(tiny_checkpoint, settings=replace(SETTINGS, num_passes=3), rate=0.1)
    later = second.step(drawn_batch(64))
    assert later["train/first_ratio_gap"] <= 1e-4
    assert later["train/ratio_gap"] > 1e-3
    assert later["train/approx_kl"] > 0


def test_old_log_probabilities_are_stored_not_recomputed(tiny_checkpoint) -> None:
    update = make_update(tiny_checkpoint, rate=1e-2)
    batch = drawn_batch(64)
    inputs = update.policy.prepare(batch.images)
    with torch.no_grad():
        decoded = update.policy.decode(inputs, batch.keys)
        logits = update.policy.logits(decoded, decoded.best(), inputs)
    rollout = update.collect(batch, logits, decoded.best())
    for k, image_logits in enumerate(logits):
        p = torch.sigmoid(image_logits)
        assert torch.allclose(rollout.old_logprobs[k], torch.stack([(1 - p).log(), p.log()]), atol=1e-4)
        assert not rollout.old_logprobs[k].requires_grad
        assert not rollout.credit[k].requires_grad


def test_same_seed_same_step(tiny_checkpoint) -> None:
    runs = [make_update(tiny_checkpoint) for _ in range(2)]
    figures = [run.step(drawn_batch(64)) for run in runs]
    assert {k: v for k, v in figures[0].items() if not k.startswith("time/")} == {
        k: v for k, v in figures[1].items() if not k.startswith("time/")
    }
    weights = [snapshot(run.policy.peft_model) for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_images_of_different_sizes_in_one_batch(tiny_checkpoint) -> None:
    small, large = drawn_batch(64, 1), drawn_batch(80, 1)
    both = TrainBatch(["a", "b"], small.images + large.images, small.truths + large.truths,
                      small.topologies + large.topologies)  # fmt: skip
    assert make_update(tiny_checkpoint).step(both)["train/grad_norm"] > 0


# ---- The self-checks find what they are for


def test_dropout_during_rl_is_caught(tiny_checkpoint) -> None:
    update = make_update(tiny_checkpoint)
    update.policy.peft_model.eval = lambda: update.policy.peft_model.train()  # somebody turns dropout on
    for module in update.policy.peft_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for name, module in update.policy.peft_model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.5)
    with torch.no_grad():
        for name, parameter in update.policy.trainable.items():
            if ".lora_B." in name:
                parameter.add_(0.1)
    with pytest.raises(LearningError, match="ratio before the first update"):
        update.step(drawn_batch(64))


def test_a_detached_forward_pass_is_caught(tiny_checkpoint, monkeypatch) -> None:
    """The prototype trained through functions under no_grad."""
    update = make_update(tiny_checkpoint)
    encode = update.policy.model.encode_image
    monkeypatch.setattr(update.policy.model, "encode_image", torch.no_grad()(encode))
    with pytest.raises(LearningError, match=r"received no gradient.*vision_encoder"):
        update.step(drawn_batch(64))


def test_a_learning_rate_of_zero_is_caught(tiny_checkpoint) -> None:
    with pytest.raises(LearningError, match="adapter has moved by 0"):
        make_update(tiny_checkpoint, rate=0.0).step(drawn_batch(64))


@pytest.mark.parametrize("count", [1, 2])
def test_a_language_model_that_does_not_see_the_image_stops_the_run(tiny_checkpoint, count) -> None:
    """Also where a step has a single image, as in the preset full."""
    update = make_update(tiny_checkpoint)
    batch = drawn_batch(64, count)
    blind = update.policy.model.seg_states(update.policy.prepare(batch.images))
    update.policy.model.seg_states = lambda inputs: blind[: len(inputs.sizes)]
    with pytest.raises(LearningError, match="does not see the image"):
        update.step(batch)


def test_checks_by_hand() -> None:
    check_first_ratio(1e-5, 0.0)
    for ratio_gap, kl in ((1e-3, 0.0), (0.0, 1e-3)):
        with pytest.raises(LearningError):
            check_first_ratio(ratio_gap, kl)
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    with pytest.raises(LearningError, match="All 3 sampled masks"):
        check_samples_differ(masks)
    masks[1, 0, 0] = True
    check_samples_differ(masks)
    prompts = torch.randn(2, 1, 8)
    check_seg_embedding(prompts, prompts.flip(0))
    with pytest.raises(LearningError, match="does not see the image"):
        check_seg_embedding(prompts, prompts.clone())
    frozen = torch.nn.Linear(2, 2)
    frozen(torch.ones(1, 2)).sum().backward()
    frozen.requires_grad_(False)
    with pytest.raises(LearningError, match="frozen weights received a gradient"):
        check_gradients(frozen)


# ---- On a toy: 16 x 16 logits are the whole policy


class ToyPolicy(torch.nn.Module):
    """The interface of MaskPolicy around one table of logits."""

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(side, side) - 0.5)
        self.trainable = {"table": self.table}
        self.start = {"table": self.table.detach().clone()}
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

    def freeze_reference(self):
        self.start = self.values()

    def values(self):
        return {"table": self.table.detach().clone()}

    def reference_logits(self, inputs, keys, choice):
        return [self.start["table"]]


def toy_rewards(seed: int, updates: int = 50) -> list[float]:
    """Reward of the greedy mask before each update."""
    policy = ToyPolicy()
    optimizer = torch.optim.Adam([policy.table], lr=0.1)
    update = PPOUpdate(
        policy, optimizer, SimpleDiceReward(), replace(SETTINGS, correlation_px=1.0, seed=seed)
    )
    update.checked = True  # a table has no adapters to look at
    batch = drawn_batch(16, 1)
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
    assign = ppo_module.assign_credit

    def shuffled(*arguments):
        credit = assign(*arguments)
        order = rng.permutation(credit.overlap.size)
        parts = {name: getattr(credit, name) for name in ("overlap", "structure")}
        return replace(
            credit, **{name: part.ravel()[order].reshape(part.shape) for name, part in parts.items()}
        )

    monkeypatch.setattr(ppo_module, "assign_credit", shuffled)
    assert np.mean(toy_rewards(seed)[-5:]) < 5.0


def test_structure_credit_alone_connects_a_broken_vessel() -> None:
    """Only topology and length pay (no Dice, no recall): the gap in a bar gets closed."""
    policy = ToyPolicy(24)
    truth = np.zeros((24, 24), bool)
    truth[11:13, 2:22] = True
    logits = torch.where(torch.from_numpy(truth), 2.0, -5.0)
    logits[11:13, 9:12] = -0.7
    with torch.no_grad():
        policy.table.copy_(logits)
    policy.start["table"].copy_(logits)
    reward = MultiObjectiveReward(
        dice_weight=0, recall_weight=0, precision_weight=0, topology_weight=1, length_weight=1
    )
    optimizer = torch.optim.Adam([policy.table], lr=0.05)
    update = PPOUpdate(policy, optimizer, reward, replace(SETTINGS, num_samples=6, num_regions=4))
    update.checked = True
    batch = TrainBatch(["a"], [np.zeros((24, 24, 3), np.uint8)], [truth], [topology(truth)])
    pieces = [topology((policy.table > 0).numpy()).num_components]
    for _ in range(60):
        update.step(batch)
    pieces.append(topology((policy.table.detach() > 0).numpy()).num_components)
    assert pieces == [2, 1]


# ---- The supervised loss


def test_mask_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0]]])
    truth = torch.tensor([[[1.0, 0.0]]])
    dice = (2 * 0.5 + 1) / (1 + 1 + 1)
    assert float(mask_loss(logits, truth)) == pytest.approx(np.log(2) + 1 - dice)
    sure = torch.tensor([[[50.0, -50.0]]])
    assert float(mask_loss(sure, truth)) == pytest.approx(0, abs=1e-6)


def test_specks_below_the_smallest_component_are_not_in_the_scored_masks() -> None:
    """The greedy mask is scored as it will be used: with a filter of 9 px the 2 x 2 speck is gone."""
    policy = ToyPolicy(24)
    truth = np.zeros((24, 24), bool)
    truth[11:13, 2:22] = True
    with torch.no_grad():
        policy.table.copy_(torch.where(torch.from_numpy(truth), 9.0, -9.0))
        policy.table[2:4, 2:4] = 9.0
    batch = TrainBatch(["a"], [np.zeros((24, 24, 3), np.uint8)], [truth], [topology(truth)])
    optimizer = torch.optim.SGD([policy.table], lr=0.0)
    foreground = []
    for smallest in (0, 9):
        update = PPOUpdate(
            policy, optimizer, MultiObjectiveReward(), replace(SETTINGS, min_component_px=smallest)
        )
        figures = update.collect(batch, [policy.table.detach()], torch.zeros(1, 1, dtype=torch.long)).metrics
        foreground.append(figures["train/foreground"])
    assert foreground == [pytest.approx(44 / 40), 1.0]


def test_the_temperature_draws_masks_and_closes_no_gaps() -> None:
    """A gap at 0.12 is closed above 0.05 in the scored mask, but drawn at 0.0003 at temperature 0.25."""
    policy = ToyPolicy(24)
    truth = np.zeros((24, 24), bool)
    truth[11:13, 2:22] = True
    with torch.no_grad():
        policy.table.copy_(torch.where(torch.from_numpy(truth), 9.0, -9.0))
        policy.table[11:13, 10:12] = -2.0
    batch = TrainBatch(["a"], [np.zeros((24, 24, 3), np.uint8)], [truth], [topology(truth)])
    optimizer = torch.optim.SGD([policy.table], lr=0.0)
    for temperature in (1.0, 0.25):
        settings = replace(SETTINGS, close_gaps=0.05, temperature=temperature)
        update = PPOUpdate(policy, optimizer, MultiObjectiveReward(), settings)
        figures = update.collect(batch, [policy.table.detach()], torch.zeros(1, 1, dtype=torch.long)).metrics
        assert figures["train/foreground"] == 1.0


def test_a_rollout_keeps_the_policy_that_drew_it_and_the_credit_of_the_mask_in_use() -> None:
    """Old log-probabilities are those of the logits; credit is that in the greedy mask, not in drawn ones."""
    policy = ToyPolicy()
    logits = 2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    batch = drawn_batch(16, 1)
    optimizer = torch.optim.SGD([policy.table], lr=0.0)
    update = PPOUpdate(
        policy, optimizer, SimpleDiceReward(), replace(SETTINGS, temperature=1.5, advantage="plain")
    )
    rollout = update.collect(batch, [logits], torch.zeros(1, 1, dtype=torch.long))
    policy_then = torch.distributions.Bernoulli(logits=logits / 1.5)
    wanted = torch.stack(
        [policy_then.log_prob(torch.zeros(16, 16)), policy_then.log_prob(torch.ones(16, 16))]
    )
    assert torch.allclose(rollout.old_logprobs[0], wanted, atol=1e-5)
    greedy, truth = (logits > 0).numpy(), batch.truths[0]
    assert all(not np.array_equal(mask, greedy) for mask in rollout.masks[0].numpy())
    for row, column in [(0, 0), (8, 3), (5, 5), (15, 2), (9, 9)]:
        on, off = greedy.copy(), greedy.copy()
        on[row, column], off[row, column] = True, False
        worth = 10 * (dice(on, truth) - dice(off, truth))
        assert float(rollout.credit[0][row, column]) == pytest.approx(worth, abs=1e-4)
