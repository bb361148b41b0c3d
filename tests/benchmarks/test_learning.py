"""The learning benchmark with pretended trainings: it resumes, test chooses nothing, and verdicts by hand."""

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from benchmarks import scores, trainings
from benchmarks.few_images import few_images
from benchmarks.learning import COMPARED, compare, decide, judge, learning, pooled
from benchmarks.scores import MethodResult
from benchmarks.trainings import FIXED_POST, METHODS, SUITES, Suite
from tests.data.test_formats import write_image, write_mask
from vesselrl.data.samples import find_samples
from vesselrl.data.splits import read_split
from vesselrl.errors import RunError
from vesselrl.evaluation.results import Evaluation, read_evaluation, summarise, verdict
from vesselrl.evaluation.words import metric_name
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import CONFIG_FILE
from vesselrl.training.checkpoint import STATE_FILE

# Strength of the noise through which a method sees; RL is made the best, so that a hypothesis can hold.
NOISE = {"base": 3.6, "sft": 3.6, "sft_cldice": 3.7, "unet": 4.0, "frangi": 5.0, "rl": 0.7, "sft_rl": 0.8}
NOISE |= {"sft_scnp": 3.8, "sft_skeleton_recall": 3.9, "unet_pretrained": 3.7}
NOISE |= {"sft_detail": 3.6, "sft_detail_scnp": 3.8, "sft_detail_skeleton_recall": 3.9, "sft_rl_detail": 0.7}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """8 train_* and 6 test_* images of drawn crosses, dark on bright; their right end is out of view."""
    root, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    for number, half in enumerate(["train"] * 8 + ["test"] * 6, start=1):
        mask, name = np.zeros((48, 48), bool), f"{half}_{number:03d}.png"
        row, column = rng.integers(8, 36, 2)
        mask[row : row + 3, 3:45] = mask[4:44, column : column + 3] = True
        grey = np.where(mask, 70, 160) + rng.integers(-20, 20, mask.shape)
        write_image(root / "images" / name, grey.astype(np.uint8))
        write_mask(root / "masks" / name, mask)
        write_mask(root / "fov" / name, np.zeros((48, 1)) + np.arange(48) < 44)
    return root


def load_predictor(run: Path | None):
    """In place of a model: it knows dark pixels, through smooth noise."""
    method, _, seed = ("base", "", 1) if run is None else run.parent.name.rpartition("_seed")

    def predict(image: np.ndarray) -> SimpleNamespace:
        field = np.random.default_rng([int(seed), int(image.sum())]).normal(size=image.shape[:2])
        field = ndimage.gaussian_filter(field, 1.0)
        logits = (115 - image[..., 0].astype(float)) / 12 + NOISE[method] * field / field.std()
        logits -= 3.0 * (method == "sft_rl")  # misses vessels, so that its recall is not that of all
        if method.startswith("sft") and "rl" not in method:
            logits[:, 22:26] = -12.0  # blind in the middle, where no closing of gaps mends it
        return SimpleNamespace(probabilities=(1 / (1 + np.exp(-logits))).astype(np.float32))

    return predict


class PretendedTraining:
    """In place of the subprocess: writes the few files of a run that the benchmark reads."""

    def __init__(self) -> None:
        self.trained, self.failing = [], ""  # names of folders; of one whose exit code is 3

    def __call__(self, arguments: list[str], log_file: Path) -> int:
        words, name = dict(zip(arguments[1::2], arguments[2::2], strict=True)), log_file.parent.name
        assert {word[2:] for word in words} <= {"resume_from", *TrainConfig().to_dict()}
        run = Path(words.get("--resume_from", log_file.parent / "sa2va_lora_ppo_20261122_135948"))
        run.mkdir(exist_ok=True)
        self.trained.append((name, "--resume_from" in words))
        log_file.write_text("first line\nthe last words\n")
        if name != self.failing:
            origin = {"git_commit": "0123456789abcdef", "device": "cpu", "cpu_count": 2}
            (run / "training_info.json").write_text(json.dumps({"provenance": origin}))
        return 3 * (name == self.failing)


@pytest.fixture(scope="module")
def training() -> Iterator[PretendedTraining]:
    """The suite `synthetic` has two halves, one file dropped; no training takes place, no model predicts."""
    stand_in = PretendedTraining()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "synthetic", Suite("made synthetic images", 2, 250, {}, 3, ["train_002"]))
        patch.setattr(trainings, "run_command", stand_in)
        patch.setattr(scores, "load_predictor", load_predictor)
        yield stand_in


@pytest.fixture(scope="module")
def done(training, published: Path, tmp_path_factory) -> SimpleNamespace:
    """Two seeds of every method: one training fails in the first call, two seem killed before the second."""
    output, calls = tmp_path_factory.mktemp("output"), []
    options, folder = {"seeds": 2, "output_dir": str(output)}, output / "synthetic"
    options["data_root"] = str(published)
    for training.failing in ("sft_cldice_seed42", ""):
        training.trained = []
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = learning(**options)
        calls.append((code, sorted(training.trained), said.getvalue(), (folder / "report.md").read_text()))
        if training.failing:  # the second one was killed between its first state and its settings
            for seed, file in ((42, CONFIG_FILE), (43, STATE_FILE)):
                (info,) = (folder / f"unet_seed{seed}").glob("*/training_info.json")
                info.rename(info.with_name(file))
    return SimpleNamespace(folder=folder, options=options, calls=calls)


def test_failures_stop_no_other_and_a_second_call_goes_on(done) -> None:
    (code, trained, said, page), second = done.calls
    assert (code, len(trained)) == (1, 2 * sum(method.options is not None for method in METHODS.values()))
    assert re.search(r"Failed: sft_cldice_seed42: exit code 3, see .*train.log \(the last words\)", said)
    assert "Left out: C4 supervised with soft clDice" in page
    assert second[:2] == (0, [("sft_cldice_seed42", False), ("unet_seed42", True), ("unet_seed43", False)])
    assert "Left out" not in second[3]
    # Nothing is removed or compared unasked.
    file = done.folder / "rl_seed43" / "arm.json"
    text = file.read_text()
    file.write_text(text.replace('"kl_coef": 0.01', '"kl_coef": 1.01'))
    with pytest.raises(RunError, match=r"kl_coef 1.01, now 0.01.*Delete that folder"):
        learning(**done.options)
    file.unlink()
    with pytest.raises(RunError, match="is not of this benchmark"):
        learning(**done.options)
    file.write_text(text)


def test_choices_depend_on_validation_truths_alone(done, published, tmp_path: Path) -> None:
    def choices(folder: Path) -> dict[str, tuple]:
        names = ("source", "threshold", "min_component_px", "close_gaps")
        files = folder.glob("*/test*.json")
        return {f"{p.parent.name}/{p.stem}": tuple(map(read_evaluation(p).extra.get, names)) for p in files}

    changed = shutil.copytree(published, tmp_path / "changed")
    for path in sorted((changed / "masks").glob("test_*.png")):
        Image.fromarray(np.asarray(Image.open(path)) & (np.arange(48) % 4 == 0)[:, None]).save(path)
    learning(seeds=1, output_dir=str(tmp_path / "output"), data_root=str(changed))
    one, other = choices(done.folder), choices(tmp_path / "output" / "synthetic")
    assert len(other) == 21 + 2 * 4 + 2  # every method, and C1, C3 or C12 at the recall of RL methods
    assert other.items() <= one.items()


def test_the_report_has_every_method_verdict_and_ledger_row(done, repository: Path) -> None:
    page = done.calls[1][3]
    assert all(f"| {method.label} |" in page for method in METHODS.values())
    assert "2 seeds, 16 image passes" in page  # 4 images x 2 epochs x 2 passes
    verdicts = re.findall("^- (E[23], .*? holds?): ", page, re.M)
    assert len(verdicts) == 6 + 10  # E2 of six RL methods, E3 of four against C1 and C3, of two against C12
    assert verdicts[0] == "E2, PPO, against C7 best of C2 to C4, post-processed: holds"
    assert verdicts[4].startswith("E2, supervised then PPO with detail head, against C12 supervised with")
    assert verdicts[6] == "E3, PPO, against C1 base, tuned threshold at equal recall: holds"
    assert verdicts[-1].startswith(f"E3, {METHODS['sft_rl_detail_post'].label}, against C12 ")
    rows = [*csv.DictReader((done.folder / "ledger_rows.csv").open(encoding="utf-8"))]
    assert ",".join(rows[0]) == (repository / "docs" / "results.csv").read_text("utf-8").partition("\n")[0]
    assert [(row["commit"][:7], row["seeds"]) for row in rows] == [("0123456", "42, 43")] * 7


def test_methods_that_are_not_asked_for_are_left_out(training, published: Path, tmp_path: Path) -> None:
    training.trained, options = [], {"seeds": 1, "output_dir": str(tmp_path), "data_root": str(published)}
    assert learning(methods=("sft_detail_post", "sft_detail", "sft_rl_detail", "sft_post"), **options) == 0
    assert sorted(name for name, _ in training.trained) == ["sft_detail_seed42", "sft_rl_detail_seed42"]
    page = (tmp_path / "synthetic" / "report.md").read_text(encoding="utf-8")
    left_out = re.findall("^Left out: (.*)[.]$", page, re.M)
    kept = {"base", "sft_detail", "sft_detail_post", "sft_rl_detail"}
    assert left_out == [method.label for name, method in METHODS.items() if name not in kept]
    assert [*re.findall("^- (E.)", page, re.M)] == ["E2", "E3"]
    with pytest.raises(ValueError, match="--methods has sft_detial; there are base, base_tuned"):
        learning(methods=("sft_detial",), **options)


def found(**changes: tuple) -> dict[str, dict]:
    """Lines of method minus control, (mean, low, high), that satisfy E2 but for the changes."""
    good = {"dice": (-0.002, -0.0049, 0.001), "beta0": (-20.0, -30.0, -5.0), "reward": (0.2, 0.05, 0.4)}
    good |= {"length_error": (-0.05, -0.09, -0.01)} | changes
    lines = {}
    for name, (mean, low, high) in (dict.fromkeys(COMPARED, (0.0, -0.01, 0.01)) | good).items():
        line = {"metric": name, "difference": mean, "low": low, "high": high, "reason": ""}
        lines[name] = line | {"verdict": verdict(name, mean) if low > 0 or high < 0 else ""}
    return lines


def test_each_condition_turns_e2_over_and_e3_wants_a_gain_at_equal_recall() -> None:
    for gap, name, values, holds in (
        (None, "dice", (0.01, -0.0051, 0.03), False),  # better on average, but not proven non-inferior
        (None, "beta0", (-19.0, -30.0, -10.0), False),  # proven, but less than a fifth
        (None, "beta0", (-40.0, -90.0, 1.0), False),  # large, but not proven
        (None, "length_error", (-0.05, -0.12, 0.001), False),
        (None, "reward", (0.2, -0.001, 0.4), False),
        (None, "reward", (0.2, 0.001, 0.4), True),
        (0.0, "precision", (0.02, -0.01, 0.03), False),
        (0.009, "precision", (0.02, 0.01, 0.03), True),
        (-0.009, "topology_score", (0.02, 0.01, 0.03), True),
        (-0.011, "topology_score", (0.02, 0.01, 0.03), False),
    ):
        result, words = decide(found(**{name: values}), gap)
        assert result == holds, (name, values)
        assert holds or gap is not None or words.startswith(f"does not hold: {metric_name(name)} ")


def made(**columns: list[float]) -> Evaluation:
    """An evaluation of as many patients as there are values, all other scores 1."""
    rows = []
    for place, values in enumerate(zip(*columns.values(), strict=True)):
        row = dict.fromkeys(("key", "patient", "sequence", "truth_hash"), f"P{place}") | {"failed": False}
        row |= dict.fromkeys([*COMPARED, "beta0_error"], 1.0)
        rows.append(row | dict(zip(columns, values, strict=True)))
    return summarise(rows, {"version": 1})


@pytest.mark.parametrize(("tuned", "best"), [(2.0, "sft_tuned"), (1.5, "sft")])
def test_seeds_are_judged_together(tuned: float, best: str) -> None:
    """The control of highest validation reward counts, of equal ones the last; recall gaps do not cancel."""
    rewards = {"sft": (1.0, 3.0), "sft_tuned": (tuned, tuned), "rl": (9.0, 9.0)}
    test = {n: made(precision=[1.2, 1.3, 1.3, 1.2] if n == "rl" else [1.0, 1.1, 1.05, 1.0]) for n in rewards}
    results = {}
    for name, values in rewards.items():
        vals = [made(reward=[value] * 4) for value in values]
        results[name] = [MethodResult(val, test[name], name, FIXED_POST) for val in vals]
    for gap in (0.005, 0.03):
        verdicts = judge(results, {("rl", "base_tuned"): [(test["sft"], gap), (test["sft"], -gap)]})
        assert [*verdicts] == [("E2", "rl", best), ("E3", "rl", "base_tuned")]
        assert verdicts["E3", "rl", "base_tuned"][0] == (gap < 0.01)
    seeds = [made(dice=[0.1, 0.2, 0.4]), made(dice=[0.3, np.nan, 0.4])]
    assert [row["dice"] for row in pooled(seeds).rows] == pytest.approx([0.2, np.nan, 0.4], nan_ok=True)


def test_the_change_of_the_beta0_error_is_that_of_the_means_over_patients() -> None:
    """Means 25 and 15; a draw takes the same patients of both."""
    line = compare(made(beta0_error=[20, 20, 40, 20]), made(beta0_error=[10, 20, 20, 10]))["beta0"]
    # An independent bootstrap of the ratio, widened by t(3) / z * sqrt(4 / 3), as every interval.
    pairs = np.array([(20, 10), (20, 20), (40, 20), (20, 10)], float)
    drawn = np.random.default_rng(1).choice(pairs, (20000, 4)).mean(axis=1)
    limits = -40 + 1.875 * (np.quantile(100 * drawn[:, 1] / drawn[:, 0] - 100, [0.025, 0.975]) + 40)
    assert (line["difference"], line["low"], line["high"]) == pytest.approx((-40, *limits), abs=3)


def test_few_images_are_drawn_alike_for_all_methods_and_differences_are_by_hand(
    training, published: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Pretended masks: whole ones, without the left half of the image, and none."""
    seen, widths = {}, {"sft_detail": 48, "unet_pretrained": 24, "unet": 0}

    def train(arguments: list[str], log_file: Path) -> int:
        words = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        method, _, seed = log_file.parent.name.rpartition("_seed")
        split = read_split(words["--split_file"], find_samples(published))
        assert [words[f"--{name}"] for name in ("num_epochs", "num_passes", "seed")] == ["3", "2", seed]
        seen[method, seed] = [one.key for one in split.train], [one.key for one in split.test]
        (run := log_file.parent / "run").mkdir()
        (run / "training_info.json").write_text("{}")
        return 0

    def load_predictor(run: Path) -> Callable:
        kept = np.arange(48) >= 48 - widths[run.parent.name.rpartition("_seed")[0]]
        return lambda image: SimpleNamespace(probabilities=np.float32((image[:, :, 0] < 115) & kept))

    monkeypatch.setattr(trainings, "run_command", train)
    monkeypatch.setattr(scores, "load_predictor", load_predictor)
    options = {"suite": "synthetic", "num_images": 2, "draws": 3, "passes": 12, "workers": 1}
    options |= {"val_freq": 4, "first_seed": 43, "output_dir": str(tmp_path), "data_root": str(published)}
    assert few_images(**options) == 0
    draws = [{tuple(map(tuple, seen[name, seed])) for name in widths} for seed in ("43", "44", "45")]
    assert [len(draw) for draw in draws] == [1, 1, 1]
    assert draws[0] != draws[1]
    assert {len(train) for draw in draws for train, _ in draw} == {2}
    half = np.mean([2 * mask / (mask + 1) for mask in halves(published)])
    lines = capsys.readouterr().out.splitlines()
    columns = next(line for line in lines if line.startswith("| C10") and "3 of 3" in line).split("|")
    assert float(columns[2].split()[0]) == pytest.approx(1 - half, abs=6e-4)
    assert [*map(float, re.findall(r"[+-][\d.]+", columns[-2]))] == pytest.approx([1 - half] * 3, abs=6e-4)
    first = [line.split("|")[2].split()[0] for line in lines if line.startswith("| C5")]
    assert first == ["0.000", "+1.000", "0.0000"]
    assert any(line.startswith("| C11") and "6.150" in line for line in lines)  # the highest reward
    assert not any(np.load(path)[:, 44:].any() for path in tmp_path.rglob("*.npy"))  # for thresholds
    seen.clear()
    assert few_images(**options) == 0
    assert not seen


def halves(root: Path) -> list[float]:
    """The share of each true test mask in view that lies in the right half of the image."""
    masks = [np.asarray(Image.open(path)) for path in sorted((root / "masks").glob("test_*.png"))]
    return [mask[:, 24:44].sum() / mask[:, :44].sum() for mask in masks]
