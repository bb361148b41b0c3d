"""Evaluating adapters on the held-out subset of their own split, with the run's own settings and tuned."""

import json
import logging
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vesselrl.cli import main
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.data.splits import Split, read_split, split_by_patient, write_split
from vesselrl.errors import CheckpointError, DataError, RunError
from vesselrl.evaluation.held_out import evaluate_held_out
from vesselrl.evaluation.results import Caveat, csv_text, read_evaluation
from vesselrl.experiment.config import get_preset
from vesselrl.experiment.options import Evaluate
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.scoring.overlap import dice
from vesselrl.training.train import train

HELD_OUT = "vesselrl.evaluation.held_out"
STEM = "test_best_lora"


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """A copy of the finished run to write into, without reports, which take longer than all else."""
    monkeypatch.setattr(f"{HELD_OUT}.write_run_report", lambda run: None)
    monkeypatch.setattr(f"{HELD_OUT}.write_evaluation_report", lambda path: (path, path))
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def evaluated(weights, progress=None, **options):
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return evaluate_held_out(Evaluate(**texts), weights and str(weights), progress)


def scores(evaluation):
    return csv_text(evaluation.rows)


def keys(evaluation):
    return {row["key"] for row in evaluation.rows}


def keys_of_test(run):
    return set(json.loads((run / "data_split.json").read_text())["samples"]["test"])


def settings_of(run, **changed):
    """The stored settings of a run, changed in its file if asked for."""
    values = json.loads((run / "config.json").read_text())
    values["args"] |= changed
    values.pop("args_sha256", None)
    (run / "config.json").write_text(json.dumps(values))
    return values["args"]


def extra(path):
    return json.loads(path.read_text())["extra"]


# ---- The numbers are those of the training, on the images that its split says


def test_the_numbers_are_those_of_the_training(run, tiny_checkpoint, angiograms, tmp_path, caplog):
    before, after = (read_evaluation(run / f"test_{name}.json") for name in ("before", "after"))
    assert scores(after) != scores(before)  # else an adapter that is not loaded would pass
    done = evaluated(run)
    assert done.path == run / "evaluation" / "test_best_lora.json"
    assert scores(done.evaluation) == scores(evaluated(run / "best_lora").evaluation) == scores(after)
    assert str(read_evaluation(done.path)) == str(done.evaluation)
    assert extra(done.path)["plan"]["side"] == "test"
    assert done.evaluation.calibration["n_pixels"] == 64 * 64 * len(after.rows)
    last = evaluated(run / "final_lora", split="val")
    assert last.path.name == "val_final_lora.json"
    expected = read_evaluation(run / "val_latest.json").rows
    assert sorted(map(str, last.evaluation.rows)) == sorted(map(str, expected))
    base = evaluated(None, base_model=tiny_checkpoint, data_root=angiograms, output_dir=tmp_path / "base")
    assert base.path == tmp_path / "base" / "test_base.json"
    assert scores(base.evaluation) == scores(before)  # the same seed, 42
    assert "splitting by patient anew (seed 42)" in caplog.text


def test_each_subset_is_that_of_the_run_also_for_a_copy_of_the_data(run, angiograms, tmp_path):
    """A new split of the same data would score training patients as test."""
    other = split_by_patient(find_samples(angiograms), seed=7)
    assert {sample.key for sample in other.test} != keys_of_test(run)  # seed 42
    write_split(run / "data_split.json", other)
    for subset in ("train", "val", "test"):
        found = keys(evaluated(run, split=subset, tune=False).evaluation)
        assert found == {sample.key for sample in getattr(other, subset)}
    assert len(evaluated(run, split="all").evaluation.rows) == 20
    copy = shutil.copytree(angiograms, tmp_path / "moved")
    for root in (copy, f"{angiograms.parent}/./{angiograms.name}"):
        result = evaluated(run, data_root=root, tune=False).evaluation
        assert keys(result) == {sample.key for sample in other.test}
        assert result.caveats == {}
    # Of other data, its own split is not that of these images.
    for folder in ("images", "masks"):
        file = min((copy / folder).iterdir())
        file.rename(file.with_name(file.name.replace("0A1B2C3D", "0A1B2C3E")))
    settings_of(run, data_root=str(copy))
    with pytest.raises(DataError, match=r"data_split\.json"):
        evaluated(run)


def test_where_no_split_tells_who_was_trained_on_the_result_says_so(run, angiograms, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        f"{HELD_OUT}.split_by_patient",
        lambda samples, shares: asked.append(shares) or split_by_patient(samples, shares=shares),
    )
    alone = shutil.copytree(run / "best_lora", tmp_path / "alone" / "best_lora")
    fewer = Path(shutil.copytree(angiograms, tmp_path / "fewer"))
    for folder in ("images", "masks"):
        min((fewer / folder).iterdir()).unlink()
    options = {"base_model": settings_of(run)["model_path"], "tune": False}
    for weights, root in ((alone, angiograms), (run, fewer)):
        done = evaluated(weights, data_root=root, output_dir=tmp_path / "out", **options)
        assert list(done.evaluation.caveats) == [Caveat.UNKNOWN_PATIENTS]
        assert asked[-1].keys() == {sample.key for sample in find_samples(root)}  # split as training does
    options |= {"data_root": angiograms, "output_dir": tmp_path / "b"}
    result = evaluated(alone, split_file=run / "data_split.json", **options).evaluation
    assert (keys(result), result.caveats) == (keys_of_test(run), {})


def test_the_caveats_of_the_run_and_of_the_base_stay_with_its_results(run):
    content = json.loads((run / "data_split.json").read_text())
    (run / "data_split.json").write_text(
        json.dumps(content | {"doubts": ["NEAR DUPLICATES: alike."], "checksum": None})
    )
    caveats = evaluated(run, base_trained_on="all", tune=False).evaluation.caveats
    assert list(caveats) == [Caveat.NEAR_DUPLICATES, Caveat.PRETRAINING_OVERLAP]
    assert caveats[Caveat.NEAR_DUPLICATES] == "NEAR DUPLICATES: alike."


def test_every_output_of_a_leaky_run_says_so(tiny_checkpoint, angiograms, tmp_path, capsys):
    given = ["--model_path", tiny_checkpoint, "--data_root", angiograms, "--output_dir", tmp_path]
    leaky = ["--split_unit", "frame", "--base_trained_on", "all", "--stage", "sft"]
    assert main(["train", "--preset", "debug", *map(str, given), *leaky]) == 0
    (run,) = tmp_path.glob("sa2va_lora_ppo_*")
    for file in ("report.html", "report.md", "test_after.json", "val_best.json"):
        assert "LEAKY: split by frame" in (run / file).read_text()
        assert "IN-SAMPLE BASELINE" in (run / file).read_text()
    capsys.readouterr()
    for arguments in (["evaluate", "--lora_weights", str(run)], ["compare", "--output_dir", str(tmp_path)]):
        assert main(arguments) == 0
        assert "LEAKY" in capsys.readouterr().out
    for path in (run / "test_after.json", run / "evaluation" / f"{STEM}_tuned.json"):
        assert Caveat.PATIENT_LEAKAGE in read_evaluation(path).caveats


@pytest.mark.slow
def test_a_debug_run_can_be_evaluated_again(tmp_path, monkeypatch):
    """Its random model and its synthetic data are nowhere named; both follow from the settings."""
    folder = train(get_preset("debug", output_dir=str(tmp_path / "output"), seed=5), ["vesselrl"]).folder
    files = sorted((tmp_path / "output").iterdir())
    monkeypatch.chdir(tmp_path)
    assert scores(evaluated(folder).evaluation) == scores(read_evaluation(folder / "test_after.json"))
    assert sorted((tmp_path / "output").iterdir()) == files
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


# ---- Masks are made as in the run, or as asked


def test_masks_are_made_as_in_the_run_or_as_asked(run, angiograms, tmp_path, monkeypatch):
    """A predictor with a bar of 0.9 that a faint stretch of 0.3 cuts in two."""
    values = np.full((64, 64), 0.01, np.float32)
    values[30:34, 5:60], values[30:34, 30:35] = 0.9, 0.3
    monkeypatch.setattr(
        Predictor, "predict_batch",
        lambda self, images: [Prediction(self.post.mask(values), values, values) for _ in images],
    )  # fmt: skip

    def pixels(**options):
        return {row["foreground"] * 64**2 for row in evaluated(run, **options).evaluation.rows}

    def predicted_pixels(*options):
        image, base = next((angiograms / "images").iterdir()), settings_of(run)["model_path"]
        arguments = ["--image", str(image), "--lora_weights", str(run), "--base_model", base]
        assert main(["predict", *arguments, "--output_dir", str(tmp_path / "out"), *options]) == 0
        return int((np.asarray(Image.open(next((tmp_path / "out").glob("*_mask.png")))) > 0).sum())

    assert pixels() == {200}
    assert pixels(threshold=0.2) == {220}
    settings_of(run, close_gaps=0.2)
    assert pixels() == {predicted_pixels()} == {220}
    assert pixels(close_gaps=0.0) == {predicted_pixels("--close_gaps", "0")} == {200}
    assert pixels(close_gaps=0.35, min_component_px=150) == {0}  # 100 px on either side
    settings_of(run, min_component_px=10**6)
    assert pixels() == {predicted_pixels()} == {0}
    best = evaluated(run).tuning.curve.best
    assert (best.recall, best.threshold) == (0, 0.5)  # of masks as they are used
    with pytest.raises(ValueError, match="min_component_px is -1"):
        pixels(min_component_px=-1)


def test_reward_and_question_are_those_of_the_run(run, angiograms, tmp_path, monkeypatch):
    base = settings_of(run, reward_type="simple_dice", prompt="Find the coronary tree.")["model_path"]
    asked, load = [], Predictor.from_pretrained
    monkeypatch.setattr(
        Predictor, "from_pretrained",
        lambda *args, **options: asked.append(options["prompt"]) or load(*args, **options),
    )  # fmt: skip
    rows = evaluated(run, tune=False).evaluation.rows
    assert [row["reward"] for row in rows] == pytest.approx([10 * row["dice"] for row in rows])
    arguments = ["predict", "--base_model", base, "--output_dir", str(tmp_path / "out")]
    arguments += ["--image", str(next((angiograms / "images").iterdir()))]
    own, other = ["--lora_weights", str(run)], ["--prompt", "Segment."]
    for options in ([], own, own + other):
        assert main([*arguments, *options]) == 0
    tree = "Find the coronary tree."
    assert asked == [tree, "Please segment the blood vessel.", tree, "Segment."]


# ---- Choices on validation


def test_the_threshold_is_the_best_one_on_validation(run, angiograms, tiny_checkpoint, monkeypatch):
    asked, told, predict = [], [], Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, image: asked.append(1) or predict(self, image))
    result = evaluated(run, lambda done, total: told.append((done, total)))
    counts = json.loads((run / "data_split.json").read_text())["counts"]
    total = counts["test"] + counts["val"]
    assert len(asked) == total
    assert told == [(done, total) for done in range(1, total + 1)]
    files = {path.name for path in (run / "evaluation").glob("*.json")}
    assert files == {f"{STEM}{ending}.json" for ending in ("", "_tuned", "_thresholds")}
    assert str(read_evaluation(result.tuned_path)) == str(result.tuned)  # with its calibration
    curve = json.loads(result.curve_path.read_text())
    chosen = extra(result.tuned_path)["threshold"]
    assert chosen == curve["chosen"] == result.tuning.curve.best.threshold
    assert (curve["side"], extra(result.tuned_path)["chosen_on"]) == ("val", "val")
    again = evaluated(run, threshold=chosen, tune=False, output_dir=run)
    assert scores(again.evaluation) == scores(result.tuned)
    assert "chosen_on" not in extra(again.path)
    assert again.path.name == f"{run.name}_{STEM}.json"
    predictor, each = Predictor.from_pretrained(tiny_checkpoint, run), {}
    for sample in read_split(run / "data_split.json", find_samples(angiograms)).val:
        probabilities, truth = predictor.predict(load_image(sample)).probabilities, load_mask(sample)
        at = [dice(probabilities > np.float32(threshold), truth) for threshold in curve["thresholds"]]
        each.setdefault(sample.patient, []).append(at)
    assert curve["dice"] == pytest.approx(np.mean([np.mean(one, axis=0) for one in each.values()], axis=0))
    assert curve["dice"][curve["thresholds"].index(chosen)] == max(curve["dice"])


def test_post_processing_is_chosen_for_the_reward_on_validation(run, monkeypatch):
    """A false speck of 25 px must go, a true piece of 52 px beyond a gap at 0.07 must stay and be joined."""
    asked = []

    def predict(self, image):
        asked.append(1)
        values = np.where(image.mean(axis=2) < 115, 0.9, 0.0005).astype(np.float32)  # vessels are dark
        values[:, 44:47] = np.minimum(values[:, 44:47], 0.07)
        values[2:7, 2:7] = 0.95
        return Prediction(values > 0.5, values, np.zeros_like(values))

    monkeypatch.setattr(Predictor, "predict", predict)
    result = evaluated(run, tune_post=True)
    assert len(asked) == result.tuning.curve.n_images + len(result.evaluation.rows)
    chosen = {"threshold": 0.5, "min_component_px": 40, "close_gaps": 0.001}  # of equal ones the first
    assert asdict(result.tuning.choices["tuned_post"]) == chosen
    three = (result.evaluation, result.tuned, result.tuned_post)  # a low threshold closes the gap, too
    assert [{row["beta0_error"] for row in one.rows} for one in three] == [{2}, {1}, {0}]
    assert min(row["dice"] for row in result.tuned_post.rows) > 0.99
    assert extra(result.tuned_post_path).items() >= (chosen | {"chosen_on": "val"}).items()
    grid = json.loads((run / "evaluation" / f"{STEM}_post_processing.json").read_text())
    assert (grid["side"], grid["chosen"]) == ("val", chosen)
    assert max(reward for *_, reward in grid["candidates"]) == pytest.approx(grid["reward"])
    again = evaluated(run, output_dir=run, tune=False, **chosen)
    assert scores(again.evaluation) == scores(result.tuned_post)
    with pytest.raises(ValueError, match="leave out --no-tune"):
        evaluated(run, tune=False, tune_post=True)


def test_nothing_is_tuned_but_for_the_test_subset_on_validation(run, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vesselrl")
    chosen = evaluated(run).tuning.curve
    result = evaluated(run, split="val")
    assert result.tuned is result.tuned_path is result.tuning is result.curve_path is None
    assert "No score at a tuned threshold: the subset is val" in caplog.text

    def changed(make):
        def read(path, samples):
            split = read_split(path, samples)
            return Split(*make(split), split.seed)

        monkeypatch.setattr(f"{HELD_OUT}.read_split", read)

    changed(lambda split: (split.test, split.val, split.train))
    assert evaluated(run).tuning.curve == chosen  # other test images take no part
    changed(lambda split: (split.train + split.val, (), split.test))
    assert evaluated(run).tuned is None
    assert "no validation images, and it is never chosen on test" in caplog.text


def test_flips_and_a_second_observer_are_kept_apart(run, angiograms, tmp_path):
    (tmp_path / "second").mkdir()
    for file in (angiograms / "masks").iterdir():
        mask = np.asarray(Image.open(file)).astype(bool)
        Image.fromarray(np.roll(mask, 1, axis=0)).save(tmp_path / "second" / file.name)
    plain = evaluated(run, second_masks=tmp_path / "second")
    assert plain.human_path == run / "evaluation" / "test_human_agreement.json"
    assert plain.human.label_hash == plain.evaluation.label_hash
    truths = {sample.key: load_mask(sample) for sample in find_samples(angiograms)}
    for row in plain.human.rows:
        assert row["dice"] == dice(np.roll(truths[row["key"]], 1, axis=0), truths[row["key"]])
    before = plain.path.read_bytes()
    flipped = evaluated(run, flips=True)
    files = [path.stem for path in (flipped.path, flipped.tuned_path, flipped.curve_path)]
    assert files == [f"{STEM}_flips{ending}" for ending in ("", "_tuned", "_thresholds")]
    assert plain.path.read_bytes() == before
    assert scores(flipped.evaluation) != scores(plain.evaluation)
    assert (extra(flipped.path)["flips"], extra(plain.path)["flips"]) == (True, False)


# ---- Files


def test_results_of_several_models_do_not_replace_each_other(run, angiograms, tmp_path):
    shutil.copytree(run, tmp_path / "second")
    names = [(folder, weights) for folder in (run.name, "second") for weights in ("best_lora", "final_lora")]
    for folder, weights in names:
        evaluated(tmp_path / folder / weights, output_dir=tmp_path / "both", tune=False)
    expected = {f"{folder}_test_{weights}.json" for folder, weights in names}
    assert {path.name for path in (tmp_path / "both").glob("*.json")} == expected
    for name in ("one", "other"):  # adapters without a run
        shutil.copytree(run / "best_lora", tmp_path / name / "best_lora")
    given = {"base_model": settings_of(run)["model_path"], "data_root": angiograms, "tune": False}
    given["output_dir"] = tmp_path / "out"
    path = evaluated(tmp_path / "one" / "best_lora", **given).path
    before = path.read_bytes()
    with pytest.raises(RunError, match="holds the evaluation of another model"):
        evaluated(tmp_path / "other" / "best_lora", **given)
    evaluated(tmp_path / "one" / "best_lora", **given)
    assert path.read_bytes() == before


def test_the_verb_prints_no_person(run, capsys, caplog, monkeypatch):
    monkeypatch.undo()  # with reports
    caplog.set_level(logging.DEBUG, "vesselrl")
    assert main(["evaluate", "--lora_weights", str(run), "--split", "all"]) == 0
    out, err = capsys.readouterr()
    assert "20 images of 10 patients, 0 failed" in out.replace("\n", " ")
    written = "".join(file.read_text() for file in (run / "evaluation").iterdir())
    assert (run / "evaluation" / "all_best_lora.html").is_file()
    assert not re.search(r"ZHANG|123456789\d", out + err + caplog.text + written)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "held-out"}, DataError, "held-out is unknown; choose one of test, val, train, all"),
        ({"threshold": 0.0}, ValueError, "give a probability between 0 and 1"),
        ({"threshold": 50}, ValueError, "give a probability between 0 and 1"),
        ({"second_masks": "nowhere"}, DataError, "There is no folder"),
    ],
)
def test_what_cannot_be_evaluated_is_found_before_anything_is_predicted(
    run, tmp_path, monkeypatch, options, error, message
):
    monkeypatch.setattr(f"{HELD_OUT}.make_predictor", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        evaluated(run, **options)
    assert not (run / "evaluation").exists()
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "nowhere"))):
        evaluated(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == [run.name]  # no synthetic data
    (run / "evaluation").write_text("a file")
    with pytest.raises(RunError, match="evaluation is a file"):
        evaluated(run)
    (run / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        evaluated(run)
