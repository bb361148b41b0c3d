"""Files, the before/after table by hand, what may not be compared, and caveats."""

import csv
import json
import math
from dataclasses import replace

import pytest

from vesselrl.evaluation import results
from vesselrl.evaluation.results import Caveat, before_after_table, read_evaluation


def test_written_json_is_strict_and_reads_back(made, tmp_path):
    evaluation = made([0.5, 0.6, 0.7], recall=[0.4, math.nan, 0.8], failed=[1], reward_spec={"class": "R"})
    evaluation.caveats[Caveat.PRETRAINING_OVERLAP] = Caveat.PRETRAINING_OVERLAP.text(seen=1, total=3)
    evaluation.caveats[Caveat.NEAR_DUPLICATES] = "NEAR DUPLICATES: alike."
    evaluation.caveats[Caveat.OTHER] = "SOMETHING NEW: of a later version."
    path = results.write_evaluation(tmp_path / "run", "test_after", evaluation, {"threshold": math.nan})
    document = json.loads(path.read_text(), parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    assert document["rows"][1]["recall"] is document["sequences"]["P002_S1"]["recall"] is None
    assert document["extra"] == {"threshold": None}
    assert document["patients"]["P003"] == {"dice": 0.7, "recall": 0.8}
    assert str(read_evaluation(path)) == str(evaluation)
    with path.with_suffix(".csv").open() as file:
        table = [(row["recall"], row["failed"]) for row in csv.DictReader(file)]
    assert table == [("0.4", "False"), ("", "True"), ("0.8", "False")]
    relabelled = [{**row, "truth_hash": "x"} for row in document["rows"]]
    for change, message in (
        ({"format": "other"}, "its format is 'other'"),
        ({"rows": []}, "rows is missing"),
        ({"rows": document["rows"][:1]}, "do not match its image_list_hash"),
        ({"rows": relabelled}, "do not match its label_hash"),
        ({"rows": [3]}, r"test_after\.json is damaged.*AttributeError"),
        (None, r"test_after\.json is not valid JSON"),
    ):
        path.write_text("{" if change is None else json.dumps(document | change))
        with pytest.raises(ValueError, match=message):
            read_evaluation(path)


def test_before_after_table_by_hand(made):
    before = made([0.70, 0.72, 0.60, 0.80], beta0_error=[5, 9, 4, 7], length_ratio=[0.6, 0.7, 0.8, 0.9])
    after = made([0.75, 0.78, 0.64, 0.87], beta0_error=[3, 4, 2, 3], length_ratio=[0.9, 0.95, 1.1, 1.3])
    dice, beta0, length = before_after_table(before, after)
    assert [line["verdict"] for line in (dice, beta0, length)] == ["better", "better", "changed"]
    assert (dice["before"], dice["after"], dice["difference"]) == pytest.approx((0.705, 0.76, 0.055))
    assert 0 < dice["low"] < 0.055 < dice["high"]
    assert beta0["difference"] == pytest.approx(-3.25)
    assert before_after_table(after, before, ["dice"])[0]["verdict"] == "worse"
    assert before_after_table(made([0.7] * 4), made([0.9, 0.6, 0.75, 0.65]))[0]["verdict"] == ""
    # An image undefined in one counts in neither, so that the difference adds up.
    before = made([0.5] * 4, recall=[0.1, math.nan, 0.3, 0.4])
    (line,) = before_after_table(before, made([0.5] * 4, recall=[0.2, 0.9, 0.5, 0.9]), ["recall"])
    assert line["after"] - line["before"] == pytest.approx(line["difference"])
    assert (line["before"], line["n_undefined"]) == (pytest.approx(0.8 / 3), 1)


def test_images_are_paired_by_key_and_rewards_that_differ_are_left_out(made):
    before = made([0.5, 0.6, 0.7], reward=[1, 2, 3], custom_score=[1, 2, 3], reward_spec={"class": "A"})
    after = made([0.6, 0.8, 0.9], reward=[2, 3, 5], custom_score=[2, 3, 5], reward_spec={"class": "A"})
    lines = before_after_table(before, replace(after, rows=after.rows[::-1]))
    assert [line["difference"] for line in lines] == pytest.approx([0.5 / 3, 4 / 3, 4 / 3])
    other = replace(after, reward_spec={"class": "B"})
    assert [line["metric"] for line in before_after_table(before, other)] == ["dice"]
    assert before_after_table(before, other, ["reward", "recall"]) == []
    moved = replace(after, rows=tuple({**row, "patient": "P9"} for row in after.rows))
    for other, message in (
        (moved, "P001_S1_F0000 belongs to P001 before and P9 after"),
        (made([0.5, 0.6]), r"images differ: 1 only in before \(P003_S1_F0002\)"),
    ):
        with pytest.raises(ValueError, match=message):
            before_after_table(before, other)
    with pytest.raises(ValueError, match="P1_S1_F0000 occurs twice"):
        results.summarise([row | {"key": "P1_S1_F0000"} for row in before.rows], {})
