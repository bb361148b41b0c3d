"""Scores of every arm of the learning benchmark, from one prediction of each image by each trained model.

Whatever is chosen (post-processing, which control) is chosen on validation images. In the folder of
an arm and a seed:

    probabilities/SIDE_KEY.npy   float16, of the arms that predict
    grid.json                    mean validation reward by post-processing
    val.json, test.json          scores of the arm, with the post-processing that was chosen
    test_at_recall_of_RL.json    scores of C1 and C3 at the validation recall of an RL arm
    test_curve.json              test scores by threshold, for the figure; nothing is chosen on it

What is there already is used again if it belongs to the same run and the same definitions.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vesselrl.benchmarks.learning_arms import BY_NAME, EQUAL_RECALL, FIXED_POST, Arm
from vesselrl.data.annotations import Sample, load_image, load_mask
from vesselrl.data.splits import Split
from vesselrl.evaluation.evaluate import describe_reward
from vesselrl.evaluation.held_out import EvaluationPlan, make_predictor
from vesselrl.evaluation.postprocessing_grid import (
    GAP_LEVELS,
    SIZES_PX,
    THRESHOLDS,
    PostProcessingGrid,
    PredictedImage,
    known_probabilities,
    score_postprocessing,
)
from vesselrl.evaluation.predictions import evaluate_masks
from vesselrl.evaluation.results import Evaluation, read_evaluation, read_extra, summarise, write_evaluation
from vesselrl.evaluation.statistics import patient_means
from vesselrl.evaluation.thresholds import CurvePoint, ThresholdCurve, counts_by_threshold, threshold_curve
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import write_json
from vesselrl.scoring.metrics import score_mask
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward
from vesselrl.scoring.spec import METRIC_SPEC
from vesselrl.scoring.truth import known_truth

logger = logging.getLogger(__name__)

# What chooses on validation and what is reported: the default reward, whatever an arm was trained with.
REWARD = MultiObjectiveReward()
# Pays for structure alone: 5 times the topology score.
STRUCTURE = MultiObjectiveReward(
    dice_weight=0, recall_weight=0, topology_weight=1, length_weight=0, precision_weight=0
)
CURVE_METRICS = ("dice", "recall", "precision", "beta0_error")

Predict = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class ArmResult:
    """One arm with one seed: scores on both sides, and how its masks were made."""

    val: Evaluation
    test: Evaluation
    source: str
    post: PostProcessing


class ArmScorer:
    """Predicts, chooses and scores for one seed.

    Args:
        split: of the suite.
        folder_of: arm name -> its folder for this seed.
        run_of: arm name -> its finished run folder, None for the base or where there is none.
        base_settings: settings of any training of the suite, for the untouched base.
    """

    def __init__(
        self,
        split: Split,
        folder_of: Callable[[str], Path],
        run_of: Callable[[str], Path | None],
        base_settings: TrainConfig,
    ) -> None:
        self.samples = {"val": split.val, "test": split.test}
        self.folder_of = folder_of
        self.run_of = run_of
        self.base_settings = base_settings
        self.truths = {s.key: load_mask(s) for side in self.samples.values() for s in side}

    def result(self, arm: Arm, source: str, post: PostProcessing) -> ArmResult:
        """Scores of an arm that takes the predictions of `source`."""
        val, test = (self.scores(arm.name, side, side, source, post) for side in ("val", "test"))
        return ArmResult(val, test, source, post)

    def at_recall_of(self, control: str, rl_arm: str, rl_result: ArmResult) -> tuple[Evaluation, CurvePoint]:
        """C1 or C3 where its validation recall is that of an RL arm: test scores, and the point chosen.

        The control gets the arm's post-processing, so that none of it is taken for what was learned.
        """
        source = EQUAL_RECALL[control]
        recall = rl_result.val.summary["metrics"]["recall"]["patient_mean"]
        point = self.curve(source, rl_result.post).at_recall(recall)
        name = f"test_at_recall_of_{rl_arm}"
        post = replace(rl_result.post, threshold=point.threshold)
        return self.scores(control, name, "test", source, post), point

    def scores(self, arm: str, name: str, side: str, source: str, post: PostProcessing) -> Evaluation:
        """Scores on one side, read from ARM/NAME.json where they are there and still hold."""
        folder = self.folder_of(arm)
        extra = self._origin(source) | {"source": source, "side": side} | vars(post)
        path = folder / f"{name}.json"
        if path.is_file() and read_extra(path) == extra:
            return read_evaluation(path)
        images = dict(zip((s.key for s in self.samples[side]), self.images(source, side), strict=True))
        evaluation = score_images(self.samples[side], images, post)
        write_evaluation(folder, name, evaluation, extra)
        return evaluation

    def grid(self, source: str) -> PostProcessingGrid:
        """Validation rewards by post-processing of one source."""
        path, origin = self.folder_of(source) / "grid.json", self._origin(source)
        stored = _stored(path, origin)
        if stored is not None:
            return PostProcessingGrid.from_json(stored)
        grid = score_postprocessing(self.images(source, "val"), REWARD)
        write_json(path, {"origin": origin} | grid.to_json())
        return grid

    def curve(self, source: str, post: PostProcessing) -> ThresholdCurve:
        """Validation recall and precision of one source by threshold, otherwise post-processed as given."""
        images = self.images(source, "val")
        counted = [counts_by_threshold(known_probabilities(one), one.truth, post) for one in images]
        return threshold_curve(counted, [image.patient for image in images])

    def test_curve(self, source: str) -> dict[str, list[float]]:
        """Test means over patients by threshold, for the figure; lists beside `thresholds`."""
        path, origin = self.folder_of(source) / "test_curve.json", self._origin(source)
        stored = _stored(path, origin)
        if stored is not None:
            return stored
        images = self.images(source, "test")
        curve: dict[str, list[float]] = {"thresholds": list(THRESHOLDS)}
        for threshold in THRESHOLDS:
            rows = [
                score_mask(
                    replace(FIXED_POST, threshold=threshold).mask(known_probabilities(i)),
                    i.truth,
                    known_truth(i.truth).topology,
                )
                for i in images
            ]
            for metric in CURVE_METRICS:
                means = patient_means([row[metric] for row in rows], [image.patient for image in images])
                curve.setdefault(metric, []).append(float(np.mean([*means.values()])))
        write_json(path, {"origin": origin} | curve)
        return curve

    def images(self, source: str, side: str) -> list[PredictedImage]:
        """Probabilities, truth and patient of the images of one side; each is predicted once and kept."""
        folder = self.folder_of(source) / "probabilities"
        samples = self.samples[side]
        paths = [folder / f"{side}_{sample.key}.npy" for sample in samples]
        if not all(path.is_file() for path in paths):
            logger.info("%s: predicting %d %s images", self.folder_of(source).name, len(samples), side)
            predict = self._predictor(source)
            folder.mkdir(parents=True, exist_ok=True)
            for sample, path in zip(samples, paths, strict=True):
                _save(path, predict(load_image(sample)))
        return [
            PredictedImage(_load(path), self.truths[s.key], s.patient)
            for s, path in zip(samples, paths, strict=True)
        ]

    def _origin(self, source: str) -> dict[str, Any]:
        """What a stored result belongs to: the run, and the definitions of its numbers."""
        run = self.run_of(source)
        return {
            "run": None if run is None else run.name,
            "metric_spec": METRIC_SPEC,
            "reward_spec": describe_reward(REWARD),
            "fixed_post": asdict(FIXED_POST),
            "grid": [list(values) for values in (THRESHOLDS, SIZES_PX, GAP_LEVELS)],
        }

    def _predictor(self, source: str) -> Predict:
        if BY_NAME[source].settings is None:
            return make_predictor(EvaluationPlan(), self.base_settings.to_dict())
        return load_predictor(self.run_of(source))


def load_predictor(run: Path) -> Predict:
    """The best model of a finished run, adapter or control, as a function of an image."""
    from vesselrl.training.control_models import load_control

    control = load_control(run)
    if control is not None:
        return control.predict
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["args"]
    return make_predictor(EvaluationPlan(lora_weights=str(run)), settings)


def score_images(
    samples: Sequence[Sample], images: dict[str, PredictedImage], post: PostProcessing
) -> Evaluation:
    """Scores post-processed predictions by the usual evaluation, with two more columns.

    `topology_score`, in [0, 1]: clDice times the agreement of pieces, junctions and ends, as the reward pays.
    `length_error`: |length ratio - 1|, nan where the ratio is undefined.
    """

    def mask(sample: Sample) -> np.ndarray | None:
        image = images[sample.key]
        return None if image.probabilities is None else post.mask(image.probabilities)

    scored = evaluate_masks(samples, mask, lambda sample: images[sample.key].truth, REWARD)
    rows = []
    for row, sample in zip(scored.rows, samples, strict=True):
        image = images[sample.key]
        used = post.mask(known_probabilities(image))
        structure = STRUCTURE(used, image.truth, known_truth(image.truth).topology)[0]
        rows.append(row | {"topology_score": structure / 5, "length_error": abs(row["length_ratio"] - 1)})
    return summarise(rows, scored.metric_spec, scored.reward_spec)


def choose_source(arm: Arm, scorers: Sequence[ArmScorer], there: Sequence[str]) -> str:
    """Whose predictions an arm takes: those of highest tuned validation reward, as a mean over seeds."""
    candidates = [source for source in arm.sources if source in there]

    def reward(source: str) -> float:
        return float(np.mean([best_post(arm, scorer.grid(source))[1] for scorer in scorers]))

    return candidates[0] if len(candidates) == 1 else max(candidates, key=reward)


def choose_post(arm: Arm, scorer: ArmScorer, source: str) -> PostProcessing:
    """The post-processing of an arm for one seed, chosen on validation where it is tuned."""
    if arm.post == "raw":
        return PostProcessing()
    if arm.post == "fixed":
        return FIXED_POST
    return best_post(arm, scorer.grid(source))[0]


def best_post(arm: Arm, grid: PostProcessingGrid) -> tuple[PostProcessing, float]:
    """What is best on validation of what the arm may tune, and its reward there."""
    if arm.post == "tuned":
        return grid.best()
    return grid.best(FIXED_POST.min_component_px, FIXED_POST.close_gaps)


def _stored(path: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The content of a file of this module without its origin; None if it is missing or of another one."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if content.pop("origin", None) == origin else None


def _save(path: Path, prediction: Any) -> None:
    """Probabilities as float16; a failed prediction is a file without pixels."""
    values = np.zeros((0, 0)) if prediction is None else prediction.probabilities
    partial = path.with_suffix(".partial.npy")
    np.save(partial, values.astype(np.float16), allow_pickle=False)
    partial.replace(path)


def _load(path: Path) -> np.ndarray | None:
    values = np.load(path, allow_pickle=False)
    return values if values.size else None
