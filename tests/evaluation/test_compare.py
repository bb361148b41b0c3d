"""Comparing finished runs: ranks, paired gains, Holm, the decision, and what may not share a table."""

import math

import pytest

from vesselrl.cli import main
from vesselrl.errors import CompareError
from vesselrl.evaluation.compare import Run, compare_runs, compare_sets, load_runs
from vesselrl.evaluation.results import Caveat, write_evaluation

BASE = [0.70, 0.72, 0.60, 0.80, 0.66]
GOOD = [0.75, 0.78, 0.64, 0.87, 0.70]  # +0.052 on the mean, every patient gains
LUCKY = [0.99, 0.60, 0.75, 0.80, 0.68]  # +0.068 on the mean, one patient alone


def write_run(folder, after, before=None):
    folder.mkdir(parents=True)
    (folder / "training_info.json").write_text("{}")
    for name, evaluation in (("test_after", after), ("test_before", before)):
        if evaluation:
            write_evaluation(folder, name, evaluation)


def order(result):
    return [line["run"] for line in result.lines]


def test_runs_are_found_and_unfinished_or_damaged_ones_named(made, tmp_path):
    write_run(tmp_path / "b", made(GOOD), made(BASE))
    write_run(tmp_path / "deeper" / "a", made(LUCKY))
    write_run(tmp_path / "c", None)
    runs, skipped = load_runs(tmp_path)
    assert [(run.name, run.before is None) for run in runs] == [("b", False), ("a", True)]
    assert "did not finish" in skipped["c"]
    (tmp_path / "b" / "test_after.json").write_text("{")
    with pytest.raises(CompareError, match="Run b cannot be read"):
        load_runs(tmp_path)


def test_higher_score_without_proof_is_not_deployed(made):
    runs = [Run("good", made(GOOD), made(BASE)), Run("lucky", made(LUCKY), made(BASE))]
    result = compare_runs(runs)
    assert (order(result), result.deploy) == (["lucky", "good"], "good")
    lucky = compare_runs(runs[1:])
    assert lucky.deploy is None
    assert "no run has a proven gain in dice (lucky: +0.068" in lucky.reason
    (line,) = compare_runs(runs[:1]).lines
    assert (line["dice"], line["dice_gain"]) == (pytest.approx(0.748), pytest.approx(0.052))
    assert line["dice_gain_verdict"] == "better"


def test_the_reason_names_losses(made):
    before, after = made(BASE, beta0_error=[1, 2, 3, 4, 5]), made(GOOD, beta0_error=[3, 5, 5, 6, 6])
    assert "clearly worse are beta0_error +2.000." in compare_runs([Run("a", after, before)]).reason


def test_p_values_are_adjusted_for_the_number_of_runs(made):
    lone = [base + gain for base, gain in zip(BASE, [0.05, 0.06, 0.01, 0.012, 0.06], strict=True)]
    alone = compare_runs([Run("a", made(lone), made(BASE))])
    p = alone.gains["a"]["dice"]["p"]
    assert (alone.deploy, alone.lines[0]["dice_gain_p_adjusted"]) == ("a", p)
    others = [Run(name, made(LUCKY), made(BASE)) for name in "bcd"]
    many = compare_runs([Run("a", made(lone), made(BASE)), *others])
    line = next(line for line in many.lines if line["run"] == "a")
    assert line["dice_gain_p_adjusted"] == pytest.approx(4 * p)
    assert 4 * p > 0.05 > p
    assert line["dice_gain_low"] == alone.lines[0]["dice_gain_low"] > 0  # the interval is not adjusted
    assert (line["dice_gain_verdict"], many.deploy) == ("", None)


def test_what_disqualifies_a_run(made):
    leaky = made(GOOD)
    leaky.caveats[Caveat.PATIENT_LEAKAGE] = Caveat.PATIENT_LEAKAGE.text()
    for after, before, reason in (
        (made(GOOD, failed=[2]), made(BASE), "1 of 5 predictions failed, more than 5%"),
        (made(GOOD[:2]), made(BASE[:2]), "only 2 patients"),
        (leaky, made(BASE), "its split leaks"),
    ):
        result = compare_runs([Run("a", after, before)])
        assert result.deploy is None
        assert reason in result.reason
    assert result.notes[0].startswith("a: LEAKY: split by frame")


def test_human_agreement_is_a_row_that_takes_no_rank(made, tmp_path):
    human = made([0.99] * 5, reward=[9] * 5, reward_spec={"class": "B"})
    write_run(tmp_path / "a", made(GOOD, reward=GOOD, reward_spec={"class": "A"}))
    write_evaluation(tmp_path / "a" / "evaluation", "test_human_agreement", human)
    result = compare_runs(load_runs(tmp_path)[0])
    assert [(line["rank"], line["run"]) for line in result.lines] == [(1, "a"), ("", "human agreement")]
    line = result.lines[1]
    assert (line["dice"], line["dice_gain"], result.deploy) == (pytest.approx(0.99), None, None)
    assert math.isnan(line["reward"])  # another reward
    assert order(compare_runs([Run("a", made(GOOD), human=made(GOOD, truth="redrawn"))])) == ["a"]


def test_mixed_sets_are_refused_by_name(made, tmp_path):
    write_run(tmp_path / "a", made(GOOD))
    assert main(["compare", "--output_dir", str(tmp_path)]) == 0
    for change, message in (
        ({"dice": GOOD[:4]}, r"odd against a: the images differ: 1 only in a \(P005_S1_F0004\)"),
        ({"truth": "redrawn"}, r"odd against a: the true masks of 5 images differ \(P001_S1_F0000, "),
        ({"skeleton": "zhang"}, "skeleton is 'guo_hall' in a, 'zhang' in odd"),
    ):
        odd = made(**{"dice": GOOD} | change)
        with pytest.raises(CompareError, match=message):
            compare_runs([Run("odd", odd), Run("a", made(GOOD)), Run("b", made(BASE))])
        with pytest.raises(CompareError, match="a, before against after: the "):
            compare_runs([Run("a", made(GOOD), odd)])
    write_run(tmp_path / "odd", odd)
    assert main(["compare", "--output_dir", str(tmp_path)]) == 2


def test_every_test_set_has_its_own_table_and_no_run_is_ranked_across(made, tmp_path, capsys):
    """Even where the images of both have the same pseudonyms; the set of most runs comes first."""
    write_run(tmp_path / "a_heart", made([0.99] * 5, truth="heart"), made([0.9] * 5, truth="heart"))
    write_run(tmp_path / "b", made(BASE), made(BASE))
    write_run(tmp_path / "c", made(GOOD), made(BASE))
    first, second = compare_sets(load_runs(tmp_path)[0], baseline="b")
    assert (order(first), order(second)) == (["c", "b"], ["a_heart"])
    assert (first.baseline, second.baseline) == ("b", "the base before training")
    assert first.notes[0].endswith("in a table of their own: a_heart.")
    assert second.notes[0].endswith("in a table of their own: b, c.")
    assert main(["compare", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("# Comparison of experiments") == 2
    files = [tmp_path / "comparison" / name for name in ("comparison.csv", "test_set_2/comparison.csv")]
    assert ["a_heart" in file.read_text() for file in files] == [False, True]
    with pytest.raises(CompareError, match=r"no run 'd' .*, only a_heart, b, c\."):
        compare_sets(load_runs(tmp_path)[0], baseline="d")


def test_different_bases_are_said(made):
    others = [Run("a", made(GOOD), made(BASE)), Run("b", made(GOOD), made(LUCKY)), Run("c", made(GOOD))]
    notes = " ".join(compare_runs(others).notes)
    assert "same base" in notes
    assert "No difference for c" in notes


def test_the_metric_that_ranks(made):
    """The reward only if it means the same; lower is better ranks upward; no direction is refused."""
    columns = {"reward": [1.0, 2.0, 1.5, 3.0, 2.5], "length_ratio": [1] * 5, "beta0_error": [5, 6, 7, 8, 9]}
    higher = columns | {"reward": [2.0, 3.0, 2.5, 4.0, 3.5], "beta0_error": [1, 2, 3, 3, 2]}
    one = Run("one", made(GOOD, reward_spec={"class": "A"}, **columns))
    two = Run("two", made(BASE, reward_spec={"class": "A"}, **higher))
    other = Run("other", made(BASE, reward_spec={"class": "B"}, **columns))
    assert order(compare_runs([one, two])) == ["two", "one"]
    assert order(compare_runs([one, two], baseline="one", rank_by="beta0_error")) == ["two", "one"]
    mixed = compare_runs([one, other])
    assert (order(mixed), mixed.rank_by, "reward" in mixed.metrics) == (["one", "other"], "dice", False)
    for runs, rank_by, message in (
        ([one, other], "reward", "different rewards"),
        ([one, two], "length_ratio", "neither more nor less is better"),
    ):
        with pytest.raises(CompareError, match=message):
            compare_runs(runs, rank_by=rank_by)
