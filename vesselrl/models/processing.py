"""Images and a prompt to model inputs, bit for bit as the official Sa2VA does it.

The language model sees tiles and a thumbnail; SAM2 sees the image resized to its square, aspect ratio not
kept. The answer is teacher-forced, so that one forward pass gives the hidden state at every [SEG].
Tokenizers are built from the vocabularies of checkpoints: no code and no pattern of their files is used.
"""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vesselrl.errors import CheckpointError
from vesselrl.models.config import Sa2VAConfig, read_json_object, unreadable
from vesselrl.models.families import TEMPLATES

# Of ImageNet, for both branches.
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)

# Of a Qwen-VL, from the official training, for either patch size; smaller images are enlarged.
MIN_PIXELS, MAX_PIXELS = 512 * 28 * 28, 2048 * 28 * 28
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # Qwen3-VL; Qwen2.5-VL has CLIP's, the default

DEFAULT_PROMPT = "Please segment the blood vessel."
ANSWER = "Sure, [SEG]."
SEG_TOKEN = "[SEG]"


@dataclass
class Sa2VAInputs:
    """One batch of B images with the same prompt; T tiles in all, L tokens after right padding."""

    tiles: torch.Tensor  # (T, 3, t, t) float, the tiles of all images one after the other, or (T, C) patches
    input_ids: torch.Tensor  # (B, L) long, prompt and answer with the image tokens expanded
    attention_mask: torch.Tensor  # (B, L) long, 0 where padded
    sam_pixels: torch.Tensor  # (B, 3, S, S) float
    sizes: tuple[tuple[int, int], ...]  # (height, width) of every original image, in px
    num_tiles: tuple[int, ...]  # of every image
    pixels: tuple[torch.Tensor, ...]  # (H, W) uint8, the green channel of every image at its own size
    grids: torch.Tensor | None = None  # (B, 3) long, of a Qwen-VL: frames, rows and columns of its patches

    def to(self, device: torch.device | str) -> "Sa2VAInputs":
        """The same batch on another device."""
        moved = {k: value.to(device) for k, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved, pixels=tuple(one.to(device) for one in self.pixels))

    def image(self, index: int) -> "Sa2VAInputs":
        """One image of the batch, without padding."""
        one = slice(index, index + 1)
        first, length = sum(self.num_tiles[:index]), int(self.attention_mask[index].sum())
        tiles = self.tiles[first : first + self.num_tiles[index]]
        text = self.input_ids[one, :length], self.attention_mask[one, :length]
        grids = None if self.grids is None else self.grids[one]
        own = (values[one] for values in (self.sam_pixels, self.sizes, self.num_tiles, self.pixels))
        return Sa2VAInputs(tiles, *text, *own, grids)


def tile_grid(width: int, height: int, tile_px: int, max_tiles: int = 12) -> tuple[int, int]:
    """Columns and rows of the grid of at most `max_tiles` tiles whose ratio is closest to width / height.

    On an exact tie the larger grid wins where the image has more than half of the pixels that it offers.
    """
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    best, best_gap = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        gap = abs(width / height - columns / rows)
        larger_fits = width * height > 0.5 * tile_px**2 * columns * rows
        if gap < best_gap or (gap == best_gap and larger_fits):
            best, best_gap = (columns, rows), gap
    return best


def cut_tiles(image: Image.Image, tile_px: int) -> list[Image.Image]:
    """Tiles row by row, then a thumbnail when there is more than one tile."""
    columns, rows = tile_grid(image.width, image.height, tile_px)
    resized = image.resize((columns * tile_px, rows * tile_px), Image.Resampling.BICUBIC)
    corners = [(c * tile_px, r * tile_px) for r in range(rows) for c in range(columns)]
    tiles = [resized.crop((x, y, x + tile_px, y + tile_px)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((tile_px, tile_px), Image.Resampling.BICUBIC))
    return tiles


def cut_patches(config: Sa2VAConfig, pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a Qwen-VL sees: (T, C) patches of all images, and (B, 3) frames, rows and columns of each."""
    processor = Qwen2VLImageProcessorPil(
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        patch_size=config.vision["patch_size"],
        merge_size=config.vision["spatial_merge_size"],
        temporal_patch_size=config.vision["temporal_patch_size"],
        **(_HALF if config.kind == "qwen3_vl" else {}),
    )
    found = processor([np.asarray(picture) for picture in pictures], return_tensors="pt")
    return torch.as_tensor(found["pixel_values"]), torch.as_tensor(found["image_grid_thw"])


def _normalise(images: list[Image.Image], device: torch.device | str) -> torch.Tensor:
    """(B, 3, H, W) float32 of images of one size, (value / 255 − mean) / deviation, made on the device."""
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    # Tensors on the device: by a number a GPU would multiply with its inverse, and round otherwise.
    numbers = (torch.tensor(values, device=device).view(-1, 1, 1) for values in ([255.0], MEAN, STD))
    largest, mean, deviation = numbers
    return pixels.div_(largest).sub_(mean).div_(deviation)


class Sa2VAProcessor:
    """Turns images and one prompt into `Sa2VAInputs`."""

    def __init__(self, config: Sa2VAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        _, image_token, _ = config.family.image_text
        self.image_token_id, self.seg_token_id = map(self._special_id, (image_token, SEG_TOKEN))

    def __call__(
        self,
        images: list[np.ndarray],
        prompt: str = DEFAULT_PROMPT,
        answer: str = ANSWER,
        device: torch.device | str = "cpu",
    ) -> Sa2VAInputs:
        """Prepares a batch of uint8 RGB images (H, W, 3), whose sizes may differ, on a device.

        `<image>` is put before the prompt where that has none; the teacher-forced answer needs a [SEG].
        """
        if SEG_TOKEN not in answer:
            raise ValueError(f"The answer {answer!r} has no {SEG_TOKEN}; without it there is no mask.")
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                got = f"Image {index} is {image.dtype} {image.shape}"
                raise ValueError(f"{got}; uint8 RGB (H, W, 3) is needed.")
        pictures = [Image.fromarray(image) for image in images]
        if self.config.family.is_whole:
            tiles, grids = cut_patches(self.config, pictures)
            num_tiles = tuple(grids.prod(-1).tolist())
            num_tokens = [number // self.config.vision["spatial_merge_size"] ** 2 for number in num_tiles]
        else:
            cut, grids = [cut_tiles(picture, self.config.tile_px) for picture in pictures], None
            tiles = _normalise([*chain.from_iterable(cut)], device)
            num_tiles = tuple(map(len, cut))
            num_tokens = [self.config.tokens_per_tile * number for number in num_tiles]
        rows = [self._token_ids(prompt, answer, number) for number in num_tokens]
        length = max(map(len, rows))
        pad_id = self.tokenizer.pad_token_id or 0
        side = (self.config.sam2.image_size,) * 2
        return Sa2VAInputs(
            tiles=tiles,
            input_ids=torch.tensor([row + [pad_id] * (length - len(row)) for row in rows]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            sam_pixels=_normalise([p.resize(side, Image.Resampling.BICUBIC) for p in pictures], device),
            sizes=tuple((picture.height, picture.width) for picture in pictures),
            num_tiles=num_tiles,
            pixels=tuple(torch.from_numpy(image[..., 1].copy()) for image in images),
            grids=grids,
        ).to(device)

    def _token_ids(self, prompt: str, answer: str, num_tokens: int) -> list[int]:
        """Ids of prompt and answer, tokenised separately, as in the official training."""
        prompt = prompt.replace("\\n", "\n")  # as shells pass a line break
        question = prompt if "<image>" in prompt else f"<image>\n{prompt}"
        start, image_token, end = self.config.family.image_text
        image = f"{start}{image_token * num_tokens}{end}"
        turn, suffix = TEMPLATES[self.config.template]
        first = [self.tokenizer.bos_token_id] if self.config.family.has_bos else []
        asked = self._encode(turn.format(question.replace("<image>", image)))
        return first + asked + self._encode(f"{answer}{suffix}")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _special_id(self, token: str) -> int:
        ids = self._encode(token)
        if len(ids) != 1:
            fault = f"The tokenizer splits {token!r} into {len(ids)} tokens and is no Sa2VA's"
            raise CheckpointError(f"{fault}. Copy the tokenizer files of the checkpoint again.")
        return ids[0]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Builds the checkpoint's tokenizer from vocabulary, merges and added tokens.

    Qwen2's are in vocab.json and merges.txt, InternLM2's in tokenizer.model, either in tokenizer.json alone.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    whole, settings, added = (read_json_object(folder / n) if (folder / n).exists() else {} for n in names)
    pieces = folder / "tokenizer.model"
    needed = () if whole or pieces.exists() else ("vocab.json", "merges.txt", "tokenizer_config.json")
    if missing := ", ".join(name for name in needed if not (folder / name).exists()):
        raise CheckpointError(f"{folder} lacks the tokenizer files {missing}. Copy them from the source.")
    try:
        tokens = {one["id"]: one for one in whole.get("added_tokens") or ()}
        tokens |= {number: {"content": text, "special": True} for text, number in added.items()}
        tokens |= {int(number): one for number, one in (settings.get("added_tokens_decoder") or {}).items()}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        decoder = {
            number: AddedToken(one["content"], **{name: one[name] for name in flags if name in one})
            for number, one in sorted(tokens.items())
        }
        if whole:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
            has_bytes = whole["model"].get("byte_fallback")
            has_prefix = "Prepend" in str(whole.get("normalizer"))
        elif needed:
            vocab, merges = read_json_object(folder / "vocab.json"), _read_merges(folder / "merges.txt")
            has_bytes = has_prefix = False
        else:
            vocab, merges, has_prefix = _read_pieces(pieces, decoder)
            has_bytes = True
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        if has_bytes:
            tokenizer = _sentencepiece(vocab, merges, has_prefix)
            tokenizer.add_tokens([*decoder.values()])
        else:
            tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, added_tokens_decoder=decoder)
        found = {number: tokenizer.convert_tokens_to_ids(one.content) for number, one in decoder.items()}
    except Exception as error:  # the tokenizers library raises nothing narrower
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        fault = f"{folder}: the tokenizer files cannot be used ({kind}{error})"
        raise CheckpointError(f"{fault}. Copy them again.") from None
    if moved := [number for number, got in found.items() if got != number]:
        fault = f"{folder}: the tokenizer files give token {moved[0]} the number {found[moved[0]]}"
        raise CheckpointError(f"{fault}; they are of different models. Copy them again.")
    return tokenizer


def _read_merges(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise unreadable(file, error) from None
    if lines[0].startswith("version https://git-lfs"):
        raise unreadable(file, ValueError(lines[0]))
    return [line for line in lines if line and not line.startswith("#version")]


def _read_pieces(file: Path, added: dict[int, AddedToken]) -> tuple[dict[str, int], list, bool]:
    """Vocabulary and merges of a SentencePiece model, and whether a space is put before the text."""
    model = import_protobuf().ModelProto()
    model.ParseFromString(file.read_bytes())
    # Chat tokens take the place of pieces that were left free for them.
    names = [added[k].content if k in added else piece.piece for k, piece in enumerate(model.pieces)]
    vocab = {name: number for number, name in enumerate(names)}
    scores = {name: piece.score for name, piece in zip(names, model.pieces, strict=True)}
    return vocab, generate_merges(vocab, scores), model.normalizer_spec.add_dummy_prefix


def _sentencepiece(vocab: dict[str, int], merges: list, has_prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of pieces with `▁` for spaces, and bytes for what has no piece, as InternLM2's."""
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(pieces)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
