"""Scores of every method of the learning benchmark, from one prediction of each image by each trained model.

Whatever is chosen (post-processing, source) is chosen on validation images. Files in the folder of a method
and a seed are used again if they belong to the same run and the same definitions:
probabilities/SUBSET_KEY.npy (float16), grid.json (validation reward by post-processing), val.json and
test.json (scores as chosen), test_at_recall_of_RL.json (C1 and C3 at an RL method's validation recall) and
test_curve.json (by threshold, for the figure).
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.methods import EQUAL_RECALL, FIXED_POST, METHODS, Method
from benchmarks.trainings import finished_run
from vesselrl.data.samples import Sample, load_image, load_mask
from vesselrl.data.splits import Split
from vesselrl.evaluation.evaluate import describe_reward, score_rows
from vesselrl.evaluation.results import Evaluation, read_evaluation, read_extra, summarise, write_evaluation
from vesselrl.evaluation.statistics import patient_means
from vesselrl.evaluation.tuning import (
    GAP_LEVELS,
    GRID_THRESHOLDS,
    SIZES_PX,
    CurvePoint,
    PostProcessingGrid,
    PredictedImage,
    counts_by_threshold,
    score_postprocessing,
    threshold_curve,
)
from vesselrl.experiment.run_folder import atomic_write, run_settings, write_json
from vesselrl.inference.predictor import Predictor
from vesselrl.scoring.overlap import METRIC_SPEC
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward
from vesselrl.scoring.scores import cached_truth, score_mask
from vesselrl.training.baselines import load_control

logger = logging.getLogger(__name__)

# For all choices on validation and in the report: the default reward, whatever a method was trained with.
REWARD = MultiObjectiveReward()
# Pays for structure alone: 5 times the topology score.
STRUCTURE = MultiObjectiveReward(
    dice_weight=0, recall_weight=0, topology_weight=1, length_weight=0, precision_weight=0
)
CURVE_METRICS = ("dice", "recall", "precision", "beta0_error")


class MethodResult(NamedTuple):
    """One method with one seed: scores on both subsets, and how its masks were made."""

    val: Evaluation
    test: Evaluation
    source: str
    post: PostProcessing


class Scorer:
    """Predicts, chooses and scores for one seed; `folder` has a folder METHOD_seedS for each method."""

    def __init__(self, split: Split, folder: Path, seed: int) -> None:
        self.samples = {"val": split.val, "test": split.test}
        self.folder = folder
        self.seed = seed
        self.truths = {sample.key: load_mask(sample) for subset in self.samples.values() for sample in subset}

    def place(self, method: str) -> Path:
        """The folder of a method with this seed."""
        return self.folder / f"{method}_seed{self.seed}"

    def result(self, method: str, source: str) -> MethodResult:
        """Scores of a method that takes the predictions of `source`, tuned on validation as it may be."""
        kind = METHODS[method].post
        fixed = {"raw": PostProcessing(), "fixed": FIXED_POST}.get(kind)
        post = fixed or best_post(METHODS[method], self.grid(source))[0]
        val, test = (self.scores(method, subset, subset, source, post) for subset in ("val", "test"))
        return MethodResult(val, test, source, post)

    def at_recall_of(self, control: str, rl: str, result: MethodResult) -> tuple[Evaluation, CurvePoint]:
        """C1 or C3 at the validation recall of an RL method: test scores, and the point of its curve.

        The control gets the RL method's post-processing, so that none of it is taken for learned.
        """
        source, images = EQUAL_RECALL[control], self.images(EQUAL_RECALL[control], "val")
        counted = [counts_by_threshold(image.filled, image.truth, result.post) for image in images]
        curve = threshold_curve(counted, [image.patient for image in images])
        point = curve.at_recall(result.val.summary["metrics"]["recall"]["patient_mean"])
        post = replace(result.post, threshold=point.threshold)
        return self.scores(control, f"test_at_recall_of_{rl}", "test", source, post), point

    def scores(self, method: str, name: str, subset: str, source: str, post: PostProcessing) -> Evaluation:
        """Scores on one subset, read from METHOD/NAME.json where they are there and still hold."""
        folder = self.place(method)
        extra = self._origin(source) | {"source": source, "side": subset} | vars(post)
        path = folder / f"{name}.json"
        if path.is_file() and read_extra(path) == extra:
            return read_evaluation(path)
        evaluation = score_images(self.samples[subset], self.images(source, subset), post)
        write_evaluation(folder, name, evaluation, extra)
        return evaluation

    def grid(self, source: str) -> PostProcessingGrid:
        """Validation rewards by post-processing of one source."""
        stored = self._stored(
            source, "grid.json", lambda: score_postprocessing(self.images(source, "val"), REWARD).to_json()
        )
        return PostProcessingGrid.from_json(stored)

    def test_curve(self, source: str) -> dict[str, list[float]]:
        """Test means over patients by threshold, for the figure; lists beside `thresholds`."""

        def compute() -> dict[str, list[float]]:
            images = self.images(source, "test")
            curve: dict[str, list[float]] = {"thresholds": list(GRID_THRESHOLDS)}
            for threshold in GRID_THRESHOLDS:
                post = replace(FIXED_POST, threshold=threshold)
                rows = [
                    score_mask(post.mask(i.filled), i.truth, cached_truth(i.truth).topology) for i in images
                ]
                for metric in CURVE_METRICS:
                    means = patient_means([row[metric] for row in rows], [image.patient for image in images])
                    curve.setdefault(metric, []).append(float(np.mean([*means.values()])))
            return curve

        return self._stored(source, "test_curve.json", compute)

    def images(self, source: str, subset: str) -> list[PredictedImage]:
        """Probabilities, truth and patient of the images of one subset; each is predicted once and kept."""
        folder, samples = self.place(source) / "probabilities", self.samples[subset]
        paths = [folder / f"{subset}_{sample.key}.npy" for sample in samples]
        if not all(path.is_file() for path in paths):
            logger.info("%s: predicting %d %s images", self.place(source).name, len(samples), subset)
            predict = load_predictor(finished_run(self.place(source)))
            for sample, path in zip(samples, paths, strict=True):
                values = predict(load_image(sample)).probabilities.astype(np.float16)
                with atomic_write(path) as partial, partial.open("wb") as file:
                    np.save(file, values, allow_pickle=False)
        return [
            PredictedImage(np.load(path, allow_pickle=False), self.truths[sample.key], sample.patient)
            for sample, path in zip(samples, paths, strict=True)
        ]

    def _stored(self, source: str, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON file of the source, computed anew where it is missing or of another origin."""
        path, origin = self.place(source) / name, self._origin(source)
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("origin", None) == origin:
                return content
        content = compute()
        write_json(path, {"origin": origin} | content)
        return content

    def _origin(self, source: str) -> dict[str, Any]:
        """The run that a stored result belongs to, and the definitions of its numbers."""
        run = finished_run(self.place(source))
        return {
            "run": None if run is None else run.name,
            "metric_spec": METRIC_SPEC,
            "reward_spec": describe_reward(REWARD),
            "fixed_post": asdict(FIXED_POST),
            "grid": [list(values) for values in (GRID_THRESHOLDS, SIZES_PX, GAP_LEVELS)],
        }


def load_predictor(run: Path | None) -> Callable[[np.ndarray], Any]:
    """The best model of a finished run, adapter or control, as a function of an image; else the base."""
    if run is not None and (control := load_control(run)):
        return control.predict
    return Predictor.from_pretrained(run_settings(run).get("model_path"), run).predict


def score_images(
    samples: Sequence[Sample], images: Sequence[PredictedImage], post: PostProcessing
) -> Evaluation:
    """Scores post-processed predictions by the usual evaluation, with two more columns.

    `topology_score`, in [0, 1]: clDice times the agreement of components, junctions and ends, as the reward
    pays. `length_error`: |length ratio − 1|, nan where the ratio is undefined.
    """
    pairs = [(post.mask(image.filled), image.truth) for image in images]
    rows = score_rows(samples, pairs, REWARD)
    for row, (mask, truth) in zip(rows, pairs, strict=True):
        row["topology_score"] = STRUCTURE(mask, truth, cached_truth(truth).topology)[0] / 5
        row["length_error"] = abs(row["length_ratio"] - 1)
    return summarise(rows, METRIC_SPEC, describe_reward(REWARD))


def choose_source(method: Method, scorers: Sequence[Scorer], there: Sequence[str]) -> str:
    """Whose predictions a method takes: those of highest tuned validation reward, as a mean over seeds."""
    candidates = [source for source in method.sources if source in there]
    if len(candidates) == 1:
        return candidates[0]
    rewards = {name: [best_post(method, one.grid(name))[1] for one in scorers] for name in candidates}
    return max(candidates, key=lambda name: np.mean(rewards[name]))


def best_post(method: Method, grid: PostProcessingGrid) -> tuple[PostProcessing, float]:
    """The best on validation of what the method may tune, and its reward there."""
    fixed = (FIXED_POST.min_component_px, FIXED_POST.close_gaps)
    return grid.best() if method.post == "tuned" else grid.best(*fixed)
