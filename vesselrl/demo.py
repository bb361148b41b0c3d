"""A page in the browser to try a model on; its words, HTML and style are evaluation/templates/demo.*.

The model sees a picture once; all that follows is made anew with every move of a slider. The page is served
to this machine alone and loads nothing from elsewhere; uploads lie in a folder that goes with it.
"""

import json
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from vesselrl.data import formats
from vesselrl.data.dicom import frames, is_dicom
from vesselrl.data.images import read_mask
from vesselrl.data.patients import is_impersonal
from vesselrl.data.polygons import resize_mask
from vesselrl.data.samples import are_proportional, read_image
from vesselrl.errors import DataError, NotFiniteError, RefusedError, RunError
from vesselrl.evaluation.report import render
from vesselrl.evaluation.words import number
from vesselrl.experiment.options import Demo
from vesselrl.inference.predictor import KINDS, Prediction, Predictor, load_predictor
from vesselrl.models.lora import adapter_settings
from vesselrl.scoring.measurements import check_pixel_mm, measurement_row
from vesselrl.scoring.overlay import HIT, INVENTED, MISSED, TopologyErrors, overlay, topology_errors
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.scores import evaluation_scores
from vesselrl.synthetic.dataset import TARGET, draw_sequence

SHOWN_PX = 1280  # longer side of what is shown: small pictures are enlarged for the marks, large ones reduced
VIEWS = ("overlay", "probability", "mask")
SCORES = "dice recall precision cldice beta0_error beta1_error hd95 nsd length_ratio".split()
MARKS = {"break": (240, 228, 66), "false_piece": (127, 200, 248), "wrong_loop": (255, 120, 200)}
DIGITS = {"branch_points": 0, "tortuosity": 3}
FONTS = "system-ui, Segoe UI, Roboto, PingFang SC, Microsoft YaHei, Noto Sans CJK SC, sans-serif".split(", ")
TEMPLATES = files("vesselrl.evaluation").joinpath("templates")
ADDRESS = "127.0.0.1"


@dataclass(frozen=True, eq=False)
class Case:
    """A picture, uint8 (H, W, 3), the model's output for it, float32 (H, W), and its true mask or None."""

    source: Path
    folder: Path  # of the files that are made of it
    image: np.ndarray
    logits: np.ndarray
    truth: np.ndarray | None = None

    @property
    def name(self) -> str:
        """How its files are called: a name that may be a person's goes no further."""
        is_plain = is_impersonal(self.source.stem) and not is_dicom(self.source)  # that may be an ID
        return self.source.stem if is_plain else "picture"


def read_case(
    predictor: Predictor, folder: Path, words: Mapping, picture: str, truth: str | None, case: Case | None
) -> Case:
    """Reads picture and true mask; the model is asked where the picture is another one than the case's."""
    if case is None or case.source != Path(picture):
        image = read_image(Path(picture), words["its_picture"])
        case = Case(Path(picture), Path(tempfile.mkdtemp(dir=folder)), image, predictor.predict(image).logits)
    if truth is None:
        return replace(case, truth=None)
    mask, shape = read_mask(Path(truth), words["its_mask"], guess=True), case.logits.shape
    if not are_proportional(mask.shape, shape):
        raise DataError(words["sizes"].format(*mask.shape[::-1], *shape[::-1]), "label_size")
    return replace(case, truth=resize_mask(mask, shape))


def draw(
    case: Case, prediction: Prediction, view: str, errors: TopologyErrors | None
) -> tuple[np.ndarray, np.ndarray]:
    """Picture and result as they are shown, uint8 RGB, errors ringed in the overlay."""
    if view == "probability":
        levels = np.round(prediction.probabilities * 255).astype(np.uint8)
        result = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[:, :, ::-1]
    elif view == "mask":
        result = np.repeat(prediction.mask.astype(np.uint8)[:, :, None] * 255, 3, axis=2)
    else:
        result = overlay(case.image, prediction.mask, case.truth)
    scale = SHOWN_PX / max(case.image.shape)
    scale, method = (int(scale), cv2.INTER_NEAREST) if scale >= 1 else (scale, cv2.INTER_AREA)
    shown = {"fx": scale, "fy": scale, "interpolation": method}
    before, after = (cv2.resize(one, None, **shown) for one in (case.image, result))
    for places, colour in zip(errors or (), MARKS.values(), strict=errors is not None):
        for row, column in places:
            centre = round((column + 0.5) * scale), round((row + 0.5) * scale)
            for thickness, ink in ((5, (0, 0, 0)), (2, colour)):
                cv2.circle(after, centre, max(after.shape) // 90, ink, thickness, cv2.LINE_AA)
    return before, after


def write_files(
    case: Case, prediction: Prediction, pictures: tuple[np.ndarray, np.ndarray]
) -> tuple[list[str], dict[str, Any]]:
    """Writes what is shown and what can be downloaded, KINDS and labels; returns paths and measurements."""
    for old in sorted(case.folder.iterdir())[:-1]:  # the one before may still be on its way
        shutil.rmtree(old)
    result = case.folder / f"{time.time_ns():020}" / case.name
    result.parent.mkdir()
    found = prediction.save(result)
    names = ["before.png", "after.png", *(f"{case.name}_{kind}.png" for kind in KINDS)]
    for name, pixels in zip(names, pictures, strict=False):
        cv2.imwrite(str(result.with_name(name)), pixels[:, :, ::-1])
    given = case.name + case.source.suffix, prediction.mask
    for kind, content in (("labelme", formats.labelme(*given)), ("coco", formats.coco([given]))):
        names.append(f"{case.name}_{kind}.json")
        result.with_name(names[-1]).write_text(json.dumps(content), encoding="utf-8")
    return [str(result.with_name(name)) for name in names], found


def show(
    case: Case, post: PostProcessing, view: str, words: Mapping, pixel_mm: float | None = None
) -> tuple[list[str], str, str]:
    """All that is shown of a case: files (picture, result, downloads), legend and numbers."""
    prediction = Prediction.of_logits(case.logits, post, case.image)
    errors = None if case.truth is None else topology_errors(prediction.mask, case.truth)
    marked = errors if view == "overlay" else None
    paths, found = write_files(case, prediction, draw(case, prediction, view, marked))
    areas = {"found": HIT, "missed": MISSED, "invented": INVENTED} if marked else {"vessel": INVENTED}
    areas = {"overlay": areas, "mask": {"vessel": HIT}, "probability": {}}[view]
    marks = [(*mark, len(places)) for mark, places in zip(MARKS.items(), marked or (), strict=bool(marked))]
    texts = {"foreground": f"{found['foreground']:.1%}"}
    for name, value in measurement_row(found["measurements"], pixel_mm).items():
        texts[name] = "–" if value is None else f"{value:.{DIGITS.get(name, 1)}f}"
    scores = {} if case.truth is None else evaluation_scores(prediction.mask, case.truth)
    scores = {metric: number(metric, scores[metric]) for metric in SCORES if scores}
    page = {"words": words, "view": view, "areas": areas, "marks": marks, "scores": scores, "measured": texts}
    key, numbers = (render("demo.j2", "html", {"part": part} | page) for part in ("key", "numbers"))
    return paths, key, numbers


def draw_example(folder: Path, patient: int) -> list[str]:
    """Draws a synthetic picture and its true mask into two files."""
    paths = [str(folder / f"synthetic_{patient:03}{ending}.png") for ending in ("", "_mask")]
    for path, pixels in zip(paths, *draw_sequence(TARGET, patient, 1, num_frames=1), strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def build(
    predictor: Predictor, head: str, words: Mapping, folder: Path, pixel_mm: float | None
) -> tuple[Any, dict[str, Any]]:
    """The page as gradio's Blocks, and what of it belongs to its launch; files are written below a folder."""
    import gradio as gr

    wait, patients = render("demo.j2", "html", {"part": "wait", "words": words}), count(1)

    def take(picture: str | None, truth: str | None, case: Case | None) -> Case | None:
        try:
            is_new = picture and (case is None or picture != str(case.source))
            if is_new and len(frames(Path(picture))) > 1:
                gr.Warning(words["first_frame"])
            return read_case(predictor, folder, words, picture, truth, case) if picture else None
        except (DataError, NotFiniteError) as error:
            return gr.Warning(str(error))

    def update(case: Case | None, threshold: float, min_px: float, gaps: float, view: str) -> list[Any]:
        if case is None:
            return [None, "", wait, *[gr.DownloadButton(value=None, interactive=False)] * len(ways)]
        paths, *texts = show(case, PostProcessing(threshold, int(min_px), gaps), view, words, pixel_mm)
        files = [gr.DownloadButton(value=path, interactive=True) for path in paths[2:]]
        return [tuple(paths[:2]), *texts, *files]

    with gr.Blocks(title=f"vesselrl · {words['title']}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(head)
        case, post = gr.State(), predictor.post
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=290):
                picture = gr.File(label=words["picture"], height=130, elem_id="picture")
                truth = gr.File(label=words["truth"], height=130, elem_id="truth")
                button = gr.Button(words["example"], size="sm", elem_id="example")
                threshold = gr.Slider(0.01, 0.99, post.threshold, step=0.01, label=words["threshold"])
                largest, label = max(500, post.min_component_px), words["min_component_px"]
                min_px = gr.Slider(0, largest, post.min_component_px, step=1, label=label)
                gaps = gr.Slider(0, 0.95, post.close_gaps, step=0.01, label=words["close_gaps"])
            with gr.Column(scale=5, min_width=320):
                names = [(words[view], view) for view in VIEWS]
                view = gr.Radio(names, value=VIEWS[0], show_label=False, container=False, elem_id="view")
                look = {"max_height": 720, "buttons": ["fullscreen"], "elem_id": "result"}
                result, key = gr.ImageSlider(label=words["result"], interactive=False, **look), gr.HTML()
                with gr.Row():
                    named = dict.fromkeys(KINDS, "PNG") | {"labelme": "JSON", "coco": "JSON"}
                    named = [f"↓ {words[kind]} ({ending})" for kind, ending in named.items()]
                    look = {"interactive": False, "size": "sm", "min_width": 110}
                    ways = [gr.DownloadButton(name, **look) for name in named]
            with gr.Column(scale=2, min_width=240):
                figures = gr.HTML(wait)
        controls, shown = [case, threshold, min_px, gaps, view], [result, key, figures, *ways]
        events = [
            picture.upload(lambda: None, None, truth).then,
            button.click(lambda: draw_example(folder, next(patients)), None, [picture, truth]).then,
        ]
        for event in (*events, picture.clear, truth.upload, truth.clear):
            event(take, [picture, truth, case], case).then(update, controls, shown, show_progress="hidden")
        moves = [one.input for one in controls[1:]]
        gr.on(moves, update, controls, shown, trigger_mode="always_last", show_progress="hidden")
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"])
    own_words = gr.I18n(**dict.fromkeys(("en", "zh-CN"), words["gradio"]))
    return page, {"css": TEMPLATES.joinpath("demo.css").read_text("utf-8"), "theme": theme, "i18n": own_words}


@contextmanager
def serving(args: Demo, adapter: str | None) -> Iterator[str]:
    """Serves the page as long as the block lasts; yields its address."""
    if find_spec("gradio") is None:
        lack = "The page needs the package gradio, which is not installed"
        raise RefusedError(f"{lack}. Run: pip install 'vesselrl[demo]'")
    check_pixel_mm(args.pixel_mm)
    predictor = load_predictor(args, adapter)
    words = tomllib.loads(TEMPLATES.joinpath("demo.toml").read_text("utf-8"))[args.lang]
    base = args.base_model or adapter_settings(adapter).get("model_path")
    head = {"part": "head", "words": words, "base_model": base, "adapter": adapter}
    # Gradio reads these when it is imported. A proxy must not be asked for a page of this machine.
    direct = ",".join(filter(None, (os.environ.get("no_proxy", os.environ.get("NO_PROXY")), ADDRESS)))
    closed = {"share": False, "run_history": False, "footer_links": [], "ssr_mode": False, "quiet": True}
    with tempfile.TemporaryDirectory(prefix="vesselrl_demo_") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": direct}
        page, options = build(predictor, render("demo.j2", "html", head), words, Path(folder), args.pixel_mm)
        where = {"server_name": ADDRESS, "server_port": args.port, "prevent_thread_lock": True}
        try:
            address = page.launch(**where, **closed, **options)[1]
        except OSError as error:
            raise RunError(f"The page cannot be served ({error}). Give another --port.") from None
        try:
            yield address
        finally:
            page.close()
