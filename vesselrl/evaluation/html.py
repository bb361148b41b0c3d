"""A report as one HTML file that needs nothing else: style, charts and pictures are inside, no scripts."""

import base64
import io
from importlib.resources import files
from pathlib import Path

from vesselrl.evaluation.document import Document, Picture

MAX_PICTURE_BYTES = 3_000_000


def to_html(document: Document) -> str:
    """The document as a self-contained HTML page; every text is escaped.

    Pictures are embedded as PNG, made smaller where all together exceed 3 MB.

    Raises:
        ValueError: a picture cannot be read; the message names the file.
    """
    from jinja2 import Environment, StrictUndefined

    pictures = [block for section in document.sections for block in section.blocks
                if isinstance(block, Picture)]  # fmt: skip
    share = MAX_PICTURE_BYTES // max(1, len(pictures))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("vesselrl.evaluation").joinpath("templates/report.html").read_text(encoding="utf-8")
    images = {picture.file: png_uri(picture.path, share) for picture in pictures}
    return environment.from_string(template).render(document=document, images=images)


def png_uri(path: Path, max_bytes: int = MAX_PICTURE_BYTES) -> str:
    """A PNG file as a `data:` address of at most `max_bytes` before encoding, shrunk where it is larger.

    Raises:
        ValueError: the file is missing or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            width = picture.width
            while len(content) > max_bytes and width > 64:
                width = int(width * max(0.5, min(0.95, (max_bytes / len(content)) ** 0.5)))
                smaller = picture.convert("RGB").resize(
                    (width, max(1, round(width * picture.height / picture.width))), Image.Resampling.LANCZOS
                )
                buffer = io.BytesIO()
                smaller.save(buffer, format="PNG", optimize=True)
                content = buffer.getvalue()
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"{path.name} cannot be shown in the report ({error}). Write the cases of the run again."
        ) from error
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
