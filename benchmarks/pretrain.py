"""Rebuilds the embedded miniature and its model card: supervised training on the synthetic source domain."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import run
from vesselrl.evaluation.evaluate import evaluate
from vesselrl.evaluation.results import Evaluation
from vesselrl.evaluation.words import with_interval
from vesselrl.experiment.run_folder import git_commit, write_text
from vesselrl.inference.predictor import Predictor
from vesselrl.models.checkpoint import EMBEDDED
from vesselrl.models.config import read_config
from vesselrl.models.miniature import random_sa2va, write_miniature, write_tokenizer
from vesselrl.models.processing import Sa2VAProcessor, load_tokenizer
from vesselrl.models.sa2va import DecodedMasks, upsample
from vesselrl.synthetic.dataset import SOURCE, TARGET, draw_sequence
from vesselrl.synthetic.rendering import Domain
from vesselrl.training.setup import warm_cosine
from vesselrl.training.supervised import mask_loss

logger = logging.getLogger(__name__)

NUM_THREADS = 2  # whatever the number of cores, so that the same seed gives the same weights
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, WARMUP_SHARE = 4, 1.5e-3, 0.01, 0.05
IMAGE_PX, NUM_PATIENTS, NUM_FRAMES, DATA_SEED = 256, 300, 3, 1000
# Of the scores; neither the pretraining nor the built-in data set reaches these numbers.
UNSEEN_PATIENTS = range(2001, 2041)
METRICS = ("dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
CARD = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")


def pretrain(output_model: str, num_steps: int = 500, seed: int = 0) -> int:
    """Rebuilds the embedded miniature from random weights on the synthetic source domain.

    Args:
        output_model: new checkpoint folder.
        num_steps: training steps.
        seed: of weights, images and order.
    """
    folder, config = Path(output_model), read_config(EMBEDDED)
    torch.set_num_threads(NUM_THREADS)
    model = random_sa2va(seed, config).train()
    model.lm.lm_head.requires_grad_(False)  # no text is generated here
    write_tokenizer(folder)
    processor = Sa2VAProcessor(config, load_tokenizer(folder))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: warm_cosine(k, num_steps, WARMUP_SHARE))
    for step, (images, truth) in enumerate(source_batches(num_steps, seed), start=1):
        inputs = processor(images)
        decoded = model.decode(model.encode_image(inputs.sam_pixels), model.seg_prompts(inputs))
        loss = candidate_loss(decoded, truth, config.sam2.image_size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        if step % 25 == 0 or step == num_steps:
            logger.info("pretrain step %d/%d loss %.4f", step, num_steps, float(loss.detach()))
    write_miniature(folder, model.eval())
    labels = {"num_steps": num_steps, "seed": seed, "commit": git_commit(), "metrics": " | ".join(METRICS)}
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    labels |= {"sha256": digest, "num_patients": len(UNSEEN_PATIENTS)}
    card, predictor = CARD.format_map(labels), Predictor.from_pretrained(folder, device="cpu")
    for domain in (SOURCE, TARGET):
        found = score_domain(predictor, domain).summary["metrics"]
        values = ([found[name][key] for key in ("patient_mean", "low", "high")] for name in METRICS)
        cells = [str(with_interval(name, *three)) for name, three in zip(METRICS, values, strict=True)]
        card += f"| {domain.name} | {' | '.join(cells)} |\n"
    write_text(folder / "README.md", card)
    print(f"Model card: {folder / 'README.md'}")
    return 0


def source_batches(num_steps: int, seed: int) -> Iterator[tuple[list[np.ndarray], Tensor]]:
    """Batches of source images with random flips and quarter turns; (B, H, W) float truth."""
    frames = []
    for patient in range(1, NUM_PATIENTS + 1):
        frames += draw_sequence(SOURCE, patient, 1, NUM_FRAMES, IMAGE_PX, DATA_SEED)
    rng = np.random.default_rng([seed, 1])
    for _ in range(num_steps):
        turned = []
        for k in rng.integers(len(frames), size=BATCH_SIZE):
            choice = int(rng.integers(8))  # one of the symmetries of the square
            arrays = [np.rot90(array, choice % 4, axes=(0, 1)) for array in frames[k]]
            turned.append([np.ascontiguousarray(a[:, ::-1] if choice >= 4 else a) for a in arrays])
        images, masks = zip(*turned, strict=True)
        yield list(images), torch.from_numpy(np.stack(masks)).float()


def candidate_loss(decoded: DecodedMasks, truth: Tensor, sam_px: int) -> Tensor:
    """Mean mask loss of the three candidates plus the squared error of the IoU they estimate."""
    low_res = decoded.logits[:, 0].flatten(0, 1)[:, None]
    logits = torch.stack(upsample(low_res, (tuple(truth.shape[1:]),) * len(low_res), sam_px))
    repeated = truth.repeat_interleave(decoded.iou.shape[-1], dim=0)
    with torch.no_grad():
        hit, positive = (logits > 0) & (repeated > 0.5), (logits > 0) | (repeated > 0.5)
        iou = hit.sum((1, 2)) / positive.sum((1, 2)).clamp(min=1)
    quality = functional.mse_loss(decoded.iou[:, 0].flatten(), iou)
    return mask_loss(logits, repeated).mean() + 0.1 * quality


def score_domain(predictor: Predictor, domain: Domain) -> Evaluation:
    """Scores on one frame of each unseen patient of a domain."""
    samples = [SimpleNamespace(key=n, patient=n, sequence=n) for n in map("P{}".format, UNSEEN_PATIENTS)]

    def load(sample: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
        number = int(sample.key[1:])  # early frames hold less contrast agent: go round the first five
        return draw_sequence(domain, number, 1, 1 + number % 5, IMAGE_PX, DATA_SEED)[-1]

    return evaluate(predictor.predict, samples, load=load)


if __name__ == "__main__":
    run(pretrain)
