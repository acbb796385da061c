"""config.json: both spellings, transformers' defaults, and a refusal by name of what is not computed."""

import json
import math
from pathlib import Path

import pytest
import transformers

from opd_jax.errors import UserError
from opd_jax.models import rope
from opd_jax.models.files import hf_config, presets, weights

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def raw_config(name="tiny_llama", **changes):
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def without_rope(**changes):
    return {k: v for k, v in raw_config().items() if not k.startswith("rope")} | changes


def refusal(raw) -> str:
    with pytest.raises(UserError) as caught:
        hf_config.from_json(raw, "teacher.path")
    message = str(caught.value)
    assert "\n" not in message
    assert "teacher.path" in message
    return message


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_the_rotary_base_are_read(spelling):
    config = hf_config.from_json(without_rope(**spelling))
    assert (config.rope_theta, config.rope_scaling) == (5e5, None)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
    ],
)
def test_both_spellings_of_a_rotary_scaling_are_read(spelling):
    config = hf_config.from_json(without_rope(**spelling))
    assert (config.rope_theta, config.rope_scaling) == (5e5, rope.Llama3(8.0, 1.0, 4.0, 8192))


def test_yarn_as_qwen3_documents_it_makes_room_for_the_stretched_context():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    raw = raw_config("tiny_qwen3") | {"max_position_embeddings": 40960, "rope_theta": 1e6}
    del raw["rope_parameters"]
    config = hf_config.from_json(raw | {"rope_scaling": yarn})
    assert config.max_positions == 131072
    assert config.rope_scaling.attention_factor == pytest.approx(1.138629436, abs=1e-8)


@pytest.mark.parametrize("name", [path.parent.name for path in GOLDEN.glob("*/config.json")])
def test_what_is_written_reads_back_as_the_same_config_in_either_spelling(name):
    config = hf_config.from_json(raw_config(name))
    written = json.loads(json.dumps(hf_config.to_json(config)))
    assert hf_config.from_json(written) == config
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    assert hf_config.from_json(old) == config


@pytest.mark.parametrize("family", hf_config.ARCHITECTURES)
def test_absent_fields_are_what_transformers_takes(family):
    raw = {"model_type": family, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 32}
    config = hf_config.from_json(raw)
    theirs = transformers.AutoConfig.for_model(**raw)
    assert config.kv_heads == theirs.num_key_value_heads
    assert config.head_size == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert config.max_positions == theirs.max_position_embeddings
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.experts == getattr(theirs, "num_experts", 0)
    assert config.experts_per_token == getattr(theirs, "num_experts_per_tok", 0)
    assert config.normalise_experts == getattr(theirs, "norm_topk_prob", False)
    assert config.ffn == getattr(theirs, "moe_intermediate_size", 48)


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts"])
def test_both_spellings_of_the_number_of_experts_are_read(spelling):
    raw = raw_config("tiny_moe")
    del raw["num_local_experts"]
    assert hf_config.from_json(raw | {spelling: 10}).experts == 10


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gemma3"}, "gemma3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "without 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "extrapolation_factor": 2}}, "extrapolation"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_parameters": {"mrope_section": [4, 4]}}, "mrope_section"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding-window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_key_value_heads": 2}, "grouped-query"),
        ({"rope_scaling": "yarn"}, "an object 'rope_scaling', it has 'yarn'"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, "['yarn']"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "factor=inf"),
        ({"rope_theta": math.nan, "rope_parameters": None}, "rope_theta"),
        ({"pad_token_id": "0"}, "'pad_token_id', it has '0'"),
        ({"eos_token_id": "2"}, "eos_token_id='2'"),
        ({"eos_token_id": [2, 128]}, "eos_token_id=[2, 128]; give ids from 0 to 127"),
        ({"sliding_window": "8"}, "'sliding_window', it has '8'"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings', it has 'false'"),
        ({"layer_types": [["full_attention"]]}, "layer_types"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"partial_rotary_factor": [0.5]}, "partial_rotary_factor"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, word):
    assert word in refusal(raw_config() | changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_sparse_models_of_other_kinds_are_refused_by_name(changes, word):
    assert word in refusal(raw_config("tiny_moe") | changes)


@pytest.mark.parametrize(
    ("changes", "slides"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, False),
        ({"use_sliding_window": True, "sliding_window": 256}, False),  # as long as the context
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, False),  # of 3 layers
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, True),
        ({"layer_types": ["full_attention"] * 3, "use_sliding_window": True, "sliding_window": 8}, False),
    ],
)
def test_a_sliding_window_counts_only_where_it_hides_a_token(changes, slides):
    raw = {k: v for k, v in raw_config("tiny_qwen2").items() if k != "layer_types"}
    if slides:
        assert "sliding-window" in refusal(raw | changes)
    else:
        assert hf_config.from_json(raw | changes) == hf_config.from_json(raw)


def test_a_window_is_compared_with_the_context_as_yarn_stretches_it():
    raw = {k: v for k, v in raw_config("tiny_qwen2").items() if k not in ("layer_types", "rope_parameters")}
    raw |= {"max_position_embeddings": 32768, "use_sliding_window": True, "sliding_window": 32768}
    raw |= {"max_window_layers": 0}
    assert hf_config.from_json(raw).max_positions == 32768
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert "sliding-window" in refusal(raw | {"rope_scaling": yarn})
    long = hf_config.from_json(raw | {"rope_scaling": yarn, "sliding_window": 131072})
    assert long.max_positions == 131072


def test_which_blocks_slide_must_be_said_where_some_do():
    raw = {k: v for k, v in raw_config("tiny_qwen2").items() if k != "layer_types"}
    raw |= {"sliding_window": 8, "max_window_layers": None}
    assert "max_window_layers" in refusal(raw | {"use_sliding_window": True})
    hf_config.from_json(raw | {"use_sliding_window": False})


@pytest.mark.parametrize(("pad", "eos", "want"), [(4, 2, 4), (None, [3, 2], 3), (-1, None, 0)])
def test_padding_falls_back_to_an_end_id_then_to_zero(pad, eos, want):
    assert hf_config.from_json(raw_config(pad_token_id=pad, eos_token_id=eos)).pad_id == want


PUBLISHED = {
    "Llama-3.2-1B": (
        {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
        | {"tie_word_embeddings": True, "vocab_size": 128256}
        | {"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | {"factor": 32.0}},
        1_235_814_400,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 152064}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
        | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
        7_615_616_512,
    ),
    "Qwen3-8B": (
        {"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288},
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "head_dim": 128}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "mlp_only_layers": []},
        30_532_122_624,
    ),
    "Qwen3-235B-A22B": (
        {"model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "vocab_size": 151936}
        | {"num_attention_heads": 64, "num_key_value_heads": 4, "intermediate_size": 12288, "head_dim": 128}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
        235_093_634_560,
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() & presets.PRESETS.keys()))
def test_a_preset_is_the_published_model(name):
    assert presets.read_config(name).parameter_count() == PUBLISHED[name][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_models_have_as_many_parameters_as_their_publishers_say(name):
    raw, published = PUBLISHED[name]
    config = hf_config.from_json(raw)
    assert config.parameter_count() == published
    stored = weights.tensors(config, "hf")
    assert sum(math.prod(tensor.shape) for tensor in stored) == published


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "head_dim"])
def test_a_size_that_no_array_has_is_refused(name):
    assert f"positive int {name!r}, it has {2**63}" in refusal(raw_config("tiny_llama") | {name: 2**63})
