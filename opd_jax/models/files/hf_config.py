"""Reads and writes the config.json of a Hugging Face model.

Families: llama (Llama 2 and 3, SmolLM2), qwen2 (Qwen2, Qwen2.5), qwen3, and qwen3_moe with experts in every
block. A config with a feature that this code does not compute is refused, with the feature's name. No model
is loaded approximately.
"""

import math
from typing import Any

from opd_jax.errors import UserError
from opd_jax.models import rope
from opd_jax.models.config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
LARGEST = 1 << 31  # of a size: what an index of 32 bits reaches
# transformers' defaults of absent fields. In the other families an absent head_dim is hidden_size / heads.
_DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
# Type of each field that is present and not null. Numbers that every model needs are checked one by one.
_TYPES = {
    "an object": (dict, ("rope_scaling", "rope_parameters")),
    "a list of names": (list, ("layer_types", "architectures")),
    "a list": (list, ("mlp_only_layers",)),
    "true or false for": (
        bool,
        ("tie_word_embeddings", "use_sliding_window", "norm_topk_prob", "attention_bias", "mlp_bias"),
    ),
    "a whole number": (int, ("pad_token_id", "sliding_window", "max_window_layers", "decoder_sparse_step")),
    "a number": ((int, float), ("partial_rotary_factor",)),
    "a name": (str, ("model_type", "hidden_act")),
}


def from_json(raw: dict, key: str = "student.path") -> ModelConfig:
    """The ModelConfig that a config.json describes; absent fields take transformers' defaults.

    Args:
      raw: the file's content.
      key: the config key that named the model, for messages.

    Raises:
      UserError: an unsupported model type or feature, or a field that is missing or not a number.
    """
    _check_types(raw, key)
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UserError(f"{key}: model type {family!r} is not supported; supported: {supported}")
    raw = _DEFAULTS[family] | raw

    def checked(name: str, default: float | None, *kinds: type) -> Any:
        value: Any = raw.get(name)
        value = default if value is None else value
        limit = math.inf if float in kinds else LARGEST
        if type(value) not in kinds or not 0 < value < limit:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{key}: config.json needs a positive {names} {name!r}, it has {value!r}")
        return value

    def positive(name: str, default: int | None = None) -> int:
        return checked(name, default, int)

    layers, max_positions = positive("num_hidden_layers"), positive("max_position_embeddings")
    rope_theta, rope_scaling = _rope(raw, family, max_positions, key)
    # Files often keep the original length of a context that YaRN extends.
    max_positions = max(max_positions, (rope_scaling and rope_scaling.reach()) or 0)
    _refuse_unsupported(raw, family, layers, max_positions, key)
    width, heads = positive("hidden_size"), positive("num_attention_heads")
    vocab_size, kv_heads = positive("vocab_size"), positive("num_key_value_heads", heads)
    head_size = positive("head_dim", width // heads)
    if heads % kv_heads or head_size % 2:
        raise UserError(
            f"{key}: {heads} heads over {kv_heads} key/value heads of size {head_size} is not"
            " grouped-query attention with rotary positions; is config.json damaged?"
        )
    eos_ids = end_ids(raw, vocab_size, f"{key}: config.json")
    pad_id = raw.get("pad_token_id")
    if pad_id is None or not 0 <= pad_id < vocab_size:
        pad_id = eos_ids[0] if eos_ids else 0
    experts: dict[str, Any] = {}
    if family == "qwen3_moe":
        raw.setdefault("num_local_experts", raw["num_experts"])
        experts = {
            "experts": positive("num_local_experts"),
            "experts_per_token": positive("num_experts_per_tok"),
            "normalise_experts": bool(raw.get("norm_topk_prob", False)),
        }
        if experts["experts_per_token"] > experts["experts"]:
            raise UserError(
                f"{key}: config.json has num_experts_per_tok={experts['experts_per_token']} of"
                f" {experts['experts']} experts; is it damaged?"
            )
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        valid_vocab=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=positive("moe_intermediate_size" if experts else "intermediate_size"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=float(checked("rms_norm_eps", 1e-6, int, float)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        attention_bias=family == "qwen2",
        max_positions=max_positions,
        eos_ids=eos_ids,
        pad_id=pad_id,
        **experts,
    )


def to_json(config: ModelConfig) -> dict:
    """A config.json for transformers 4 and 5, with the rotary settings in both spellings."""
    scaling = rope.to_json(config.rope_scaling)
    fields = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = scaling
    if not config.attention_bias:
        fields["attention_bias"] = False
    if config.experts:
        fields |= {
            "moe_intermediate_size": config.ffn,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalise_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return fields


def end_ids(raw: dict, vocab_size: int, where: str) -> tuple[int, ...]:
    """eos_token_id of a config: none, one id or a list.

    Raises:
      UserError: not ids of the vocabulary; `where` names the file.
    """
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise UserError(f"{where} has eos_token_id={value!r}; give ids from 0 to {vocab_size - 1}")
    return tuple(ids)


def _check_types(raw: dict, key: str):
    """Refuses a field of the wrong type."""
    for what, (kind, names) in _TYPES.items():
        for name in names:
            value = raw.get(name)
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if what == "a list of names" and isinstance(value, list):
                right = all(isinstance(item, str) for item in value)
            if value is not None and not right:
                raise UserError(f"{key}: config.json needs {what} {name!r}, it has {value!r}")


def _rope(raw: dict, family: str, max_positions: int, key: str):
    """(rope_theta, scaling) in either spelling. If both are present the old one wins, as in transformers."""
    fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = fields.get("rope_theta") or raw.get("rope_theta") or 1e4
    if type(theta) not in (int, float) or not 1 < theta < math.inf:
        raise UserError(f"{key}: config.json needs a number above 1 'rope_theta', it has {theta!r}")
    if raw.get("original_max_position_embeddings"):
        fields = fields | {"original_max_position_embeddings": raw["original_max_position_embeddings"]}
    try:
        return float(theta), rope.from_json(fields, max_positions)
    except ValueError as error:
        raise UserError(f"{key}: this {family} model uses {error}, which is not supported") from error


def _refuse_unsupported(raw: dict, family: str, layers: int, max_positions: int, key: str):
    """Raises UserError for each feature of the family that this code does not compute."""
    ropes = (raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {})
    architectures = [name for name in raw.get("architectures") or () if name != ARCHITECTURES[family]]
    kinds = set(raw.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    features = {
        "partial rotary embedding (partial_rotary_factor)": any(
            (fields.get("partial_rotary_factor") or 1) != 1 for fields in ropes
        ),
        f"attention of kind {min(kinds, default=None)!r} (layer_types)": kinds,
        "sliding-window attention": _slides(raw, family, layers, max_positions, key),
        f"activation {raw.get('hidden_act')!r} (hidden_act)": raw.get("hidden_act", "silu") != "silu",
        # Qwen2 has biases without this switch, which would also add a bias to the output projection.
        "attention_bias": family != "qwen2" and raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "a quantised checkpoint (quantization_config)": raw.get("quantization_config"),
        f"architecture {' and '.join(architectures)}": architectures,
    }
    if family == "qwen3_moe":
        dense = "dense blocks among the sparse ones"
        features |= {
            f"{dense} (mlp_only_layers)": raw.get("mlp_only_layers"),
            f"{dense} (decoder_sparse_step)": raw.get("decoder_sparse_step", 1) != 1,
        }
    for feature, present in features.items():
        if present:
            raise UserError(f"{key}: this {family} model uses {feature}, which is not supported")


def _slides(raw: dict, family: str, layers: int, max_positions: int, key: str) -> bool:
    """Whether some block sees less than the whole context. A window as long as the context has no effect.

    Args:
      max_positions: length of the context, extended by the rotary scaling.
    """
    kinds = raw.get("layer_types")
    if kinds is None:
        if not raw.get("use_sliding_window") or family == "llama":
            return False
        # transformers' Qwen3MoE ignores max_window_layers and applies the window in every block.
        first = 0 if family == "qwen3_moe" else raw.get("max_window_layers", 28)
        if first is None:
            raise UserError(f"{key}: config.json needs a whole number 'max_window_layers', it has None")
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    return "sliding_attention" in kinds and (raw.get("sliding_window") or 4096) < max_positions
