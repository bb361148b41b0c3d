import csv
import logging
import subprocess
import sys

import pytest

from vesselrl.evaluation.compare import CompareError, Run, compare_runs, find_runs, load_runs
from vesselrl.evaluation.report import markdown, write_comparison
from vesselrl.evaluation.results import write_evaluation

BASE = [0.70, 0.72, 0.60, 0.80, 0.66]
GOOD = [0.75, 0.78, 0.64, 0.87, 0.70]  # +0.052 on the mean, every patient gains
LUCKY = [0.99, 0.60, 0.75, 0.80, 0.68]  # +0.068 on the mean, one patient alone


def write_run(root, name, after, before=None):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "training_info.json").write_text("{}")
    if after is not None:
        write_evaluation(folder, "test_after", after)
    if before is not None:
        write_evaluation(folder, "test_before", before)


def test_importing_compare_needs_no_torch():
    code = (
        "import sys, vesselrl.evaluation.compare, vesselrl.evaluation.report\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numba', 'vesselrl.scoring.metrics'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_runs_are_found_and_unfinished_ones_named(made, tmp_path, caplog):
    write_run(tmp_path, "b", made(GOOD), made(BASE))
    write_run(tmp_path / "deeper", "a", made(LUCKY))
    write_run(tmp_path, "c", None)
    (tmp_path / "not_a_run").mkdir()
    folders = find_runs(tmp_path)
    assert [folder.name for folder in folders] == ["b", "c", "a"]
    with caplog.at_level(logging.WARNING):
        runs, skipped = load_runs(folders)
    assert [run.name for run in runs] == ["b", "a"]
    assert runs[1].before is None
    assert "did not finish" in skipped["c"]
    assert "c left out" in caplog.text
    with pytest.raises(CompareError, match="None of the 1 runs has a test result"):
        load_runs([tmp_path / "c"])


def test_no_run_and_damaged_run(made, tmp_path):
    with pytest.raises(CompareError, match="There is no folder"):
        find_runs(tmp_path / "missing")
    with pytest.raises(CompareError, match="No run found"):
        find_runs(tmp_path)
    write_run(tmp_path, "a", made(GOOD))
    (tmp_path / "a" / "test_after.json").write_text("{")
    with pytest.raises(CompareError, match="Run a cannot be read"):
        load_runs(find_runs(tmp_path))


def test_one_run_is_enough(made):
    result = compare_runs([Run("only", made(GOOD), made(BASE))])
    assert result.deploy == "only"
    assert result.rank_by == "dice"
    assert result.lines[0]["dice"] == pytest.approx(0.748)
    assert result.lines[0]["dice_gain"] == pytest.approx(0.052)
    assert result.lines[0]["dice_gain_verdict"] == "better"
    assert result.notes == ()
    assert "Deploy only, because its dice is 0.052 higher than that of the base before training" in markdown(
        result
    )


def test_higher_score_without_proof_is_not_deployed(made):
    runs = [Run("good", made(GOOD), made(BASE)), Run("lucky", made(LUCKY), made(BASE))]
    result = compare_runs(runs)
    assert [line["run"] for line in result.lines] == ["lucky", "good"]
    assert result.deploy == "good"
    assert any("picked on these test images" in note for note in result.notes)
    alone = compare_runs(runs[1:])
    assert alone.deploy is None
    assert "Keep the base before training: no run has a proven gain in dice (lucky: +0.068" in alone.reason


def test_runs_the_data_cannot_tell_apart_are_said_to_be(made):
    near = [0.76, 0.77, 0.66, 0.84, 0.70]
    result = compare_runs([Run("a", made(GOOD), made(BASE)), Run("b", made(near), made(BASE))])
    assert result.deploy == "a"
    assert "cannot tell it from b" in result.reason
    clear = compare_runs(
        [Run("a", made([0.80, 0.84, 0.69, 0.91, 0.77]), made(BASE)), Run("b", made(GOOD), made(BASE))]
    )
    assert clear.deploy == "a"
    assert "cannot tell" not in clear.reason


def test_losses_of_the_winner_are_named(made):
    before = made(BASE, recall=[0.80, 0.82, 0.85, 0.81, 0.86], beta0_error=[1, 2, 3, 4, 5])
    after = made(GOOD, recall=[0.75, 0.76, 0.80, 0.77, 0.79], beta0_error=[3, 5, 5, 6, 6])
    result = compare_runs([Run("a", after, before)])
    assert "clearly worse are recall -0.054, beta0_error +2.000." in result.reason


def test_failed_predictions_disqualify(made):
    result = compare_runs([Run("a", made(GOOD, failed=[2]), made(BASE))])
    assert result.deploy is None
    assert "1 of 5 predictions failed, more than 5%" in result.reason


def test_too_few_patients_give_no_decision(made):
    result = compare_runs([Run("a", made(GOOD[:2]), made(BASE[:2]))])
    assert result.deploy is None
    assert "only 2 patients" in result.reason
    assert "nan" not in markdown(result)


def test_named_baseline(made):
    runs = [Run("a", made(GOOD)), Run("control", made(BASE))]
    result = compare_runs(runs, baseline="control")
    assert result.deploy == "a"
    assert list(result.gains) == ["a"]
    assert compare_runs(runs[1:], baseline="control").deploy is None
    assert compare_runs(runs).deploy is None
    with pytest.raises(CompareError, match="There is no run 'x'"):
        compare_runs(runs, baseline="x")


def test_reward_ranks_only_if_it_means_the_same(made):
    reward = [1.0, 2.0, 1.5, 3.0, 2.5]
    one = Run("one", made(GOOD, reward=reward, reward_spec={"class": "A"}))
    two = Run("two", made(BASE, reward=[x + 1 for x in reward], reward_spec={"class": "A"}))
    assert [line["run"] for line in compare_runs([one, two]).lines] == ["two", "one"]
    assert [line["run"] for line in compare_runs([one, two], rank_by="dice").lines] == ["one", "two"]
    other = Run("other", made(BASE, reward=reward, reward_spec={"class": "B"}))
    mixed = compare_runs([one, other])
    assert mixed.rank_by == "dice"
    assert "reward" not in mixed.metrics
    with pytest.raises(CompareError, match="different rewards"):
        compare_runs([one, other], rank_by="reward")


def test_a_base_scored_by_another_reward_gives_no_gain_in_reward(made):
    after = made(GOOD, reward=GOOD, reward_spec={"class": "A"})
    before = made(BASE, reward=BASE, reward_spec={"class": "B"})
    result = compare_runs([Run("a", after, before)])
    assert [line["metric"] for line in result.gains["a"]] == ["dice"]
    assert result.deploy is None


def test_lower_is_better_ranks_upward_and_no_direction_is_refused(made):
    columns = {"beta0_error": [5, 6, 7, 8, 9], "length_ratio": [1] * 5}
    many = Run("many", made(GOOD, **columns))
    few = Run("few", made(BASE, **columns | {"beta0_error": [1, 2, 3, 3, 2]}))
    result = compare_runs([many, few], baseline="many", rank_by="beta0_error")
    assert [line["run"] for line in result.lines] == ["few", "many"]
    assert result.deploy == "few"
    with pytest.raises(CompareError, match="neither better nor worse"):
        compare_runs([many, few], rank_by="length_ratio")
    with pytest.raises(CompareError, match="no such score"):
        compare_runs([many, few], rank_by="auc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dice": GOOD[:4]}, r"odd against a: the images differ: 1 only in a \(P005_S1_F0004\)"),
        ({"truth": "redrawn"}, r"odd against a: the true masks of 5 images differ \(P001_S1_F0000, "),
        ({"spec": {"version": 1, "skeleton": "zhang"}}, "skeleton is 'guo_hall' in a, 'zhang' in odd"),
    ],
)
def test_mixed_sets_are_refused_by_name(made, change, message):
    odd = Run("odd", made(**{"dice": GOOD} | change))
    with pytest.raises(CompareError, match=message):
        compare_runs([odd, Run("a", made(GOOD)), Run("b", made(BASE))])


def test_before_of_another_set_is_refused(made):
    with pytest.raises(CompareError, match="a, before against after: the true masks"):
        compare_runs([Run("a", made(GOOD), made(BASE, truth="old"))])


def test_different_bases_are_noted(made):
    runs = [Run("a", made(GOOD), made(BASE)), Run("b", made(GOOD), made([x - 0.1 for x in BASE]))]
    assert any("same base" in note for note in compare_runs(runs).notes)
    runs = [Run("a", made(GOOD), made(BASE)), Run("b", made(GOOD))]
    assert any("No difference for b" in note for note in compare_runs(runs).notes)


def test_files(made, tmp_path):
    runs = [Run("good", made(GOOD), made(BASE)), Run("lucky", made(LUCKY))]
    result = compare_runs(runs, skipped={"half": "no test_after.json"})
    markdown_path, csv_path = write_comparison(tmp_path, result)
    text = markdown_path.read_text()
    assert "5 test images of 5 patients" in text
    assert "- Left out: half: no test_after.json." in text
    assert "| good | +0.052 (" in text
    with csv_path.open() as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table] == ["lucky", "good"]
    assert float(table[1]["dice_gain_low"]) > 0
    assert table[0]["dice_gain"] == ""
