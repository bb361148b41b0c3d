"""Damage to files for tests/fuzz.py: other structures of JSON, flipped bits, other headers, other files."""

import io
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

TABLE = json.loads(Path(__file__).with_name("fuzz.json").read_text(encoding="utf-8"))
VALUES = [json.dumps(value) for value in TABLE["values"]]
SUMS = ("args_sha256", "checksum")
# In the table these stand for what no writer of JSON can write, or what is long, as @name and a number@.
MARKS: dict[str, Callable[[int], str]] = {
    "deep": lambda n: "[" * n + "]" * n,
    "digits": lambda n: "9" * n,
    "list": lambda n: str([0] * n),
    "x": lambda n: f'"{"x" * n}"',
}
LISTS, DICTS = b"[" * 10**5, b'{"a":' * 10**5 + b"1" + b"}" * 10**5
POINTER = b"version https://git-lfs.github.com/spec/v1\n"


def mutate(path: Path, rng: random.Random, box: Path) -> None:
    """Changes one file of a sandbox, in a way that fits what it is; a sum beside it is mostly removed."""
    content = path.read_bytes()
    if rng.random() < 0.04:
        replace_file(path, rng.choice(("folder", "", "nowhere", path.name, "canary")), box)
        return
    if "best_lora" in path.parts and rng.random() < 0.9:
        (path.parent / "SHA256SUMS").unlink()
    ways: list[Callable[..., bytes]] = [mutate_bytes]
    if path.suffix == ".json":
        ways += [mutate_json] * 4
    elif path.suffix == ".jsonl":
        lines = (mutate_json(n, rng, box) if rng.random() < 0.1 else n for n in content.splitlines())
        content = b"\n".join(lines)
    elif path.suffix in (".png", ".tif", ".jpg", ".gif", ".pgm"):
        ways += [mutate_header, mutate_header, lambda content, rng, box: picture(rng)]
    path.write_bytes(rng.choice(ways)(content, rng, box))


def replace_file(path: Path, by: str, box: Path) -> None:
    """A folder, nothing, or a link to nothing, to itself or to a file outside in the place of a file."""
    path.unlink()
    if by == "folder":
        path.mkdir()
    elif by:
        path.symlink_to(box / "canary" / "file.txt" if by == "canary" else path.with_name(by))


def spots(value: object) -> Iterator[tuple[dict | list, str | int]]:
    """Every place in nested lists and dicts that holds a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from spots(inner)


def mutate_json(content: bytes, rng: random.Random, box: Path) -> bytes:
    """Another structure; mostly without the sums that would refuse any change."""
    value = {"": json.loads(content)}
    if isinstance(value[""], dict) and rng.random() < 0.7:
        value[""] = {name: inner for name, inner in value[""].items() if name not in SUMS}
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        found = list(spots(value))
        if rng.random() < 0.5:  # a list of a thousand numbers counts as much as one of two texts
            chosen = rng.choice([*{id(holder): holder for holder, _ in found}.values()])
            found = [spot for spot in found if spot[0] is chosen]
        holder, key = rng.choice(found)
        how = rng.choice(("value", "value", "value", "remove", "wrap", "unwrap", "as text", "rename"))
        now, is_top = holder[key], holder is value
        if how == "remove" and not is_top:
            del holder[key]
        elif how == "rename" and isinstance(holder, dict) and not is_top:
            holder[rng.choice(("", "x", "\ud800", "../x", "1", key.upper(), "__class__"))] = holder.pop(key)
        else:
            ways = {"wrap": [now], "as text": json.dumps(now), "value": json.loads(rng.choice(VALUES))}
            inner = next(iter(now), None) if isinstance(now, dict | list) else {"a": now}
            holder[key] = ways.get(how, inner)
    text = json.dumps(value[""], ensure_ascii=rng.random() < 0.9).replace("@box@", str(box))
    text = re.sub(r'"@([a-z]+)(\d+)@"', lambda m: MARKS[m[1]](int(m[2])), text)
    return re.sub(r'"@([\w-]+)@"', r"\1", text).encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, rng: random.Random, box: Path) -> bytes:
    """Flipped bits, a cut, other bytes, a part twice or missing, or something else altogether."""
    data, first = bytearray(content), rng.randrange(len(content) + 1)
    last, near = rng.randint(first, len(content)), min(first, 300)
    flips = rng.choice((0, 0, 1, 1, 30)) if content else 0
    for _ in range(flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if flips:
        return bytes(data)
    if rng.random() < 0.2:
        in_16_bits, marked = content.decode("latin-1").encode("utf-16"), b"\xef\xbb\xbf" + content
        others = [b"", b"\0" * 10**6, b"{}", b"[]", b"null", b"NaN", LISTS, DICTS, POINTER, b"PK\x03\x04"]
        return rng.choice([*others, in_16_bits, marked, picture(rng)])
    extreme = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
    added = rng.randbytes(rng.randint(1, 2000))
    return rng.choice((
        content[:first], content[:last] + content[first:], content[:first] + content[last:],
        content[:first] + added + content[first:], content[:near] + extreme + content[near + 4 :],
    ))  # fmt: skip


def picture(rng: random.Random) -> bytes:
    """A valid image file of any kind and form."""
    sizes = ((1, 1), (64, 64), (63, 65), (1, 300), (3000, 1), (128, 128), (2000, 2000), (5700, 5700))
    values = np.zeros((*rng.choice(sizes), 4), np.uint8)
    values[:300, :300] = np.random.default_rng(rng.randrange(99)).integers(0, 256, values[:300, :300].shape)
    image, deep = Image.fromarray(values), {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", *deep))
    if mode in deep:
        image = Image.fromarray((values[..., 0] * rng.choice((1.0, 200.0))).astype(deep[mode]))
    else:
        image = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 3, 6, 9, 2**16 - 1))
    buffer = io.BytesIO()
    with suppress(OSError, ValueError, KeyError):  # not every form has every mode: half a file, or none
        image.save(buffer, rng.choice("PNG TIFF JPEG GIF BMP PPM WEBP ICO".split()), exif=exif)
    return buffer.getvalue()


def mutate_header(content: bytes, rng: random.Random, box: Path) -> bytes:
    """Other numbers in the header of an image, with the checksums of PNG made anew."""
    data, is_png = bytearray(content), content.startswith(b"\x89PNG")
    for _ in range(rng.choice((1, 1, 3))):
        number = rng.choice((0, 1, 2, 3, 7, 256, 5000, 65535, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)))
        form = rng.choice((">I", "<I", ">H", "<H", "B"))
        number &= 2 ** (8 * struct.calcsize(form)) - 1
        struct.pack_into(form, data, rng.randrange(2, min(len(data) - 4, 220)), number)
    if is_png and rng.random() < 0.5:  # the size, the depth and the kind
        sizes = (0, 1, 63, 64, 5000, 5792, 40_000, 2**31 - 1, 2**32 - 1)
        numbers = map(rng.choice, (sizes, sizes, (1, 8, 16), (0, 2, 3, 4, 6)))
        data[:33] = content[:16] + struct.pack(">IIBB", *numbers) + content[26:33]
    end = 8
    while is_png and (start := end) + 12 <= len(data):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        data[end - 4 : end] = struct.pack(">I", zlib.crc32(data[start + 4 : end - 4]))
    return bytes(data)
