"""Shapes of the user's real model, for tests on the meta device."""

import pytest

from vesselrl.models.config import Sa2VAConfig, Sam2Dimensions

# The user's Sa2VA-InternVL3-8B; its config.json is lost, these values are rebuilt from tensor shapes.
VISION_8B = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "qkv_bias": True,
}
LLM_8B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 151679,
    "rope_theta": 1e6,
}


@pytest.fixture(scope="session")
def config_8b() -> Sa2VAConfig:
    return Sa2VAConfig(VISION_8B, LLM_8B, Sam2Dimensions())
