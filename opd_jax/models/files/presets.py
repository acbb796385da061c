"""Published models by name: their config.json, for uses that need shapes but no weights."""

from opd_jax.errors import UserError
from opd_jax.models.config import ModelConfig
from opd_jax.models.files import hf_config

PREFIX = "preset:"

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
}
_QWEN3_TOKENS = 151669  # ids of the tokenizer; the embedding has more rows


def _qwen3(width, layers, heads, ffn, tied):
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
    }
    return _QWEN3 | sizes, _QWEN3_TOKENS


def _qwen3_moe(width, layers, heads, experts, expert_ffn):
    raw, tokens = _qwen3(width, layers, heads, 3 * width, False)  # intermediate_size is not used
    sparse = {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "moe_intermediate_size": expert_ffn,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }
    return raw | sparse, tokens


# name -> (config.json, ids of the tokenizer). Source: the config.json of huggingface.co/Qwen/<name>.
PRESETS = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728, True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288, False),
    "Qwen3-14B": _qwen3(5120, 40, 40, 17408, False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 25600, False),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 48, 32, 128, 768),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 94, 64, 128, 1536),
}


def read_config(name: str, key: str = "student.path") -> ModelConfig:
    """The ModelConfig of a preset.

    Raises:
      UserError: no preset of this name.
    """
    if name not in PRESETS:
        raise UserError(f"{key}={PREFIX}{name}: no such preset; use one of {', '.join(PRESETS)}")
    raw, tokens = PRESETS[name]
    return hf_config.from_json(raw, key).replace(valid_vocab=tokens)
