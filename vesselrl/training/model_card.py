"""The model card of the embedded miniature: how it was made and what it scores, all measured here."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from vesselrl.evaluation.evaluate import evaluate
from vesselrl.evaluation.results import Evaluation
from vesselrl.experiment.run_folder import file_sha256, git_commit
from vesselrl.inference.predictor import Predictor
from vesselrl.synthetic.dataset import SOURCE, TARGET, draw_sequence
from vesselrl.synthetic.rendering import Domain
from vesselrl.training.pretrain import IMAGE_PX, PretrainPlan

# Neither the pre-training nor the built-in data set reaches these patient numbers.
FIRST_PATIENT, NUM_PATIENTS = 2001, 40
METRICS = ("dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
_ABOUT = """\
A Sa2VA of the official classes and file layout, small enough for a laptop. It was trained, supervised, on
synthetic angiograms of the *source* domain and meets the *target* domain as a stranger: its vessels there are
incomplete and broken. It is the default model of `vesselrl train`. Not for real images, not for diagnosis."""


def write_model_card(folder: Path, plan: PretrainPlan) -> Path:
    """Scores a finished miniature on unseen source and target patients and writes README.md beside it."""
    predictor = Predictor.from_pretrained(folder, device="cpu")
    num_values = sum(parameter.numel() for parameter in predictor.model.parameters())
    weights = folder / "model.safetensors"
    lines = [
        "# Miniature Sa2VA",
        "",
        _ABOUT,
        "",
        (
            f"- Rebuilt by: `vesselrl pretrain --output_model FOLDER --num_steps {plan.num_steps} "
            f"--seed {plan.seed}` (two CPU threads)"
        ),
        f"- Plan: {asdict(plan)}",
        f"- Code: commit {git_commit()}",
        f"- {num_values:,} values, float32, {weights.stat().st_size / 1e6:.1f} MB",
        f"- sha256 of model.safetensors: `{file_sha256(weights)}`",
        "- Licence: Apache-2.0, like the code; trained on drawn images only.",
        "",
        (
            f"Scores at threshold 0.5, one image of each of {NUM_PATIENTS} unseen patients per domain "
            "(mean, 95 % interval):"
        ),
        "",
        "| domain | " + " | ".join(METRICS) + " |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    for domain, seed in ((SOURCE, plan.data_seed), (TARGET, plan.data_seed)):
        scores = score_domain(predictor, domain, seed).summary["metrics"]
        cells = [
            f"{m['patient_mean']:.3f} ({m['low']:.3f} to {m['high']:.3f})" for m in map(scores.get, METRICS)
        ]
        lines.append(f"| {domain.name} | " + " | ".join(cells) + " |")
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def score_domain(predictor: Predictor, domain: Domain, seed: int) -> Evaluation:
    """Scores on one frame of each unseen patient of a domain."""
    names = [f"P{number}" for number in range(FIRST_PATIENT, FIRST_PATIENT + NUM_PATIENTS)]
    samples = [SimpleNamespace(key=f"{name}_S1_F0001", patient=name, sequence=f"{name}_S1") for name in names]

    def load(sample: SimpleNamespace) -> tuple:
        number = int(sample.patient[1:])
        # Early frames hold less contrast agent than later ones: go round the first five.
        return draw_sequence(domain, number, 1, 1 + number % 5, IMAGE_PX, seed)[-1]

    return evaluate(predictor.predict, samples, load=load)
