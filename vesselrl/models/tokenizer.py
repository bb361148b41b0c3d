"""Tokenizers of checkpoints, built from their vocabularies: no code and no pattern of the files is used."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from vesselrl.errors import CheckpointError
from vesselrl.models.config import read_json_object, unreadable


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
            has_bytes, has_prefix = (
                whole["model"].get("byte_fallback"),
                "Prepend" in str(whole.get("normalizer")),
            )
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
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
