"""Which cases are shown, and what is stored of them."""

import json

import numpy as np
import pytest
from PIL import Image

from vesselrl.evaluation.cases import Case, choose_cases, read_cases, write_cases


def rows(*scores, patients=None):
    patients = patients or [f"P{number}" for number in range(len(scores))]
    return [
        {"key": f"{patient}_F{number}", "patient": patient, "dice": score}
        for number, (patient, score) in enumerate(zip(patients, scores, strict=True))
    ]


def test_best_median_and_worst_are_chosen_by_dice():
    scores = [0.3, 0.9, 0.5, 0.1, 0.7, 0.8, 0.2, 0.6, 0.4]
    assert choose_cases(rows(*scores), count=1) == {"P1_F1": "best", "P2_F2": "median", "P3_F3": "worst"}
    two = choose_cases(rows(*scores))
    assert list(two.values()) == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
    assert {key for key, rank in two.items() if rank == "best"} == {"P1_F1", "P5_F5"}
    assert {key for key, rank in two.items() if rank == "worst"} == {"P3_F3", "P6_F6"}
    assert "P2_F2" in two


def test_cases_of_a_rank_come_from_different_patients_where_possible():
    patients = ["A", "A", "A", "B", "C", "D", "E", "E", "F"]
    chosen = choose_cases(rows(0.99, 0.98, 0.97, 0.9, 0.8, 0.7, 0.2, 0.1, 0.3, patients=patients))
    assert [key for key, rank in chosen.items() if rank == "best"] == ["A_F0", "B_F3"]
    assert [key for key, rank in chosen.items() if rank == "worst"] == ["E_F7", "F_F8"]
    alone = choose_cases(rows(*np.linspace(0.1, 0.9, 9), patients=["A"] * 9))
    assert len(alone) == 6


@pytest.mark.parametrize("number", range(1, 9))
def test_few_images_are_shown_once_each(number):
    chosen = choose_cases(rows(*np.linspace(0.5, 0.9, number)))
    assert len(chosen) == {1: 1, 2: 2, 3: 3, 4: 3, 5: 3}.get(number, 6)
    if number == 1:
        assert list(chosen.values()) == ["median"]


def test_nothing_to_choose_from_is_an_error():
    with pytest.raises(ValueError, match="Cannot choose 2 cases of 0 images"):
        choose_cases([])
    with pytest.raises(ValueError, match="Cannot choose 0 cases"):
        choose_cases(rows(0.5), count=0)


def case(key="P001_S1_F0001", **changes):
    truth = np.zeros((40, 60), bool)
    truth[19:22, 5:55] = True  # 150 px
    before = truth.copy()
    before[:, 20:30] = False  # 120 px found: Dice 240 / 270
    before[2, 2] = True  # one false piece: Dice 240 / 271
    image = np.full((40, 60, 3), 90, np.uint8)
    return Case(key, image, truth, before, truth, **changes)


def test_cases_are_stored_with_picture_scores_and_topology_errors(tmp_path):
    path = write_cases(tmp_path, [case(rank="best"), case("P002_S1_F0001", rank="worst", dice_after=0.25)])
    assert path == tmp_path / "cases" / "cases.json"
    first, second = read_cases(tmp_path)
    assert first["key"] == "P001_S1_F0001"
    assert (first["rank"], first["side"]) == ("best", "val")
    assert first["before"] == {
        "dice": pytest.approx(240 / 271),
        "failed": False,
        "breaks": 1,
        "false_pieces": 1,
    }
    assert first["after"] == {"dice": 1.0, "failed": False, "breaks": 0, "false_pieces": 0}
    assert second["after"]["dice"] == 0.25
    for stored in (first, second):
        with Image.open(tmp_path / stored["file"]) as picture:
            assert picture.width > 2.5 * picture.height
    assert {file.name for file in path.parent.iterdir()} == {
        "cases.json", "P001_S1_F0001.png", "P002_S1_F0001.png",
    }  # fmt: skip


def test_a_failed_prediction_is_a_case_too(tmp_path):
    plain = case()
    write_cases(tmp_path, [Case(plain.key, plain.image, plain.truth, None, plain.truth)])
    (stored,) = read_cases(tmp_path)
    assert stored["before"] == {"dice": 0.0, "failed": True, "breaks": 0, "false_pieces": 0}


def test_bad_keys_and_damaged_files_are_refused(tmp_path):
    for cases in ([], [case(), case()], [case("../x")], [case(".hidden")]):
        with pytest.raises(ValueError, match="distinct keys"):
            write_cases(tmp_path, cases)
    assert read_cases(tmp_path) == []
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "cases.json").write_text("{")
    with pytest.raises(ValueError, match=r"cases\.json is no valid JSON"):
        read_cases(tmp_path)
    (tmp_path / "cases" / "cases.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not in the format"):
        read_cases(tmp_path)
