"""Scores of every method of the learning benchmark; all that is chosen is chosen on validation images."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.trainings import FIXED_POST, METHODS, last_run
from vesselrl.data.samples import load_fov, load_image, load_mask
from vesselrl.data.splits import Split
from vesselrl.evaluation import tuning
from vesselrl.evaluation.evaluate import describe_reward, score_rows
from vesselrl.evaluation.results import Evaluation, summarise, write_evaluation
from vesselrl.experiment.run_folder import atomic_write, run_settings
from vesselrl.inference.predictor import Predictor
from vesselrl.scoring.overlap import METRIC_SPEC
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward
from vesselrl.scoring.scores import cached_truth
from vesselrl.training.baselines import load_control

logger = logging.getLogger(__name__)

# For all choices on validation and in the report: the default reward, whatever a method was trained with.
REWARD = MultiObjectiveReward()
# Pays for structure alone: 5 times the topology score.
NOTHING_ELSE = dict.fromkeys(("dice_weight", "recall_weight", "length_weight", "precision_weight"), 0)
STRUCTURE = MultiObjectiveReward(topology_weight=1, **NOTHING_ELSE)


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
        self.folder, self.seed = folder, seed
        self.truths = {sample.key: load_mask(sample) for sample in (*split.val, *split.test)}
        self.grids: dict[str, dict[PostProcessing, float]] = {}  # validation rewards by source

    def place(self, method: str) -> Path:
        """The folder of a method with this seed."""
        return self.folder / f"{method}_seed{self.seed}"

    def result(self, method: str, source: str) -> MethodResult:
        """Scores of a method that takes the predictions of `source`, tuned on validation as it may be."""
        post = {"raw": THRESHOLD_ONLY, "fixed": FIXED_POST}.get(METHODS[method].post)
        post = post or self.best(method, source)[0]
        val, test = (self.scores(method, subset, subset, source, post) for subset in ("val", "test"))
        return MethodResult(val, test, source, post)

    def best(self, method: str, source: str) -> tuple[PostProcessing, float]:
        """The best on validation of what the method may tune, and its reward there."""
        if source not in self.grids:
            self.grids[source] = tuning.score_postprocessing(self.images(source, "val"), REWARD)
        is_tuned = METHODS[method].post == "tuned"
        grid = self.grids[source].items()
        fit = {post: r for post, r in grid if is_tuned or replace(post, threshold=0.5) == FIXED_POST}
        post = tuning.best_postprocessing(fit)
        return post, fit[post]

    def at_recall_of(self, control: str, rl: str, result: MethodResult) -> tuple[Evaluation, float]:
        """Test scores of C1 or C3 at the validation recall of an RL method, and the gap left between the two.

        The control gets the RL method's post-processing, so that none of it is taken for learned.
        """
        source, recall = METHODS[control].sources[0], patient_mean(result.val, "recall")
        images = self.images(source, "val")
        counted = [tuning.counts_by_threshold(image.filled, image.truth, result.post) for image in images]
        curve = tuning.threshold_curve(counted, [image.patient for image in images])
        point = min(curve.points, key=lambda one: (abs(one.recall - recall), -one.precision))
        post = replace(result.post, threshold=point.threshold)
        return self.scores(control, f"test_at_recall_of_{rl}", "test", source, post), recall - point.recall

    def scores(self, method: str, name: str, subset: str, source: str, post: PostProcessing) -> Evaluation:
        """Scores on one subset, also written to METHOD/NAME.json.

        `topology_score`, in [0, 1]: clDice times the agreement of components, junctions and ends, as the
        reward pays. `length_error`: |length ratio − 1|, nan where the ratio is undefined.
        """
        pairs = [(post.mask(image.filled), image.truth) for image in self.images(source, subset)]
        rows = score_rows(self.samples[subset], pairs, REWARD)
        for row, (mask, truth) in zip(rows, pairs, strict=True):
            row["topology_score"] = STRUCTURE(mask, truth, cached_truth(truth).topology)[0] / 5
            row["length_error"] = abs(row["length_ratio"] - 1)
        evaluation = summarise(rows, METRIC_SPEC, describe_reward(REWARD))
        write_evaluation(self.place(method), name, evaluation, {"source": source} | vars(post))
        return evaluation

    def images(self, source: str, subset: str) -> list[tuning.PredictedImage]:
        """Probabilities, truth and patient of the images of one subset; each is predicted once and kept."""
        folder, samples = self.place(source) / "probabilities_in_view", self.samples[subset]
        paths = [folder / f"{subset}_{sample.key}.npy" for sample in samples]
        if not all(path.is_file() for path in paths):
            logger.info("%s: predicting %d %s images", self.place(source).name, len(samples), subset)
            predict = load_predictor(last_run(self.place(source)))
            for sample, path in zip(samples, paths, strict=True):
                inside = 1 if (fov := load_fov(sample)) is None else fov
                values = (predict(load_image(sample)).probabilities * inside).astype(np.float16)
                with atomic_write(path) as partial, partial.open("wb") as file:
                    np.save(file, values, allow_pickle=False)
        return [
            tuning.PredictedImage(np.load(path, allow_pickle=False), self.truths[s.key], s.patient)
            for s, path in zip(samples, paths, strict=True)
        ]


def load_predictor(run: Path | None) -> Callable[[np.ndarray], Any]:
    """The best model of a finished run, adapter or control, as a function of an image; else the base."""
    control = run and load_control(run)
    return (control or Predictor.from_pretrained(run_settings(run).get("model_path"), run)).predict


def patient_mean(evaluation: Evaluation, metric: str) -> float:
    """The mean over patients of one score."""
    return evaluation.summary["metrics"][metric]["patient_mean"]
