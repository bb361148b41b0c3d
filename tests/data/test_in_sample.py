import logging
from dataclasses import replace
from pathlib import Path

import pytest

from vesselrl.data.annotations import Sample
from vesselrl.data.in_sample import base_trained_on
from vesselrl.errors import DataError


@pytest.fixture
def samples():
    """Three patients with two frames each; the names are of nobody."""
    result = []
    for patient in ("P001", "P002", "P003"):
        for frame in ("F0001", "F0002"):
            path = Path(f"/data/images/LI_{patient[-1]}_frame_{frame[-1]}.jpg")
            key = f"{patient}_S1_{frame}"
            result.append(Sample(path, None, (), key, key, patient, f"{patient}_S1", frame))
    return result


def test_none_and_all(samples):
    assert base_trained_on("none", samples) == set()
    assert base_trained_on("all", samples) == {sample.key for sample in samples}


@pytest.mark.parametrize(
    "line",
    [
        "LI_2_frame_1.jpg",
        "LI_2_frame_1",
        "images/LI_2_frame_1.jpg",
        "C:\\data\\LI_2_frame_1.jpg",
        "P002_S1_F0001",
    ],
)
def test_one_listed_image_marks_its_whole_patient(samples, tmp_path, line, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "trained.txt"
    path.write_text(f"\ufeff# base model\n\nelsewhere_7.jpg\n  {line} \n", encoding="utf-8")
    assert base_trained_on(str(path), samples) == {"P002_S1_F0001", "P002_S1_F0002"}
    assert "1 of 3 patients: 2 of 6 images are in-sample" in caplog.text
    assert "LI" not in caplog.text


def test_equal_names_in_a_folder_for_each_patient(samples, tmp_path):
    """p1/1.jpg is of another patient than p2/1.jpg: the folder must be there, and decides."""
    samples = [
        replace(s, image_path=Path(f"/data/images/p{s.patient[-1]}/{s.frame[-1]}.jpg")) for s in samples
    ]
    path = tmp_path / "trained.txt"
    path.write_text("images/p2/1.jpg\n")
    assert base_trained_on(path, samples) == {"P002_S1_F0001", "P002_S1_F0002"}
    for line in ("1.jpg", "images/elsewhere/1.jpg"):
        path.write_text(f"# seen\n{line}\n")
        with pytest.raises(DataError, match=r"Line 2 of trained\.txt may mean images of 3 patients"):
            base_trained_on(path, samples)


def test_files_that_tell_nothing(samples, tmp_path):
    with pytest.raises(DataError, match=r"some is no file. Give none, all or a text file"):
        base_trained_on("some", samples)
    (tmp_path / "a.txt").write_text("LI_9_frame_1\n")
    with pytest.raises(DataError, match=r"None of 1 lines of a\.txt is an image of this data") as raised:
        base_trained_on(tmp_path / "a.txt", samples)
    assert "LI" not in str(raised.value)
    (tmp_path / "b.txt").write_bytes("李\n".encode("gbk"))
    with pytest.raises(DataError, match="is not UTF-8"):
        base_trained_on(tmp_path / "b.txt", samples)
