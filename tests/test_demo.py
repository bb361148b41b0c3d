"""The page: masks are those of predict, files name nobody, a browser gets from upload to download."""

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_dicom import write_dicom
from vesselrl import cli, demo
from vesselrl.errors import DataError
from vesselrl.inference.files import predict_files
from vesselrl.inference.predictor import Predictor
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.scores import evaluation_scores
from vesselrl.synthetic.dataset import TARGET, draw_sequence

PERSON = "ZHANG_SAN(1234567890)_1-2_3_0A1B2C3D_frame_000011"
WORDS = tomllib.loads(demo.TEMPLATES.joinpath("demo.toml").read_text("utf-8"))
MODEL = cache(Predictor.from_pretrained)
BROWSER = Path("/usr/bin/chromium")
OTHER = PostProcessing(threshold=0.3, min_component_px=10, close_gaps=0.02)  # each changes the mask


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A picture with a person's name, and its true mask."""
    folder = tmp_path_factory.mktemp("pictures")
    ((image, mask),) = draw_sequence(TARGET, 1, 1, num_frames=1, size=128)
    for name, pixels in ((PERSON, image), ("true", mask)):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder / f"{PERSON}.png", folder / "true.png"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def masks_of_predict(picture: Path, folder: Path, *settings: PostProcessing) -> Iterator[np.ndarray]:
    for number, post in enumerate(settings):
        (row,) = predict_files(replace(MODEL(), post=post), picture, folder / str(number))
        yield pixels(folder / str(number) / f"{row['result']}_mask.png")


def test_masks_are_those_of_predict_and_the_model_sees_a_picture_once(pictures, tmp_path: Path) -> None:
    seen, model = [], MODEL()
    counting = replace(model, forward=lambda inputs, images: seen.append(1) or model.model(inputs))
    read = partial(demo.read_case, counting, tmp_path, WORDS["en"], str(pictures[0]))
    case = read(str(pictures[1]), read(None, None))
    settings = PostProcessing(), PostProcessing(0.37, 12), OTHER
    for post, expected in zip(settings, masks_of_predict(pictures[0], tmp_path, *settings), strict=True):
        (_, shown, *paths), *_ = demo.show(case, post, "mask", WORDS["en"])
        np.testing.assert_array_equal(pixels(paths[0]), expected)
        np.testing.assert_array_equal(pixels(shown)[::10, ::10, 0], expected)  # enlarged to 1280 px
    assert 0 < expected.mean() < 128
    assert len(seen) == 1
    assert {Path(path).name.partition("_")[0] for path in paths} == {"picture"}
    assert not any(PERSON.split("(")[0].encode() in Path(path).read_bytes() for path in paths)


def test_numbers_and_marks_of_a_mask_made_by_hand(tmp_path: Path) -> None:
    truth = np.zeros((64, 64), bool)
    truth[30:34, 4:60] = True
    logits = np.where(truth, 5.0, -5.0).astype(np.float32)
    logits[30:34, 30:34] = -5  # a break
    logits[10:15, 10:15] = logits[34:39, 50:55] = 5  # a false component
    logits[36, 52] = -5  # a loop
    case = demo.Case(Path("a.png"), tmp_path, np.full((64, 64, 3), 90, np.uint8), logits, truth)
    (_, shown, *_), key, numbers = demo.show(case, PostProcessing(), "overlay", WORDS["en"], pixel_mm=0.5)
    for name in ("Break", "False component", "Loop added or lost"):
        assert f"{name}: 1<" in key
    for name, (row, column) in (("break", (31, 31)), ("false_piece", (12, 12)), ("wrong_loop", (36, 52))):
        around = pixels(shown)[20 * row - 20 : 20 * row + 40, 20 * column - 20 : 20 * column + 40]
        assert (around == demo.MARKS[name]).all(axis=2).any()
    assert f"<td>{evaluation_scores(logits > 0, truth)['dice']:.3f}</td>" in numbers
    assert "Length, mm" in numbers
    alone = replace(case, truth=None)
    (_, plain, *_), key, numbers = demo.show(alone, PostProcessing(), "overlay", WORDS["en"])
    assert "Break" not in key
    assert "Dice" not in numbers
    assert not (pixels(plain) == demo.MARKS["break"]).all(axis=2).any()


def test_a_mask_of_another_picture_is_refused_and_both_languages_say_the_same(pictures, tmp_path) -> None:
    Image.fromarray(np.zeros((64, 100), bool)).save(tmp_path / "mask.png")
    image, logits = np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128), np.float32)
    case = demo.Case(pictures[0], tmp_path, image, logits)
    with pytest.raises(DataError, match="100×64 px, its picture 128×128"):
        demo.read_case(None, tmp_path, WORDS["en"], str(pictures[0]), str(tmp_path / "mask.png"), case)
    assert WORDS["en"].keys() == WORDS["zh"].keys() - {"metrics"}
    assert WORDS["zh"]["metrics"].keys() == {*demo.SCORES, "undefined"}


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'vesselrl[demo]'" in said
    assert said.count("\n") == 1


@contextmanager
def served(lang: str, folder: Path) -> Iterator[str]:
    """The address of `vesselrl demo`, whose uploads are gone when it has been stopped."""
    command = [sys.executable, "-m", "vesselrl", "demo", "--lang", lang, "--lora_weights", "none"]
    environment = {**os.environ, "TMPDIR": str(folder), "HTTP_PROXY": "http://127.0.0.1:9"}  # none is there
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            (address,) = (word for word in process.stdout.readline().split() if word.startswith("http"))
            yield address
        finally:
            process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert [*folder.glob("vesselrl_demo_*")] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_browser_gets_from_upload_to_download(lang: str, pictures, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs gradio (pip install 'vesselrl[demo]')")
    reason = "needs playwright (pip install playwright)"
    sync_playwright = pytest.importorskip("playwright.sync_api", reason=reason).sync_playwright
    if not BROWSER.exists():
        pytest.skip(f"needs {BROWSER} (apt-get install chromium)")
    words, faults, picture = WORDS[lang], [], pictures[0]
    if lang == "zh":
        frames = np.stack([pixels(picture)[:, :, 0]] * 2)
        picture = write_dicom(tmp_path / "IM1.dcm", frames, PatientName="ZHANG^SAN")
    screenshots = Path(os.environ.get("VESSELRL_SCREENSHOTS", tmp_path))
    with served(lang, tmp_path) as address, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        own = (address, "data:", "blob:")
        page.on("request", lambda one: None if one.url.startswith(own) else faults.append(one.url))
        page.goto(address)
        page.get_by_text(words["wait"]).wait_for()
        assert page.get_by_text(words["gradio"]["upload_text.drop_file"]).count() == 2
        page.set_input_files("#picture input", picture)
        page.get_by_text(words["length_px"]).wait_for(timeout=60_000)
        assert page.get_by_text(words["first_frame"]).count() == (lang == "zh")
        page.set_input_files("#truth input", pictures[1])
        page.get_by_text(words["scored"]).wait_for(timeout=60_000)
        for place, value in enumerate((OTHER.threshold, OTHER.min_component_px, OTHER.close_gaps)):
            before = page.inner_text(".tables")
            page.locator("input[type=range]").nth(place).fill(str(value))
            page.wait_for_function("old => document.querySelector('.tables').innerText != old", arg=before)
        assert "ZHANG" not in page.inner_text("body")
        page.wait_for_timeout(1000)
        page.screenshot(path=screenshots / f"demo_{lang}.png", full_page=True)
        with page.expect_download() as download:
            page.get_by_text(f"{words['mask']} (PNG)").click()
        (expected,) = masks_of_predict(pictures[0], tmp_path, OTHER)
        np.testing.assert_array_equal(pixels(download.value.path()), expected)
        assert download.value.suggested_filename == "picture_mask.png"
        page.get_by_text(words["probability"], exact=True).click()
        page.get_by_text(words["scale"]).wait_for()
        page.set_viewport_size({"width": 420, "height": 900})
        page.wait_for_timeout(1000)
        page.screenshot(path=screenshots / f"demo_{lang}_narrow.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        page.locator("#truth button").first.click()  # takes the mask away
        page.set_input_files("#truth input", Path(__file__))
        page.get_by_text(f"{words['its_mask']}: the file is not an image").wait_for()
        browser.close()
    assert faults == []
