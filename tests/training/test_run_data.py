"""Which data a run trains, validates and tests on, and what is said about it."""

import shutil
from pathlib import Path

import pytest

from vesselrl.data.samples import find_samples
from vesselrl.data.splits import Split, write_split
from vesselrl.errors import DataError
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder
from vesselrl.training.setup import RunData, prepare_data


def prepared(tmp_path: Path, **options: object) -> RunData:
    return prepare_data(TrainConfig(output_dir=str(tmp_path), **options), RunFolder.create(tmp_path))


def test_folds_test_every_patient_once(angiograms: Path, tmp_path: Path) -> None:
    tested = []
    for number in range(1, 4):
        data = prepared(tmp_path / str(number), data_root=str(angiograms), fold=f"{number}/3")
        sides = [{s.patient for s in side} for side in (data.train, data.val, data.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))
        tested += sorted(sides[2])
    assert len(tested) == len(set(tested)) == 10


def test_an_adapter_without_its_run_is_a_doubt(finished_run: Path, angiograms: Path, tmp_path: Path) -> None:
    """Its training patients are unknown, so some may be in the new test side."""
    alone = shutil.copytree(finished_run / "best_lora", tmp_path / "alone")
    data = prepared(tmp_path, data_root=str(angiograms), init_lora=str(alone), split_seed=7)
    assert [mark.split(":")[0] for mark in data.test_caveats] == ["UNKNOWN START"]
    known = prepared(tmp_path / "known", data_root=str(angiograms), init_lora=str(finished_run), split_seed=7)
    assert known.test_caveats == ()


@pytest.mark.parametrize("option", [{"fold": "2/5"}, {"split_unit": "frame"}])
def test_a_run_cannot_go_on_with_another_split(
    finished_run: Path, angiograms: Path, tmp_path: Path, option: dict
) -> None:
    with pytest.raises(DataError, match="goes on with that run's split"):
        prepared(tmp_path, data_root=str(angiograms), init_lora=str(finished_run), **option)


def test_look_alikes_on_two_sides_stop_or_mark(
    angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(split: object, load: object) -> None:
        raise DataError("2 pairs of images look like frames of one run.")

    monkeypatch.setattr("vesselrl.training.run_data.check_near_duplicates", found)
    with pytest.raises(DataError, match="--near_duplicates allow"):
        prepared(tmp_path / "a", data_root=str(angiograms))
    data = prepared(tmp_path / "b", data_root=str(angiograms), near_duplicates="allow")
    assert data.test_caveats[0].startswith("NEAR DUPLICATES")


def test_several_errors_are_counted(angiograms: Path, tmp_path: Path) -> None:
    data = shutil.copytree(angiograms, tmp_path / "data")
    for file in sorted((data / "images").iterdir())[:2]:
        file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"the file is damaged.*first of 2 errors; `vesselrl data check"):
        prepared(tmp_path / "run", data_root=str(data))


def test_a_given_split_is_used_as_it_is(angiograms: Path, tmp_path: Path) -> None:
    samples = find_samples(angiograms)
    patients = sorted({s.patient for s in samples})
    parts = (patients[:3], patients[3:5], patients[5:7])
    sides = [tuple(s for s in samples if s.patient in part) for part in parts]
    write_split(tmp_path / "published.json", Split(*sides, seed=1))
    options = {"data_root": str(angiograms), "split_file": str(tmp_path / "published.json")}
    data = prepared(tmp_path / "run", **options, split_seed=9)
    assert [{s.key for s in side} for side in (data.train, data.val, data.test)] == [
        {s.key for s in side} for side in sides
    ]
    with pytest.raises(ValueError, match="--split_file says who is on which side"):
        prepared(tmp_path / "other", **options, fold="1/3")
