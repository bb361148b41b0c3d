"""Sa2VA as a stochastic policy over masks.

The action is a whole mask. Each pixel is on with probability sigmoid(logit / temperature), and neighbours are
sampled together (a Gaussian copula over a smooth random field), so that samples gain and lose whole twigs.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from vesselrl.data.augment import get_augmentation
from vesselrl.data.samples import Sample, load_image
from vesselrl.experiment.config import RANDOM_MODEL, TrainConfig
from vesselrl.experiment.progress import logged
from vesselrl.experiment.run_folder import json_hash
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.models import lora
from vesselrl.models.checkpoint import describe_config, load_detail_head, load_sa2va
from vesselrl.models.memory import activation_bytes, shard_layers, to_nf4, total_memory
from vesselrl.models.miniature import base_checkpoint
from vesselrl.models.processing import Sa2VAInputs, Sa2VAProcessor
from vesselrl.models.sa2va import HEAD, LANGUAGE, MASKS, DecodedMasks, DetailHead, ImageFeatures, Sa2VA
from vesselrl.training import processes
from vesselrl.training.checkpoint import tensors_hash, with_values
from vesselrl.training.features import GIB, FeatureStore, feature_store, image_key, language_hash

logger = logging.getLogger(__name__)

IMAGES_PER_PASS = 8  # that need no gradient go through the model together on a GPU; on a CPU it is one
ONE_BY_ONE = "images of a batch are encoded one by one"
RECOMPUTING = "what is inside the model's blocks is computed a second time for the gradient, and not kept"
PROBE, NEGATIVE = "probe", "negative of the probe"  # keys of an image and its negative, for a self-check


class MaskPolicy:
    """A Sa2VA with trainable adapters: images in, mask logits at native size out.

    Outputs of frozen parts are kept for each image, computed one by one on a CPU: the same to the last bit.
    Without `keys_repeat`, as with augmentation, nothing is kept beyond a batch. `load_language` gives the
    frozen language model that `model` is without, when it is needed.
    """

    kind = "lora"

    def __init__(
        self,
        peft_model: PeftModel,
        processor: Sa2VAProcessor,
        prompt: str,
        keys_repeat: bool = True,
        load_language: Callable[[], Sa2VA] | None = None,
    ) -> None:
        self.peft_model = peft_model
        self.model: Sa2VA = peft_model.get_base_model()
        self.processor, self.prompt = processor, prompt
        self.predictor = Predictor(self.model, processor, prompt, forward=self.predict_logits)
        self.trainable = lora.adapter_parameters(peft_model)
        self.counts = lora.trainable_counts(peft_model)
        self.language_is_frozen = not any(".lm." in name for name in self.trainable)
        self.encoder_is_frozen = not any(".vision_encoder." in name for name in self.trainable)
        self.store: FeatureStore | None = None
        self.half_features = False  # kept in bfloat16, as the model's weights are
        self.keys_repeat = keys_repeat
        self.image_by_image = False
        # What can be done where memory does not suffice, in this order; no result changes by it.
        self.savings: dict[str, Callable[[], None]] = {}
        if not (self.encoder_is_frozen and self.language_is_frozen):
            self.savings[ONE_BY_ONE] = partial(setattr, self, "image_by_image", True)
            self.savings[RECOMPUTING] = self.model.recompute_blocks
        self.head = self.model.detail
        self.start = self.base = self.reference_values = self.values()
        self.load_language = load_language
        self.language_hash = ""  # of a language model that is not in `model`
        self.states = FeatureStore()
        self.images_per_pass = 1 if self.model.device.type == "cpu" else IMAGES_PER_PASS
        self._language: Sa2VA | None = self.model if self.model.lm is not None else None
        self._kept: dict[str, Tensor] = {}  # states by key and by `image_key`, for the whole run
        self._states: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}

    def shard(self, device: str) -> None:
        """Moves the model from the CPU to the device, in shares, see `shard_layers`."""
        self.identity = partial(str, processes.from_main(self.identity))  # while the weights are whole
        shard_layers(self.model, device)
        self.start = self.base = self.reference_values = self.values()
        blank = self._inputs([np.zeros((8, 8, 3), np.uint8)])
        processes.blank_pass = torch.no_grad()(partial(self.model.seg_states, blank))
        processes.blank_pass()  # what inference mode allocated could not be used for gradients

    # ---- As a model in training, see `checkpoint.Model`

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image."""
        return self.predict_batch([image])[0]

    def predict_batch(self, images: list[np.ndarray]) -> list[Prediction]:
        """Segments several images in one pass."""
        self.peft_model.eval()
        return self._in_one_pass(self.predictor.predict_batch, images)

    def _in_one_pass(self, compute: Callable[[list], Sequence], images: list[np.ndarray]) -> Sequence:
        """What a pass gives of images; where memory does not suffice, from then on of one at a time."""
        try:
            return compute(images)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        logger.warning("out of memory: from now on one image at a time goes through the model")
        self.images_per_pass = 1
        return [*chain.from_iterable(compute([image]) for image in images)]

    def values(self) -> dict[str, Tensor]:
        """Returns a copy of the trainable values."""
        names = self.trainable if self.model.detail else _without_head(self.trainable)
        return {name: self.trainable[name].detach().clone() for name in names}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Sets the trainable values; without those of a detail head the model has none."""
        for name, value in values.items():
            self.trainable[name].data.copy_(value)
        self.model.detail = self.head if len(values) == len(self.trainable) else None

    def distance(self, start: dict[str, Tensor] | None = None) -> float:
        """Euclidean distance of the adapters from `start`, by default their own."""
        return lora.adapter_delta_norm(self.peft_model, start or self.start)

    def save(self, folder: Path) -> None:
        """Writes the adapter in PEFT's layout; of several processes the main one does."""
        if processes.is_main():
            lora.save_adapter(self.peft_model, folder)

    def identity(self) -> str:
        """Hash of base weights, the adapters' start, configuration, tokenizer and prompt."""
        weights = {n: v for n, v in self.model.state_dict().items() if ".lora_" not in n} | self.start
        tokenizer = self.processor.tokenizer.backend_tokenizer.to_str()
        return tensors_hash(weights, f"{self.model.config} {tokenizer} {self.prompt}{self.language_hash}")

    def batch_logits(self, images: list[np.ndarray], keys: list[str]) -> list[Tensor]:
        """Logits (H, W) per image for a supervised step, with LoRA dropout; the frozen model has none."""
        self.peft_model.train()
        inputs = self.prepare(images)
        decoded = self.decode(inputs, keys)
        logits = self.logits(decoded, decoded.best(), inputs)
        self.peft_model.eval()
        return logits

    def check_gradients(self) -> None:
        """Raises LearningError for first gradients that miss an adapter, or reach frozen weights."""
        lora.check_gradients(self.peft_model)

    # ---- Forward passes

    def prepare(self, images: list[np.ndarray]) -> Sa2VAInputs:
        """Model inputs for a batch, on the model's device."""
        if not self.keys_repeat:
            self._states.clear()
            self._reference.clear()
        return self._inputs(images)

    def _inputs(self, images: list[np.ndarray]) -> Sa2VAInputs:
        return self.processor(images, self.prompt, device=self.model.device)

    def decode(self, inputs: Sa2VAInputs, keys: list[str]) -> DecodedMasks:
        """Candidate masks of a batch; keys name the images, one each."""
        return self.model.decode(self.features(inputs, keys), self.seg_prompts(inputs, keys))

    def features(self, inputs: Sa2VAInputs, keys: list[str | None]) -> ImageFeatures:
        """SAM2's features of a batch; kept ones where the image encoder is frozen, without a key in files."""
        if not (self.encoder_is_frozen or self.image_by_image):
            return self.model.encode_image(inputs.sam_pixels)
        encode = self._frozen_features if self.encoder_is_frozen else lambda x, _: self.model.encode_image(x)
        images = map(encode, inputs.sam_pixels.split(1), keys)
        return ImageFeatures(*(torch.cat(level) for level in zip(*images, strict=True)))

    @torch.no_grad()
    def _frozen_features(self, pixels: Tensor, key: str | None) -> ImageFeatures:
        def encode() -> ImageFeatures:
            features = self.model.encode_image(pixels)
            return ImageFeatures(*map(Tensor.bfloat16, features)) if self.half_features else features

        if self.store is None or not (self.keys_repeat or key is None):
            return encode()
        kept = self.store.fetch(key, pixels, encode)
        return ImageFeatures(*(level.to(pixels.device, non_blocking=True) for level in kept))

    def predict_logits(self, inputs: Sa2VAInputs, images: list[np.ndarray]) -> list[Tensor]:
        """Native-size logits (H, W) of any images, from what is kept of them."""
        keys = [f"predicted {number}" for number in range(len(images))]
        if self.language_is_frozen:
            self.keep_states(zip(keys, images, strict=True))
        decoded = self.model.decode(self.features(inputs, [None] * len(keys)), self.seg_prompts(inputs, keys))
        return self.logits(decoded, decoded.best(), inputs)

    def seg_prompts(self, inputs: Sa2VAInputs, keys: list[str]) -> Tensor:
        """(B, P, C) prompt tokens, from kept [SEG] states where the language model is frozen."""
        if not self.language_is_frozen:
            return self.language().seg_prompts(inputs)
        for index, key in enumerate(keys):
            if key not in self._kept and key not in self._states:
                self._states[key] = self._seg_states(inputs.image(index))
        known = self._states | self._kept
        return self._project(torch.cat([known[key] for key in keys]))

    def _project(self, states: Tensor) -> Tensor:
        projector = self.model.text_hidden_fcs
        return projector(states.to(self.model.device, next(projector.parameters()).dtype))

    @torch.no_grad()
    def _seg_states(self, inputs: Sa2VAInputs) -> Tensor:
        """(B, P, hidden) from the language model, on the CPU; it is loaded for this where it is not there."""
        return self.language().seg_states(inputs).cpu()

    def language(self) -> Sa2VA:
        """The model with the language model, for one pass; it is loaded where it is not there."""
        processes.announce_pass()
        self._language = self._language or self.load_language()
        return self._language

    def keep_states(self, items: Iterable[tuple[str, np.ndarray]]) -> int:
        """Keeps the [SEG] states of images (key, uint8) for the run; gives how many were not stored."""
        names, waiting, computed = {}, {}, 0
        for key, image in items:
            names[key] = content = image_key(image)
            if content in self._kept or content in waiting:
                continue
            if (stored := self.states.read(content)) is not None:
                self._kept[content] = stored["state"]
                continue
            waiting[content] = image
            computed += 1
            if len(waiting) >= self.images_per_pass:
                self._compute_states(waiting)
                waiting = {}
        if waiting:
            self._compute_states(waiting)
        self._kept |= {key: self._kept[content] for key, content in names.items()}
        return computed

    def gather_states(self) -> None:
        """Keeps what all processes keep."""
        self._kept |= dict(processes.gather([*self._kept.items()]))

    def _compute_states(self, images: dict[str, np.ndarray]) -> None:
        states = self._in_one_pass(lambda x: self._seg_states(self._inputs(x)).split(1), [*images.values()])
        for content, state in zip(images, states, strict=True):
            self._kept[content] = state.clone()
            self.states.write(content, {"state": self._kept[content]})

    def drop_language(self) -> None:
        """Gives the memory of a frozen language model back, until an image comes whose state is not kept."""
        self._language = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def image_effect(self, images: list[np.ndarray]) -> float:
        """Relative change of the [SEG] prompts by the negative of an image, of a kept one if there is."""
        if PROBE in self._kept:
            states = [self._kept[key] for key in (PROBE, NEGATIVE)]
        else:
            negatives = [255 - image for image in images]
            states = [self._seg_states(self.prepare(batch)) for batch in (images, negatives)]
        one, other = map(self._project, states)
        return float((one - other).norm() / one.norm())

    def logits(self, decoded: DecodedMasks, choice: Tensor, inputs: Sa2VAInputs) -> list[Tensor]:
        """Native-size logits (H, W) per image of the chosen candidates (B, P), refined by a detail head."""
        return self.model.native_logits(decoded, choice, inputs)

    # ---- The reference of the KL term

    def freeze_reference(self, values: dict[str, Tensor] | None = None) -> None:
        """Makes these values the reference, by default the present ones; PPO does so when it begins."""
        self.reference_values = self.values() if values is None else values
        self._reference.clear()

    def reference_logits(self, inputs: Sa2VAInputs, keys: list[str], choice: Tensor) -> list[Tensor]:
        """Native-size logits of the reference policy for the current policy's choice of candidates."""
        if any(key not in self._reference for key in keys):
            with torch.no_grad(), with_values(self, self.reference_values):
                decoded = self.decode(inputs, keys)
            self._reference.update(zip(keys, decoded.logits.cpu().unbind(0), strict=True))
        stored = torch.stack([self._reference[key] for key in keys]).to(self.model.device)
        decoded = DecodedMasks(stored, stored.new_zeros(stored.shape[:3]))
        values = with_values(self, self.reference_values) if self.model.detail else nullcontext()
        with torch.no_grad(), values:
            return self.logits(decoded, choice, inputs)


def _without_head(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if ".detail." not in name}


def load_policy(config: TrainConfig, device: str, train: Sequence[Sample] = ()) -> MaskPolicy:
    """The model with new adapters, or with those of `init_lora`; `train` are the images that it will see."""
    s, seed = config.model, config.optim.seed
    dtype = torch.bfloat16 if s.use_bf16 else torch.float32
    source = partial(base_checkpoint, s.model_path, seed)
    adapter = None if s.init_lora is None else lora.adapter_folder(s.init_lora)
    trains_language = "language_model" in s.lora_scope if adapter is None else lora.adapts_language(adapter)
    is_sharded = trains_language and processes.use_fsdp()
    torch.manual_seed(seed)  # LoRA's first matrices are random
    with source() as folder:
        first = "cpu" if s.use_nf4 or is_sharded else device
        model, processor = load_sa2va(folder, first, dtype, without=HEAD if trains_language else LANGUAGE)
    if s.use_nf4 and trains_language:
        to_nf4(model)
        model.to(device)
    model.autocasts = s.use_bf16 and device != "cpu"  # however it was loaded
    logger.info("model %s", describe_config(model.config, processor))
    if adapter is not None:
        peft_model = lora.load_adapter(model, adapter, is_trainable=True)
    else:
        own = {n: v for n in ("rank", "alpha", "dropout") if (v := getattr(s, f"lora_{n}")) is not None}
        peft_model = lora.attach_lora(model, s.lora_scope, lora.LORA_PRESETS[s.lora_preset]._replace(**own))
    if adds_head := s.detail_head != "none" and model.detail is None:
        model.detail = (load_detail_head() if s.detail_head == "pretrained" else DetailHead()).to(device)
    if model.detail:
        model.detail.requires_grad_(True)
    keys_repeat = bool(config.run.sanity_overfit) or get_augmentation(config.data.augment).is_none

    def load_language() -> Sa2VA:
        with source() as folder:
            return load_sa2va(folder, device, dtype, without=MASKS + HEAD)[0]

    policy = MaskPolicy(peft_model, processor, s.prompt, keys_repeat, load_language)
    if is_sharded:
        policy.shard(device)
    if adds_head:
        policy.base = _without_head(policy.start)
    policy.predictor.tile_px = config.data.tile_px
    policy.keys_repeat &= not policy.predictor.tiling.cuts_any(train)
    policy.half_features = dtype == torch.bfloat16
    encoder = model.sam.vision_encoder if policy.encoder_is_frozen else None
    policy.store = feature_store(config.run, encoder, "_bf16" * policy.half_features)
    needed = config.optim.batch_size * activation_bytes(model.config.sam2) * (not policy.encoder_is_frozen)
    if processes.any_of(needed > total_memory(device) / 2):
        logger.info("activations would take %.1f GB: %s", needed / 1e9, RECOMPUTING)
        policy.savings.pop(RECOMPUTING)()
    if policy.language_is_frozen:
        cache = Path(config.run.output_dir) / "cache" / "states" if config.run.cache_gb else None
        with source() as folder:
            files = Path(folder), None if s.model_path == RANDOM_MODEL else cache
            policy.language_hash = processes.from_main(partial(language_hash, *files, policy.language))
        # All that decides a state to the last bit, but the image.
        versions = [dtype, torch.device(device).type, torch.__version__, transformers.__version__]
        about = [policy.language_hash, model.config, processor.tokenizer.backend_tokenizer.to_str(), s.prompt]
        name = json_hash({"about": [*map(str, (*about, *versions))]})[:16]
        policy.states = FeatureStore(cache, name, disk_bytes=round(config.run.cache_gb * GIB))
    return policy


def keep_states(policy: MaskPolicy, train: Sequence[Sample], others: Sequence[Sample]) -> None:
    """Reads or computes the [SEG] states of all images of a run, so that a frozen language model can go.

    Where training images are augmented it stays, and the states are those of the others.
    """
    if not policy.language_is_frozen:
        return
    started, samples = time.perf_counter(), [*(train if policy.keys_repeat else ()), *others]
    probe = load_image(train[0])
    pair = {PROBE: probe, NEGATIVE: 255 - probe}.items()
    tiling = policy.predictor.tiling

    def images() -> Iterator[tuple[str, np.ndarray]]:
        for sample in logged(processes.share(samples), "[SEG] states"):
            image = load_image(sample)
            if not tiling.cuts(*image.shape[:2]):
                yield sample.key, image
                continue
            yield from ((f"{sample.key} tile {k}", tile) for k, tile in enumerate(tiling.pieces(image)))

    new = policy.keep_states(chain(pair, images()))
    policy.gather_states()
    took = time.perf_counter() - started
    logger.info("[SEG] states: %d images, %d computed, %.1f s", len(samples), new, took)
    if policy.keys_repeat:
        policy.drop_language()
        logger.info("vision tower and language model are not needed any more: unloaded")
    else:
        logger.info("crops or augmentation change the training images: nothing is kept of them")
