"""Shapes of the user's Sa2VA-InternVL3-8B, rebuilt from its tensors, for tests on the meta device."""

import pytest
import torch

from vesselrl.models.config import Sa2VAConfig, Sam2Dimensions
from vesselrl.models.sa2va import Sa2VA

TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VISION_8B = TOWER | {"image_size": 448, "patch_size": 14, "qkv_bias": True}
LAYERS = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
LLM_8B = LAYERS | {"intermediate_size": 18944, "vocab_size": 151679, "rope_theta": 1e6}


@pytest.fixture
def model_8b() -> Sa2VA:
    with torch.device("meta"):
        return Sa2VA(Sa2VAConfig(VISION_8B, LLM_8B, Sam2Dimensions()))
