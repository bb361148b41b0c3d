"""Learning is real: gradients reach the adapters and nothing else, and only a reward can move the policy."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from vesselrl.data.dataset import TrainBatch
from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.experiment.config import PRESETS
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, SCOPES, attach_lora
from vesselrl.models.sa2va import DecodedMasks, ImageFeatures
from vesselrl.scoring.overlap import dice
from vesselrl.scoring.rewards import MultiObjectiveReward, Reward, SimpleDiceReward
from vesselrl.scoring.topology import topology
from vesselrl.training import ppo
from vesselrl.training.checkpoint import attempts
from vesselrl.training.credit import Credit, RolloutImage
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.supervised import SupervisedUpdate

SETTINGS = PRESETS["debug"].with_(num_samples=3, num_regions=2)


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
    return TrainBatch(["a", "b"][:count], images, truths, [topology(truth) for truth in truths], count)


def make_update(tiny_checkpoint, reward: Reward | None = None, rate: float = 1e-3, **settings) -> PPOUpdate:
    torch.manual_seed(0)
    model, processor = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(model, SCOPES, LORA_PRESETS["medium"]._replace(rank=4, alpha=8))
    policy = MaskPolicy(peft_model, processor, "Please segment the blood vessel.")
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=rate, weight_decay=0.01)
    return PPOUpdate(policy, optimizer, reward or MultiObjectiveReward(), SETTINGS.with_(**settings))


def weights(update: PPOUpdate) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in update.policy.peft_model.state_dict().items()}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_step_changes_lora_weights_alone_and_repeats_with_its_seed(tiny_checkpoint, stage) -> None:
    small, large = crossing_lines(64, 1), crossing_lines(80, 1)  # sizes in a batch may differ
    batch = TrainBatch(["a", "b"], *(getattr(small, name) + getattr(large, name)
                                     for name in ("images", "truths", "topologies")), size=2)  # fmt: skip
    found = []
    for _ in range(2):
        update = make_update(tiny_checkpoint, rate=0.1, num_passes=3, target_kl=1e9)
        before, policy = weights(update), update.policy
        step = update.step if stage == "rl" else SupervisedUpdate(policy, update.optimizer, SETTINGS).step
        metrics = step(batch)
        found.append((weights(update), {k: v for k, v in metrics.items() if not k.startswith("time/")}))
    names = differ(before, weights(update))
    assert all(".lora_" in name for name in names)
    # Every component moves; the two hyper-networks of candidates that were not chosen have no gradient.
    still = {n for n in policy.trainable if ".lora_B." in n} - names
    assert all("output_hypernetworks_mlps" in name for name in still)
    for part in (".lm.", "text_hidden_fcs", "mask_decoder", "vision_encoder"):
        assert any(part in name for name in names), part
    assert metrics["train/grad_norm"] > 0
    assert found[0][1] == found[1][1]
    assert differ(found[0][0], found[1][0]) == set()
    if stage == "rl":  # old log-probabilities are those of the policy that sampled; later passes move away
        assert metrics["train/first_ratio_gap"] <= 1e-4
        assert metrics["train/ratio_gap"] > 1e-3
        assert metrics["train/approx_kl"] > 0


def take(update: PPOUpdate | SupervisedUpdate, policy: MaskPolicy, batch: TrainBatch) -> dict[str, float]:
    for attempt in attempts(policy, update.optimizer, update):
        with attempt:
            metrics = update.step(batch)
    return metrics


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_step_that_memory_does_not_suffice_for_is_taken_again(tiny_checkpoint, stage, caplog) -> None:
    """It ends as if memory had sufficed, also where the optimizer had moved; at last there is no way."""
    batches, found = [crossing_lines(64, 1), replace(crossing_lines(80, 1), keys=["b"])], []
    for failures in ((), (3,), (3, 6)):  # of the second step's passes through the image encoder
        update, calls = make_update(tiny_checkpoint, rate=0.05), []
        policy, encode = update.policy, update.policy.model.encode_image

        def fail_at(pixels: torch.Tensor, failures=failures, calls=calls, encode=encode) -> ImageFeatures:
            calls.append(pixels)
            if len(calls) * (1 if stage == "rl" else 3) in failures:
                raise torch.OutOfMemoryError("CUDA out of memory. More follows.")
            return encode(pixels)

        update = update if stage == "rl" else SupervisedUpdate(policy, update.optimizer, SETTINGS)
        take(update, policy, batches[0])
        policy.model.encode_image = fail_at
        metrics = take(update, policy, batches[1])
        found.append((policy.values(), {k: v for k, v in metrics.items() if not k.startswith("time/")}))
        assert len(policy.savings) == 2 - len(failures)
    for values, metrics in found[1:]:
        assert metrics == found[0][1]
        assert differ(values, found[0][0]) == set()
    assert caplog.text.count("out of memory (CUDA out of memory); the step is taken again") == 3
    policy.model.encode_image = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):
        take(update, policy, batches[1])


class Constant(MultiObjectiveReward):
    overlap_terms = staticmethod(lambda tp, fp, fn: {"dice": np.ones(np.shape(tp))})
    structure_terms = staticmethod(lambda *_, **__: {"topology": 0.5})


def test_masks_are_scored_while_the_reference_is_computed(tiny_checkpoint, monkeypatch) -> None:
    """Else the scoring here would wait for ever, and the device for the scoring."""
    update, passed, assign_credit = make_update(tiny_checkpoint), threading.Event(), ppo.assign_credit
    reference = update.policy.reference_logits

    def scored_later(*args) -> Credit:
        assert passed.wait(60)
        return assign_credit(*args)

    def reference_first(*args) -> list[torch.Tensor]:
        found = reference(*args)
        passed.set()
        return found

    monkeypatch.setattr(ppo, "assign_credit", scored_later)
    update.policy.reference_logits = reference_first
    assert update.step(crossing_lines(64))["train/grad_norm"] > 0


def test_noise_and_regions_change_with_rollout_and_place(tiny_checkpoint, monkeypatch) -> None:
    """Equal images get other masks each; alone in a process an image gets those of its place."""
    seen, assign_credit = [], ppo.assign_credit

    def watch(image: RolloutImage, *others: object) -> Credit:
        seen.append((image.masks.copy(), others[3].random()))
        return assign_credit(image, *others)

    monkeypatch.setattr(ppo, "assign_credit", watch)
    one = crossing_lines(64, 1)
    image = (one.images, one.truths, one.topologies)
    settings = {"num_workers": 1}  # in turn
    update = make_update(tiny_checkpoint, Constant(), **settings)
    for _ in range(2):
        update.step(TrainBatch(["a", "b"], *(2 * part for part in image), size=2))
    second = TrainBatch(["b"], *image, size=2, first=1, stride=2)
    make_update(tiny_checkpoint, Constant(), **settings).step(second)
    assert len({masks.tobytes() for masks, _ in seen[:4]}) == len({number for _, number in seen[:4]}) == 4
    assert (seen[4][0] == seen[1][0]).all()
    assert seen[4][1] == seen[1][1]


def test_a_constant_reward_changes_nothing(tiny_checkpoint) -> None:
    update = make_update(tiny_checkpoint, Constant())
    before = weights(update)
    for _ in range(3):
        metrics = update.step(crossing_lines(64))
    assert differ(before, weights(update)) == set()
    assert metrics["train/zero_variance_groups"] == 1.0
    assert metrics["train/grad_norm"] == 0.0


def test_a_reward_beyond_all_numbers_is_named(tiny_checkpoint) -> None:
    class Huge(MultiObjectiveReward):
        def overlap_terms(self, tp, fp, fn):
            return {name: term * 1e37 for name, term in super().overlap_terms(tp, fp, fn).items()}

    update = make_update(tiny_checkpoint, Huge())
    before = weights(update)
    with pytest.raises(LearningError, match=r"the reward is the cause, with values of .*e\+3"):
        update.step(crossing_lines(64))
    assert differ(before, weights(update)) == set()


def test_logits_that_are_no_numbers_are_no_empty_masks(tiny_checkpoint, monkeypatch) -> None:
    update, logits = make_update(tiny_checkpoint), MaskPolicy.logits
    monkeypatch.setattr(MaskPolicy, "logits", lambda *given: [one * float("nan") for one in logits(*given)])
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        update.step(crossing_lines(64))


def spoil(update: PPOUpdate, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = update.policy
    if kind == "dropout":
        policy.peft_model.eval = policy.peft_model.train
        for name, module in policy.peft_model.named_modules():
            if name.endswith("lora_dropout"):
                module["default"] = torch.nn.Dropout(0.5)
        for name, parameter in policy.trainable.items():
            parameter.data += 0.1 * (".lora_B." in name)
    elif kind == "another reference":
        policy.reference_logits = lambda *_: [torch.full((64, 64), 5.0)] * 2
    elif kind == "detached":  # the prototype trained through functions under no_grad
        policy.model.encode_image = torch.no_grad()(policy.model.encode_image)
    elif kind == "equal samples":
        equal = Mock(side_effect=lambda logits, count, *_: torch.stack([logits > 0] * count))
        monkeypatch.setattr(ppo.ppo_math, "sample_masks", equal)
    elif kind.startswith("blind"):
        states = policy.model.seg_states(policy.prepare(crossing_lines(64).images))
        policy.model.seg_states = lambda inputs: states[: len(inputs.sizes)]
    else:
        update.optimizer.param_groups[0]["lr"] = 0.0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dropout", "ratio before the first update"),
        ("another reference", "KL to the reference"),
        ("detached", r"received no gradient.*vision_encoder"),
        ("equal samples", "All 3 sampled masks"),
        ("blind", "does not see the image"),
        ("blind with one image", "does not see the image"),  # as in the preset full
        ("no rate", "adapter has moved by 0"),
    ],
)
def test_a_spoilt_training_is_caught(tiny_checkpoint, kind: str, message: str, monkeypatch) -> None:
    update = make_update(tiny_checkpoint)
    spoil(update, kind, monkeypatch)
    with pytest.raises(LearningError, match=message):
        update.step(crossing_lines(64, 1 if "one" in kind else 2))


def toy_update(logits: torch.Tensor, reward: Reward, rate: float = 0.0, **settings) -> PPOUpdate:
    table = torch.nn.Parameter(logits.clone())
    policy = SimpleNamespace(
        trainable={"table": table},
        model=SimpleNamespace(device=torch.device("cpu")),
        peft_model=torch.nn.Identity(),
        prepare=lambda images: None,
        decode=lambda inputs, keys: DecodedMasks(table[None, None, None], torch.zeros(1, 1, 1)),
        logits=lambda decoded, choice, inputs: [decoded.logits[0, 0, 0]],
        reference_logits=lambda inputs, keys, choice: [logits],
        values=lambda: {"table": table.detach().clone()},
        restore=lambda values: table.data.copy_(values["table"]),
    )
    update = PPOUpdate(policy, torch.optim.Adam([table], lr=rate), reward, SETTINGS.with_(**settings))
    update.checked = True  # a table has no adapters to look at
    return update


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_rises_on_a_toy_and_not_when_credit_is_shuffled(seed: int, monkeypatch) -> None:
    """The same credit given to random pixels teaches nothing: the rise is the reward's doing."""

    def rewards() -> list[float]:
        """Of the greedy mask before each update."""
        update = toy_update(torch.zeros(16, 16) - 0.5, SimpleDiceReward(), 0.1, correlation_px=1.0, seed=seed)
        batch = crossing_lines(16, 1)
        return [update.step(batch)["train/greedy_reward"] for _ in range(50)]

    rng, assign = np.random.default_rng(seed), ppo.assign_credit

    def shuffled(*arguments):
        credit = assign(*arguments)
        order = rng.permutation(credit.overlap.size)
        parts = {name: getattr(credit, name) for name in ("overlap", "structure")}
        return replace(credit, **{k: part.ravel()[order].reshape(part.shape) for k, part in parts.items()})

    rising = rewards()
    assert rising[0] == 0.0
    assert np.mean(rising[-5:]) > 9.0
    monkeypatch.setattr(ppo, "assign_credit", shuffled)
    assert np.mean(rewards()[-5:]) < 5.0


def test_a_step_ends_within_the_trust_region() -> None:
    """Too long a step ends on its own line; one that no shortening brings back is not taken."""
    start, batch = torch.full((16, 16), -0.5), crossing_lines(16, 1)
    found = {}
    for rate, limit in ((0.01, 0.05), (9.0, 1e9), (9.0, 0.05), (1e30, 0.05)):
        update = toy_update(start, SimpleDiceReward(), rate, target_kl=limit, num_passes=1)
        metrics = update.step(batch)
        moved = update.policy.trainable["table"].detach() - start
        (moments,) = update.optimizer.state.values()
        found[rate, limit] = metrics["train/approx_kl"], moved, moments["exp_avg"]
    (short, *_), (full, all_the_way, moments), (kl, moved, kept), (none, stays, _) = found.values()
    assert short < 0.05 < 0.5 < full
    assert 0.02 < kl <= 0.05
    part = float(moved.norm() / all_the_way.norm())
    assert torch.allclose(moved, part * all_the_way, atol=1e-6)
    assert torch.equal(kept, moments)
    assert none == 0
    assert not stays.any()


def test_no_pass_follows_a_shortened_step() -> None:
    """The divergence is that of all passes together from the policy that sampled."""
    calls, take_step, settings = [], ppo.take_step, {"num_passes": 4, "target_kl": 0.05}
    for rate, wanted in ((0.02, 4), (0.9, 2), (9.0, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo, "take_step", lambda *a, **k: calls.append(a) or take_step(*a, **k))
            update = toy_update(torch.zeros(16, 16) - 0.5, SimpleDiceReward(), rate, **settings)
            assert update.step(crossing_lines(16, 1))["train/approx_kl"] <= 0.05
        assert len(calls) == wanted
        calls.clear()


def test_scores_of_the_greedy_masks_by_hand() -> None:
    """6 of 10 vessel pixels and 2 false ones; then nothing, where nothing is."""
    given = {"overlap": None, "structure": None, "rewards": np.zeros(2), "terms": {}, "greedy_reward": 0.0}
    credits = [Credit(**given, greedy_counts=one, num_regions=0) for one in ((6, 2, 4), (0, 0, 0))]
    metrics = ppo.rollout_metrics(credits)
    wanted = {"dice": (2 / 3 + 1) / 2, "recall": 0.8, "precision": 0.875, "foreground": 0.8}
    assert {name: metrics[f"train/{name}"] for name in wanted} == pytest.approx(wanted)


BAR = np.zeros((24, 24), bool)
BAR[11:13, 2:22] = True
BAR_BATCH = TrainBatch(["a"], [np.zeros((24, 24, 3), np.uint8)], [BAR], [topology(BAR)], size=1)


def test_structure_credit_alone_connects_a_broken_vessel() -> None:
    """Only topology and length pay (no Dice, no recall): the gap in a bar gets closed."""
    logits = torch.where(torch.from_numpy(BAR), 2.0, -5.0)
    logits[11:13, 9:12] = -0.7
    weights = {"dice_weight": 0, "recall_weight": 0, "precision_weight": 0}
    reward = MultiObjectiveReward(**weights, topology_weight=1, length_weight=1)
    update = toy_update(logits, reward, 0.05, num_samples=6, num_regions=4)
    for _ in range(60):
        update.step(BAR_BATCH)
    after = update.policy.trainable["table"].detach()
    assert [topology((table > 0).numpy()).num_components for table in (logits, after)] == [2, 1]


def test_masks_are_scored_as_they_will_be_used() -> None:
    """A 2 x 2 speck is gone with a filter of 9 px; a gap at 0.12 is closed at any temperature."""
    logits = torch.where(torch.from_numpy(BAR), 9.0, -9.0)
    logits[2:4, 2:4] = 9.0
    logits[11:13, 10:12] = -2.0  # at temperature 0.25 sampled at 0.0003
    for temperature in (1.0, 0.25):
        settings = {"min_component_px": 9, "close_gaps": 0.05, "temperature": temperature}
        update = toy_update(logits, MultiObjectiveReward(), **settings)
        sampled = update.sample(BAR_BATCH, [logits])
        assert update.collect(BAR_BATCH, [logits], *sampled)[1]["train/foreground"] == 1.0


def test_a_rollout_keeps_the_policy_that_sampled_and_the_credit_of_the_mask_in_use() -> None:
    """Old log-probabilities are those of the logits; credit is that in the greedy mask."""
    logits = 2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    batch = crossing_lines(16, 1)
    update = toy_update(logits, SimpleDiceReward(), temperature=1.5, advantage="plain")
    logits.requires_grad_(True)
    (image,), *_ = update.collect(batch, [logits], *update.sample(batch, [logits]))
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
