"""Rebuilds the embedded miniature and its model card: supervised training on the synthetic source domain.

The three candidate masks of the decoder are trained alike and its quality head learns their true overlap, so
that the official choice (largest estimated IoU) means something and a later fine-tuning can rely on it.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import run
from vesselrl.evaluation.evaluate import evaluate
from vesselrl.evaluation.results import Evaluation
from vesselrl.experiment.run_folder import file_sha256, git_commit, write_text
from vesselrl.inference.predictor import Predictor
from vesselrl.models.checkpoint import EMBEDDED, load_tokenizer
from vesselrl.models.config import read_config
from vesselrl.models.miniature import random_sa2va, write_miniature, write_tokenizer
from vesselrl.models.processing import Sa2VAProcessor
from vesselrl.models.sa2va import DecodedMasks, upsample
from vesselrl.synthetic.dataset import SOURCE, TARGET, draw_sequence
from vesselrl.synthetic.rendering import Domain
from vesselrl.training.setup import warm_cosine
from vesselrl.training.supervised import mask_loss

logger = logging.getLogger(__name__)

IMAGE_PX = 256
# Whatever the number of cores, so that the same plan gives the same weights.
NUM_THREADS = 2
# Neither the pre-training nor the built-in data set reaches these patient numbers.
FIRST_PATIENT, NUM_PATIENTS = 2001, 40
COMMAND = "python -m benchmarks.pretrain --output_model FOLDER"
METRICS = ("dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
CARD = """\
# Miniature Sa2VA

A Sa2VA of the official classes and file layout, small enough for a laptop. It was trained, supervised, on
synthetic angiograms of the *source* domain and meets the *target* domain as a stranger: its vessels there are
incomplete and broken. It is the default model of `vesselrl train`. Not for real images, not for diagnosis.

- Rebuilt by: `{command}` (two CPU threads)
- Plan: {plan}
- Code: commit {commit}
- {num_values:,} values, float32, {megabytes:.1f} MB
- sha256 of model.safetensors: `{sha256}`
- Licence: Apache-2.0, like the code; trained on drawn images only.

Scores at threshold 0.5, one image of each of {num_patients} unseen patients per domain (mean, 95 % interval):

"""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the miniature's weights; stored in its model card."""

    num_steps: int = 500
    batch_size: int = 4
    num_patients: int = 300
    num_frames: int = 3
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    seed: int = 0
    data_seed: int = 1000


def pretrain(output_model: str, num_steps: int = 500, seed: int = 0) -> int:
    """Rebuilds the embedded miniature from random weights on the synthetic source domain.

    Args:
        output_model: new checkpoint folder.
        num_steps: training steps.
        seed: of weights, images and order.
    """
    folder, plan = Path(output_model), Plan(num_steps=num_steps, seed=seed)
    train_miniature(folder, plan)
    print(f"Model card: {write_model_card(folder, plan)}")
    return 0


def train_miniature(folder: Path, plan: Plan) -> None:
    """Trains a random miniature and writes it as a checkpoint folder in the official layout."""
    torch.set_num_threads(NUM_THREADS)
    config = read_config(EMBEDDED)
    model = random_sa2va(plan.seed, config).train()
    model.lm.lm_head.requires_grad_(False)  # no text is generated here
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    processor = Sa2VAProcessor(config, load_tokenizer(folder))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, plan.num_steps, plan.warmup_share)
    )
    for step, (images, truth) in enumerate(source_batches(plan), start=1):
        inputs = processor(images)
        decoded = model.decode(model.encode_image(inputs.sam_pixels), model.seg_prompts(inputs))
        loss = candidate_loss(decoded, truth, config.sam2.image_size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == plan.num_steps:
            logger.info("pretrain step %d/%d loss %.4f", step, plan.num_steps, float(loss.detach()))
    write_miniature(folder, model.eval())


def candidate_loss(decoded: DecodedMasks, truth: Tensor, sam_px: int) -> Tensor:
    """Mean mask loss of the three candidates plus the squared error of their estimated IoU."""
    candidates = decoded.iou.shape[-1]
    low_res = decoded.logits[:, 0].flatten(0, 1)[:, None]
    sizes = (tuple(truth.shape[1:]),) * len(low_res)
    logits = torch.stack(upsample(low_res, sizes, sam_px))
    repeated = truth.repeat_interleave(candidates, dim=0)
    with torch.no_grad():
        hit, positive = (logits > 0) & (repeated > 0.5), (logits > 0) | (repeated > 0.5)
        iou = hit.sum((1, 2)) / positive.sum((1, 2)).clamp(min=1)
    quality = functional.mse_loss(decoded.iou[:, 0].flatten(), iou)
    return mask_loss(logits, repeated).mean() + 0.1 * quality


def source_batches(plan: Plan) -> Iterator[tuple[list[np.ndarray], Tensor]]:
    """`num_steps` batches of source images with random flips and quarter turns; (B, H, W) float truth."""
    frames = [
        frame
        for patient in range(1, plan.num_patients + 1)
        for frame in draw_sequence(SOURCE, patient, 1, plan.num_frames, IMAGE_PX, plan.data_seed)
    ]
    rng = np.random.default_rng([plan.seed, 1])
    for _ in range(plan.num_steps):
        chosen = [frames[k] for k in rng.integers(len(frames), size=plan.batch_size)]
        turned = []
        for frame in chosen:  # one of the eight symmetries of the square
            choice = int(rng.integers(8))
            arrays = [np.rot90(array, choice % 4, axes=(0, 1)) for array in frame]
            turned.append([np.ascontiguousarray(a[:, ::-1] if choice >= 4 else a) for a in arrays])
        yield [image for image, _ in turned], torch.from_numpy(np.stack([mask for _, mask in turned])).float()


def write_model_card(folder: Path, plan: Plan) -> Path:
    """Scores a finished miniature on unseen source and target patients and writes README.md beside it."""
    predictor, weights = Predictor.from_pretrained(folder, device="cpu"), folder / "model.safetensors"
    card = CARD.format(
        command=f"{COMMAND} --num_steps {plan.num_steps} --seed {plan.seed}",
        plan=asdict(plan),
        commit=git_commit(),
        num_values=sum(parameter.numel() for parameter in predictor.model.parameters()),
        megabytes=weights.stat().st_size / 1e6,
        sha256=file_sha256(weights),
        num_patients=NUM_PATIENTS,
    )
    lines = [f"| domain | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"]
    for domain in (SOURCE, TARGET):
        found = score_domain(predictor, domain, plan.data_seed).summary["metrics"]
        cells = [
            f"{m['patient_mean']:.3f} ({m['low']:.3f} to {m['high']:.3f})" for m in map(found.get, METRICS)
        ]
        lines.append(f"| {domain.name} | {' | '.join(cells)} |")
    write_text(folder / "README.md", card + "\n".join(lines) + "\n")
    return folder / "README.md"


def score_domain(predictor: Predictor, domain: Domain, seed: int) -> Evaluation:
    """Scores on one frame of each unseen patient of a domain."""
    names = [f"P{number}" for number in range(FIRST_PATIENT, FIRST_PATIENT + NUM_PATIENTS)]
    samples = [SimpleNamespace(key=f"{name}_S1_F0001", patient=name, sequence=f"{name}_S1") for name in names]

    def load(sample: SimpleNamespace) -> tuple:
        number = int(sample.patient[1:])
        # Early frames hold less contrast agent than later ones: go round the first five.
        return draw_sequence(domain, number, 1, 1 + number % 5, IMAGE_PX, seed)[-1]

    return evaluate(predictor.predict, samples, load=load)


if __name__ == "__main__":
    run(pretrain)
