"""A page in the browser to try a model on: its words are in demo.toml.

The model sees a picture once; all that follows is made anew with every move of a slider. The page is served
to this machine alone and loads nothing from elsewhere; uploads lie in a folder that goes with it.
"""

import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from vesselrl.data import formats
from vesselrl.data.images import read_mask
from vesselrl.data.patients import is_impersonal
from vesselrl.data.polygons import resize_mask
from vesselrl.data.samples import read_image
from vesselrl.errors import DataError, NotFiniteError, RunError
from vesselrl.evaluation.words import metric_name, number, setting_text
from vesselrl.inference.predictor import KINDS, Prediction, Predictor
from vesselrl.scoring.overlay import HIT, INVENTED, MISSED, TopologyErrors, overlay, topology_errors
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.scores import evaluation_scores
from vesselrl.synthetic.dataset import TARGET, draw_sequence

SHOWN_PX = 1280  # longer side of what is shown: small pictures are enlarged for the marks, large ones reduced
SCORES = (
    "dice",
    "recall",
    "precision",
    "cldice",
    "beta0_error",
    "beta1_error",
    "hd95",
    "nsd",
    "length_ratio",
)
MARKS = {"break": (240, 228, 66), "false_piece": (127, 200, 248), "false_loop": (255, 120, 200)}
WRITERS = {"labelme": formats.labelme, "coco": lambda name, mask: formats.coco([(name, mask)])}
VIEWS = ("overlay", "probability", "mask")
DARKEST_TO_BRIGHTEST = cv2.COLORMAP_INFERNO
FONTS = [
    "system-ui",
    "Segoe UI",
    "Roboto",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
]
STYLE = files("vesselrl").joinpath("demo.css").read_text("utf-8")


@dataclass(frozen=True, eq=False)
class Case:
    """A picture, uint8 (H, W, 3), the model's output for it, float32 (H, W), and its true mask or None."""

    source: str  # the file
    name: str  # of files made of it
    image: np.ndarray
    logits: np.ndarray
    truth: np.ndarray | None = None


def read_case(predictor: Predictor, path: Path, words: Mapping[str, str]) -> Case:
    """Reads a picture and asks the model; a file name that may be a person's goes no further."""
    image = read_image(path, words["its_picture"])
    name = path.stem if is_impersonal(path.stem) else "picture"
    return Case(str(path), name, image, predictor.predict(image).logits)


def read_truth(path: Path, shape: tuple[int, int], words: Mapping[str, str]) -> np.ndarray:
    """A true mask in the size (H, W) of its picture; of other proportions it is that of another one."""
    mask = read_mask(path, words["its_mask"], guess=True, broken="unreadable_mask")
    if abs(mask.shape[0] * shape[1] - mask.shape[1] * shape[0]) > max(*mask.shape, *shape) / 2:
        sizes = {"mask": f"{mask.shape[1]}×{mask.shape[0]}", "image": f"{shape[1]}×{shape[0]}"}
        raise DataError(words["sizes"].format(**sizes), "label_size")
    return resize_mask(mask, shape)


def draw(
    case: Case, prediction: Prediction, view: str
) -> tuple[np.ndarray, np.ndarray, TopologyErrors | None]:
    """Picture and result as they are shown, and the places that are marked in the overlay."""
    errors = None if case.truth is None else topology_errors(prediction.mask, case.truth)
    if view == "probability":
        levels = np.round(prediction.probabilities * 255).astype(np.uint8)
        result = cv2.cvtColor(cv2.applyColorMap(levels, DARKEST_TO_BRIGHTEST), cv2.COLOR_BGR2RGB)
    elif view == "mask":
        result = np.repeat(prediction.mask.astype(np.uint8)[:, :, None] * 255, 3, axis=2)
    else:
        result = overlay(case.image, prediction.mask, case.truth)
    factor = SHOWN_PX / max(case.image.shape)
    factor = max(1, int(factor)) if factor >= 1 else factor
    method = cv2.INTER_NEAREST if factor >= 1 else cv2.INTER_AREA
    before, after = (
        cv2.resize(one, None, fx=factor, fy=factor, interpolation=method) for one in (case.image, result)
    )
    if view == "overlay" and errors:
        radius = max(after.shape) // 90
        for places, colour in zip(errors, MARKS.values(), strict=True):
            for row, column in places:
                centre = round((column + 0.5) * factor), round((row + 0.5) * factor)
                for thickness, ink in ((5, (0, 0, 0)), (2, colour)):
                    cv2.circle(after, centre, radius, ink, thickness, cv2.LINE_AA)
    return before, after, errors


def write_files(case: Case, prediction: Prediction, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Writes what can be downloaded, KINDS and WRITERS; returns the paths, and the mask in numbers."""
    found = prediction.save(folder / case.name)
    paths = [folder / f"{case.name}_{kind}.png" for kind in KINDS]
    for kind, content in WRITERS.items():
        paths.append(folder / f"{case.name}_{kind}.json")
        paths[-1].write_text(json.dumps(content(f"{case.name}{Path(case.source).suffix}", prediction.mask)))
    return [str(path) for path in paths], found


def table(title: str, rows: Mapping[str, str]) -> str:
    """Names and numbers as HTML, below a title."""
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table class='numbers'><caption>{escape(title)}</caption>{lines}</table>"


def numbers(case: Case, prediction: Prediction, found: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    """What is known of a mask, as HTML: its vessels, and its scores where there is a true mask."""
    measured = {words["foreground"]: f"{found['foreground']:.1%}"}
    for name, value in found["measurements"].items():
        digits = {"branch_points": 0, "tortuosity": 3}.get(name, 1)
        measured[words[name]] = "–" if value is None else f"{value:.{digits}f}"
    tables = [table(words["measured"], measured)]
    if case.truth is not None:
        scores, names = evaluation_scores(prediction.mask, case.truth), words.get("metrics", {})
        texts = {names.get(one, metric_name(one)): number(one, scores[one]) for one in SCORES}
        texts = {name: names.get(text, text) for name, text in texts.items()}
        tables.insert(0, table(words["scored"], texts))
    return f"<div class='tables'>{''.join(tables)}</div>"


def legend(view: str, errors: TopologyErrors | None, words: Mapping[str, str]) -> str:
    """The meaning of colours and marks as HTML, with how many of each mark there are."""
    if view == "probability":
        return f"<div class='legend'><span><i class='ramp'></i>{words['scale']}</span></div>"
    areas = {"found": HIT, "missed": MISSED, "invented": INVENTED}
    if errors is None or view == "mask":
        areas = {"vessel": HIT if view == "mask" else INVENTED}
    keys = [("area", colour, words[name]) for name, colour in areas.items()]
    if errors is not None and view == "overlay":
        pairs = zip(MARKS.items(), errors, strict=True)
        keys += [("mark", colour, f"{words[name]}: {len(places)}") for (name, colour), places in pairs]
    parts = [
        f"<span><i class='{kind}' style='color: rgb{colour}'></i>{text}</span>" for kind, colour, text in keys
    ]
    return f"<div class='legend'>{''.join(parts)}</div>"


def heading(base_model: str | None, adapter: str | None, words: Mapping[str, str]) -> str:
    """Title, model and caveat as HTML; of paths only the last part."""
    base = words["miniature"] if base_model is None else setting_text(base_model)
    shown = words["no_adapter"] if adapter is None else setting_text(adapter)
    caveat = f"<p class='caveat'>{words['caveat']}</p>" if base_model is None else ""
    named = f"{words['model']}: <b>{escape(base)}</b> · {words['adapter']}: <b>{escape(shown)}</b>"
    return f"<header><h1>{words['title']}</h1><p>{named}</p><p>{words['about']}</p></header>{caveat}"


def build(
    predictor: Predictor, head: str, words: Mapping[str, Any], folder: Path
) -> tuple[Any, dict[str, Any]]:
    """The page as gradio's Blocks, and what of it belongs to its launch; files are written below a folder."""
    import gradio as gr

    examples, wait = count(1), f"<p class='wait'>{words['wait']}</p>"

    def take(picture: str | None, truth: str | None, case: Case | None) -> Case | None:
        """Asks the model where the picture is another one; else only the true mask may be another one."""
        if picture is None:
            return None
        try:
            if case is None or case.source != picture:
                case = read_case(predictor, Path(picture), words)
            mask = None if truth is None else read_truth(Path(truth), case.logits.shape, words)
        except (DataError, NotFiniteError) as error:
            raise gr.Error(str(error), title=words["error"], print_exception=False) from None
        return replace(case, truth=mask)

    def show(case: Case | None, threshold: float, min_px: float, gaps: float, view: str) -> list[Any]:
        if case is None:
            idle = gr.DownloadButton(value=None, interactive=False)
            return [None, "", wait, *[idle] * len(ways)]
        prediction = Prediction.of_logits(
            case.logits, PostProcessing(threshold, int(min_px), gaps), case.image
        )
        before, after, errors = draw(case, prediction, view)
        paths, found = write_files(case, prediction, Path(tempfile.mkdtemp(dir=folder)))
        files = [gr.DownloadButton(value=path, interactive=True) for path in paths]
        return [(before, after), legend(view, errors, words), numbers(case, prediction, found, words), *files]

    def example() -> list[str]:
        number = next(examples)
        ((image, mask),) = draw_sequence(TARGET, number, sequence=1, num_frames=1)
        places = [folder / f"synthetic_{number:03}{ending}.png" for ending in ("", "_mask")]
        for place, pixels in zip(places, (image, mask), strict=True):
            Image.fromarray(pixels).save(place)
        return [str(place) for place in places]

    with gr.Blocks(title=f"vesselrl · {words['title']}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(head)
        case, post = gr.State(), predictor.post
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=290):
                picture = gr.File(label=words["picture"], height=130, elem_id="picture")
                truth = gr.File(label=words["truth"], height=130, elem_id="truth")
                button = gr.Button(words["example"], size="sm", elem_id="example")
                threshold = gr.Slider(0.01, 0.99, post.threshold, step=0.01, label=words["threshold"])
                largest = max(500, post.min_component_px)
                min_px = gr.Slider(0, largest, post.min_component_px, step=1, label=words["min_component_px"])
                gaps = gr.Slider(0, 0.95, post.close_gaps, step=0.01, label=words["close_gaps"])
            with gr.Column(scale=5, min_width=320):
                names = [(words[view], view) for view in VIEWS]
                view = gr.Radio(names, value=VIEWS[0], show_label=False, container=False, elem_id="view")
                result = gr.ImageSlider(
                    label=words["result"], format="png", interactive=False, max_height=720, elem_id="result",
                    buttons=["fullscreen"],
                )  # fmt: skip
                key = gr.HTML()
                with gr.Row():
                    labels = [f"{words[kind]} (PNG)" for kind in KINDS] + [
                        f"{words[kind]} (JSON)" for kind in WRITERS
                    ]
                    ways = [
                        gr.DownloadButton(f"↓ {label}", interactive=False, size="sm", min_width=140)
                        for label in labels
                    ]
            with gr.Column(scale=2, min_width=240):
                figures = gr.HTML(wait)
        given, controls = [picture, truth, case], [case, threshold, min_px, gaps, view]
        shown = [result, key, figures, *ways]
        drop = picture.upload(lambda: None, None, truth)
        events = (
            drop.then,
            picture.clear,
            truth.upload,
            truth.clear,
            button.click(example, None, given[:2]).then,
        )
        for event in events:
            event(take, given, case).success(show, controls, shown, show_progress="hidden")
        moves = [one.input for one in (threshold, min_px, gaps, view)] + [threshold.release]
        gr.on(moves, show, controls, shown, trigger_mode="always_last", show_progress="hidden")
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"])
    own_words = gr.I18n(**dict.fromkeys(("en", "zh-CN"), words["gradio"]))
    return page, {"css": STYLE, "theme": theme, "i18n": own_words}


@contextmanager
def serving(
    predictor: Predictor,
    base_model: str | None,
    adapter: str | None,
    lang: str = "en",
    port: int | None = None,
) -> Iterator[str]:
    """Serves the page as long as the block lasts; yields its address."""
    words = tomllib.loads(files("vesselrl").joinpath("demo.toml").read_text("utf-8"))[lang]
    # Gradio reads these when it is imported. A proxy must not be asked for a page of this machine.
    direct = ",".join(filter(None, (os.environ.get("no_proxy", os.environ.get("NO_PROXY")), "127.0.0.1")))
    with tempfile.TemporaryDirectory(prefix="vesselrl_demo_") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": direct}
        page, options = build(predictor, heading(base_model, adapter, words), words, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                run_history=False, footer_links=[], ssr_mode=False, **options,
            )  # fmt: skip
            yield address
        except OSError as error:
            raise RunError(f"The page cannot be served ({error}). Give another --port.") from None
        finally:
            page.close()
