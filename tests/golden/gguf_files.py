"""Small GGUF files of every dense family and the common quantisations: the same bytes wherever they are made.

The golden script loads them with transformers, the tests with our reader; only the logits are kept. Widths
are multiples of 256, the length of a K-quant's block. The gguf package writes no K-quants: their blocks are
random bytes, of which every one is valid, around scales that give weights of a usual size.
"""

from typing import NamedTuple

import gguf
import numpy as np

FAMILIES = ("llama", "qwen2", "qwen3")
KINDS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
CASES = [(family, kind) for family in FAMILIES for kind in KINDS]
WIDTH, FFN, HEADS, KV_HEADS, HEAD_SIZE, LAYERS, VOCAB = 256, 256, 2, 1, 128, 2, 64
TOKENS = np.array([[7, 20, 33, 61, 5, 48]])


class _Scales(NamedTuple):
    """Where a K-quant's block has its float16 scale and, if any, that of its minimums; ratio of the two."""

    scale: int
    minimum: int | None = None
    ratio: float = 0.0


_K_QUANTS = {
    "Q2_K": _Scales(80, 82, 1.5),
    "Q3_K": _Scales(108),
    "Q4_K": _Scales(0, 2, 7.5),
    "Q5_K": _Scales(0, 2, 15.5),
    "Q6_K": _Scales(208),
}


def _blocks(kind: str, shape, rng) -> np.ndarray:
    """Random rows of a K-quant whose weights have a mean near 0 and a standard deviation of width ** -0.5."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    where = _K_QUANTS[kind]

    def rows(scale):
        for at, value in ((where.scale, scale), (where.minimum, scale * where.ratio)):
            if at is not None:
                raw[..., at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        return raw.reshape(shape[0], -1)

    spread = gguf.dequantize(rows(1 / 64), gguf.GGMLQuantizationType[kind]).std()
    return rows(shape[1] ** -0.5 / spread / 64)


def write(file, family: str, kind: str):
    """One file; matrices of this kind, vectors float32. Llama and Qwen3 are tied, Qwen2 is not."""
    rng = np.random.default_rng((FAMILIES.index(family), KINDS.index(kind)))
    writer = gguf.GGUFWriter(file, family)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    if family == "llama":
        writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges([])
    writer.add_eos_token_id(3)

    def vector(name, size, mean):
        writer.add_tensor(name, (mean + 0.3 * rng.normal(size=size)).astype(np.float32))

    def matrix(name, *shape):
        if kind in _K_QUANTS:
            raw = _blocks(kind, shape, rng)
        else:
            weight = (rng.normal(size=shape) * shape[1] ** -0.5).astype(np.float32)
            raw = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])

    matrix("token_embd.weight", VOCAB, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        vector(f"{block}.attn_norm.weight", WIDTH, 1)
        vector(f"{block}.ffn_norm.weight", WIDTH, 1)
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            matrix(f"{block}.attn_{part}.weight", heads * HEAD_SIZE, WIDTH)
            if family == "qwen2":
                vector(f"{block}.attn_{part}.bias", heads * HEAD_SIZE, 0)
            if family == "qwen3" and part != "v":
                vector(f"{block}.attn_{part}_norm.weight", HEAD_SIZE, 1)
        matrix(f"{block}.attn_output.weight", WIDTH, HEADS * HEAD_SIZE)
        matrix(f"{block}.ffn_gate.weight", FFN, WIDTH)
        matrix(f"{block}.ffn_up.weight", FFN, WIDTH)
        matrix(f"{block}.ffn_down.weight", WIDTH, FFN)
    vector("output_norm.weight", WIDTH, 1)
    if family == "qwen2":
        matrix("output.weight", VOCAB, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
