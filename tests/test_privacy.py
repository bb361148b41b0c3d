"""No name and no ID of a patient leaves the data root: every byte that any command writes or prints."""

import base64
import contextlib
import io
import json
import logging
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.golden.broken_input import cut
from vesselrl.cli import main
from vesselrl.data.pseudonyms import MAPPING_FILE
from vesselrl.experiment.run_folder import PRIVATE_FILE

# Made up, in every pattern that exports use; the words and numbers occur nowhere else.
NAMES = ("QUIRINIUS_XANTHOPOULOS", "欧阳娜娜", "Brünhilde Zwölfender", "Ylva^Qvarnström")
STEMS = (
    "QUIRINIUS_XANTHOPOULOS(4827163950)_1-2_3_0A1B2C3D_frame_{:06d}",
    "QUIRINIUS_XANTHOPOULOS^(4827163951)_1-2_3_0A1B2C3D_frame_{:06d}",
    "QUIRINIUS_XANTHOPOULOS_4827163952__1-2_3_0A1B2C3D_frame_{:06d}",
    "QUIRINIUS XANTHOPOULOS  4827163953  1-2 3 0A1B2C3D frame {:06d}",
    "欧阳娜娜__4827163954__1-2_3_0A1B2C3D_frame_{:06d}",
    "欧阳娜娜(4827163955) unknown {:06d}",
    "Brünhilde Zwölfender_frame_{:06d}",
    "Ylva^Qvarnström_frame_{:06d}",
    "Qvarnström Ylva no pattern {:06d}",
    "4827163956_frame_{:06d}",
    "Ylva heart {}",
    "Brünhilde Zwölfender/scan {}",
)
SECRETS = "quirinius xanthopoulos 欧阳 娜娜 brünhilde zwölfender ylva qvarnström 482716395".split()
TEXT_FILES = {".json", ".jsonl", ".csv", ".md", ".html", ".txt", ".log", ".svg"}
ENCODED = re.compile(rb"base64,[A-Za-z0-9+/=\s]+")
PNG = rb"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def named_angiograms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two 64-px frames of each patient; names in file and folder names, texts, EXIF and PNG comments."""
    root = tmp_path_factory.mktemp("data") / "QUIRINIUS XANTHOPOULOS" / "Zwölfender"
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    records = []
    for number, pattern in enumerate(STEMS):
        for frame in range(2):
            x, y = 4 + 4 * number + 2 * frame, 4
            polygon = [y, x, 60, x, 60, x + 5, y, x + 5]
            image = rng.integers(120, 180, (64, 64), np.uint8)
            image[x : x + 5, y:60] = 70
            comment = PngImagePlugin.PngInfo()
            comment.add_text("PatientName", NAMES[0])
            exif = Image.Exif()
            exif[0x010E] = exif[0x013B] = NAMES[2]  # description and artist
            name = f"{pattern.format(frame)}.png"
            (root / "images" / name).parent.mkdir(exist_ok=True)
            Image.fromarray(image).convert("RGB").save(root / "images" / name, pnginfo=comment, exif=exif)
            texts = {"text": [f"vessels of {NAMES[1]}"], "name": NAMES[2]}
            records.append({"image": name, "mask": [polygon], **texts})
    (root / "annotations.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def output(named_angiograms: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands write on this data, with what they log and print."""
    folder, images = tmp_path_factory.mktemp("out"), named_angiograms / "images"
    handler = logging.FileHandler(folder / "log.log", encoding="utf-8")
    loggers = [logging.getLogger(name) for name in (None, "vesselrl")]
    levels = [logger.level for logger in loggers]
    loggers[0].addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    bad = tmp_path_factory.mktemp("bad") / "Ylva Qvarnström"
    shutil.copytree(images, bad)
    cut(bad / "Ylva heart 1.png")
    root, out = ["--data_root", str(named_angiograms)], ["--output_dir", str(folder)]
    train = ["train", "--preset", "debug", "--model_path", str(tiny_checkpoint)]

    def call(*arguments: str) -> int:
        file = (folder / "printed.txt").open("a", encoding="utf-8")
        with file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return main([*map(str, arguments)])

    try:
        assert call(*train, *root, *out) == 0
        run = next(path for path in folder.iterdir() if (path / "best_lora").is_dir())
        assert call("evaluate", "--lora_weights", run, "--second_masks", bad) in (1, 2)
        assert call("evaluate", "--lora_weights", run, "--tune_post") == 0
        assert call("evaluate", "--lora_weights", run, *root, *out, "--split", "val") == 0
        assert call("compare", *out) in (0, 2)
        assert call("data", "check", named_angiograms) == 0
        assert call("data", "check", named_angiograms, "--json") == 0
        assert call("data", "check", named_angiograms, "--fix", bad.parent / "Brünhilde") == 0  # data again
        assert call("data", "check", bad, "--fix", bad) == 2
        assert call("data", "show", named_angiograms, "--output", folder / "sheet.png") == 0
        assert call("doctor", *root) in (0, 1)
        predict = ["predict", "--lora_weights", run, "--base_model", tiny_checkpoint]
        labels = ["--format", "labelme", "coco"]
        assert call(*predict, "--image", bad, "--output_dir", folder / "predicted", *labels) == 3
        merge = ["data", "merge", named_angiograms, folder / "predicted" / "labelme", "--output"]
        assert [call(*merge, bad.parent / "merged") for _ in range(2)] == [0, 2]  # data again; it is there
        assert call(*predict, "--image", bad / "Ylva heart 1.png", "--output_dir", folder / "none") == 1
        merge = ["merge", "--lora_weights", run, "--base_model", tiny_checkpoint]
        assert call(*merge, "--output_model", folder / "merged") in (0, 1)  # where no vessel is found
        (folder / "merged/model.safetensors").unlink()  # numbers by the million spell a short name by chance
        for place in (bad, bad / "nowhere", bad / "Ylva heart 0.png"):
            assert call("data", "check", place) == 2
            assert call(*train, "--data_root", place, *out) in (1, 2)
            assert call("evaluate", "--data_root", place, *out) in (1, 2)
        assert call("predict", "--image", bad / "nowhere", *out) in (1, 2)
        for option in ("--patient_aliases", "--base_trained_on", "--split_file"):
            for place in (bad, bad / "no.csv", named_angiograms / "annotations.json"):
                assert call(*train, *root, *out, option, place) in (1, 2)
    finally:
        loggers[0].removeHandler(handler)
        handler.close()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return folder


def texts_of(content: bytes) -> Iterator[str]:
    """What can be read in a file: its bytes, escaped and compressed texts, and texts in embedded pictures."""
    # The letters of an encoded picture spell a short name by chance; what it holds is looked at below.
    text = ENCODED.sub(b"", content).decode("utf-8", errors="replace")
    yield text
    yield content.decode("utf-16-le", errors="replace")
    yield re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    for encoded in ENCODED.findall(content):
        yield from texts_of(base64.b64decode(encoded.removeprefix(b"base64,")))
    for match in re.finditer(PNG, content):
        with contextlib.suppress(OSError), Image.open(io.BytesIO(content[match.start() :])) as picture:
            picture.load()  # comments may stand behind the pixels
            for value in picture.info.values():
                yield value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def secrets_in(path: Path) -> set[str]:
    """The planted names and numbers that a file or its path holds, however they are spelled."""
    found = set()
    for text in (str(path), *texts_of(path.read_bytes())):
        plain = re.sub(r"[\W_]+", "", text).casefold()
        found |= {secret for secret in SECRETS if secret in plain or secret in text.casefold()}
    return found


def test_no_output_holds_a_planted_name_or_id_or_any_number_of_ten_digits(output: Path) -> None:
    files, private = [path for path in output.rglob("*") if path.is_file()], []
    for path in list(files):
        if path.name in (MAPPING_FILE, PRIVATE_FILE):  # of predictions and of the run
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert secrets_in(path)
            private.append(path.name)
            files.remove(path)
    assert sorted(private) == [PRIVATE_FILE, MAPPING_FILE, MAPPING_FILE]
    assert {".json", ".jsonl", ".csv", ".png", ".log", ".safetensors"} <= {path.suffix for path in files}
    found = {str(path.relative_to(output)): secrets_in(path) for path in files}
    assert {name: secrets for name, secrets in found.items() if secrets} == {}
    for path in files:
        assert b'"readings"' not in path.read_bytes()
        if not path.name.startswith("events.out.tfevents."):  # TensorBoard puts the time of day there
            assert not re.search(r"(?<![\w.])\d{10}(?![\w.])", path.stem)  # digits in a hash are no ID
        if path.suffix in TEXT_FILES:
            text = ENCODED.sub(b"", path.read_bytes()).decode()
            assert not re.search(r"(?<![\w.])\d{10}(?![\w.])", text), path.relative_to(output)


def test_pseudonyms_are_what_is_written_instead(output: Path) -> None:
    split = json.loads(next(output.glob("*/data_split.json")).read_text())
    keys = [key for side in split["samples"].values() for key in side]
    assert len(keys) == 24
    assert all(re.fullmatch(r"P\d{3}_S\d_F\d{4}", key) for key in keys)
    assert split["shared_patients"] == {"train_val": [], "train_test": [], "val_test": []}


def test_the_planted_names_would_be_found(named_angiograms: Path, tmp_path: Path) -> None:
    """Each way of hiding a name that the search must see through."""
    for name in ("text", "itxt"):
        comment = PngImagePlugin.PngInfo()
        getattr(comment, f"add_{name}")("note", "Zwölfender", zip=True)
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png", pnginfo=comment)
    embedded = base64.b64encode((tmp_path / "text.png").read_bytes()).decode()
    (tmp_path / "a.html").write_text(f'<img src="data:image/png;base64,{embedded}">')
    (tmp_path / "events").write_bytes(b"\0\1" + (tmp_path / "text.png").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps("Zwölfender"))
    (tmp_path / "a.csv").write_text("ZWÖLF_ENDER", encoding="utf-8")
    (tmp_path / "wide").write_bytes("Zwölfender".encode("utf-16-le"))
    for path in tmp_path.iterdir():
        assert secrets_in(path) == {"zwölfender"}, path.name
    plain = next((named_angiograms / "images").glob("4827*"))
    assert {"482716395", "quirinius", "xanthopoulos"} <= secrets_in(plain)
