"""Two observers of the same images, by hand and on CHASE_DB1."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from vesselrl.data.annotations import find_samples, load_mask
from vesselrl.errors import DataError
from vesselrl.evaluation.observers import observer_agreement, second_observer

# Left and right eye of one child are one patient.
CHILD = r"(?:train|test)_(?P<patient>\d+)(?P<sequence>[LR])"


@pytest.fixture
def root(tmp_path):
    """Two images; the second observer saw half of the vessel in the first, and the same in the second."""
    for folder in ("images", "masks", "masks_2nd"):
        (tmp_path / folder).mkdir()
    for name, columns in (("train_01L", 4), ("train_02L", 8)):
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "images" / f"{name}.png")
        for folder, width in (("masks", 8), ("masks_2nd", columns)):
            mask = np.zeros((8, 8), bool)
            mask[3:5, :width] = True
            Image.fromarray(mask).save(tmp_path / folder / f"{name}.png")
    return tmp_path


def test_agreement_by_hand(root):
    first = find_samples(root, CHILD)
    agreement = observer_agreement(first, second_observer(first, root / "masks_2nd")[::-1])
    found = [(row["dice"], row["recall"], row["precision"]) for row in agreement.rows]
    assert sorted(found) == [(pytest.approx(2 / 3), 0.5, 1.0), (1.0, 1.0, 1.0)]
    # The first observer is the truth: turned round, recall and precision change places.
    back = observer_agreement(second_observer(first, root / "masks_2nd"), first)
    assert [row["recall"] for row in back.rows] == [row["precision"] for row in agreement.rows]
    assert back.label_hash != agreement.label_hash


def test_equal_names_in_a_folder_for_each_patient(tmp_path):
    """p1/001.png is another image than p2/001.png, and so are its second mask and that of the other."""
    for number, patient in enumerate(("p1", "p2", "p3"), start=1):
        for folder in ("images", "masks", "second"):
            (tmp_path / folder / patient).mkdir(parents=True)
        mask = np.zeros((8, 8), bool)
        mask[number, :] = True
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "images" / patient / "001.png")
        for folder in ("masks", "second"):
            Image.fromarray(mask).save(tmp_path / folder / patient / "001.png")
    first = find_samples(tmp_path, r"^(?P<patient>[^/]+)/")
    agreement = observer_agreement(first, second_observer(first, tmp_path / "second"))
    assert [row["dice"] for row in agreement.rows] == [1.0] * 3
    (tmp_path / "second" / "p1" / "001.png").rename(tmp_path / "second" / "001.png")
    with pytest.raises(DataError, match="the second observer has no mask of it"):
        second_observer(first, tmp_path / "second")


def test_observers_of_other_images_are_refused(root):
    first = find_samples(root, CHILD)
    others = second_observer(first, root / "masks_2nd")
    with pytest.raises(DataError, match=r"different images: 1 are with one only \(P"):
        observer_agreement(first, others[:1])
    (root / "masks_2nd" / "train_02L.png").unlink()
    with pytest.raises(DataError, match="the second observer has no mask of it"):
        second_observer(first, root / "masks_2nd")
    with pytest.raises(DataError, match="There is no folder"):
        second_observer(first, root / "nowhere")
    Image.fromarray(np.zeros((4, 8), bool)).save(root / "masks_2nd" / "train_02L.png")
    with pytest.raises(DataError, match="the mask has 8×4 px, its image 8×8 px"):
        second_observer(first, root / "masks_2nd")


def test_human_agreement_on_chase_db1(shared_folder):
    data = shared_folder / "data" / "chase_db1"
    if not data.is_dir():
        pytest.skip("needs ../shared")
    first = find_samples(data, CHILD)
    second = second_observer(first, data / "masks_2nd")
    agreement = observer_agreement(first, second)
    assert (agreement.summary["n_images"], agreement.summary["n_patients"]) == (28, 14)
    scores = agreement.summary["metrics"]["dice"]
    assert scores["image_mean"] == pytest.approx(0.777, abs=0.002)
    assert scores["patient_mean"] == pytest.approx(0.777, abs=0.002)
    assert scores["low"] < 0.777 < scores["high"]
    last = [
        row["dice"]
        for row, sample in zip(agreement.rows, first, strict=True)
        if sample.image_path.stem.startswith("test")
    ]
    assert len(last) == 8
    assert np.mean(last) == pytest.approx(0.798, abs=0.002)
    for place in (0, 27):
        one, other = load_mask(first[place]).ravel(), load_mask(second[place]).ravel()
        assert agreement.rows[place]["dice"] == pytest.approx(f1_score(one, other))
