"""GGUF files, llama.cpp's format: weights, tokenizer and chat template in one file. Weights are dequantised.

Architectures: llama, qwen2 and qwen3, dense, with a byte-level BPE tokenizer.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from opd_jax.errors import UserError, reason
from opd_jax.models import rope
from opd_jax.models.config import ModelConfig
from opd_jax.models.files import weights

FAMILIES = ("llama", "qwen2", "qwen3")

# tokenizer.ggml.pre -> how text is split before the merges: (expression, whether each digit is alone).
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
_LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
_SPLITS = {
    "gpt-2": (_GPT2_SPLIT, False),
    "smollm": (_GPT2_SPLIT, True),
    "qwen2": (_QWEN2_SPLIT, False),
    "deepseek-r1-qwen": (_QWEN2_SPLIT, False),
    **dict.fromkeys(_LLAMA3_PRE, (_LLAMA3_SPLIT, False)),
}
# Types that the gguf package dequantises.
QUANTISATIONS = {
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
}
# Scalings of Llama 3.1 (8B, 70B) and Llama 3.2 (1B, 3B), from their config.json.
_LLAMA3 = tuple(rope.Llama3(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
_DIVISORS = "rope_freqs.weight"
# Metadata that is not supported here, and the value at which it has no effect.
_NEUTRAL = {
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
    "rope.scaling.yarn_log_multiplier": None,
    "rope.scale_linear": 1,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": None,
    "logit_scale": None,
    "expert_count": 0,
}
# tokenizer.ggml.token_type values.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# Control tokens that end a response, whichever token the file names as its end of sequence.
_END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def load(
    file,
    mesh=None,
    shardings=None,
    dtype=jnp.float32,
    *,
    key: str = "student.path",
    stored: str = "float",
):
    """Reads a GGUF file. Quantised weights are dequantised to float32, then cast to `dtype`.

    Args:
      mesh, shardings: where the parameters are placed, see `weights.read_tree`; by default the first device.
      key: the config key that named the file, for messages.
      stored: ModelConfig.weights of the returned model; "int8" quantises again while reading.

    Returns:
      (ModelConfig, params)

    Raises:
      UserError: a damaged file, an unsupported architecture, or tensors that do not fit it.
    """
    with _reading(file, key):
        return _load(file, mesh, shardings, dtype, key=key, stored=stored)


def _load(file, mesh, shardings, dtype, *, key: str, stored: str):
    reader = _open(file, key)
    config = config_from_gguf(reader, key)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tensors.pop(_DIVISORS, None)  # part of the config
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    weights.check_shapes(config, "gguf", shapes, f"{key}: {file}")
    config = config.replace(weights=stored)

    def read(name, index):
        tensor = tensors[name]
        rows = read_rows(tensor, index[0])
        if config.family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            rows = _unpermute(rows, config.head_size)
        return rows[:, index[1]] if len(index) == 2 else rows

    params = weights.read_tree(config, "gguf", read, dtype=dtype, mesh=mesh, shardings=shardings)
    weights.check_finite(params, "gguf", f"{key}: {file}", mesh)
    return config, params


def read_rows(tensor: gguf.ReaderTensor, rows: slice) -> np.ndarray:
    """Some rows of a stored tensor in float32; reads nothing else of the file."""
    # A copy, because a tensor stored as F32 is returned as a view of the mapped file.
    return np.array(gguf.dequantize(tensor.data[rows], tensor.tensor_type))


def read_config(file, key: str = "student.path") -> ModelConfig:
    """The ModelConfig of a file; reads no weights."""
    with _reading(file, key):
        return config_from_gguf(_open(file, key), key)


@contextlib.contextmanager
def _reading(file, key: str):
    """Turns what a damaged file makes a reader raise, which may be anything, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{key}: {file} cannot be read ({type(error).__name__}: {reason(error)}); copy it again, or"
            " convert the model again"
        ) from error


def config_from_gguf(reader: gguf.GGUFReader, key: str = "student.path") -> ModelConfig:
    """The ModelConfig that a file's metadata describes.

    Raises:
      UserError: an unsupported architecture or feature, or missing metadata.
    """
    family = _value(reader, "general.architecture")
    if family not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise UserError(f"{key}: GGUF architecture {family!r} is not supported; supported: {supported}")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if _value(reader, "split.count", 1) > 1:
        raise UserError(f"{key}: the GGUF file is one of several parts; merge them with gguf-split first")

    def number(name: str, default: float | None = None) -> Any:
        value = _value(reader, f"{family}.{name}", default)
        if type(value) not in (int, float) or value <= 0:
            raise UserError(f"{key}: the GGUF file needs a positive number {family}.{name}, it has {value!r}")
        # Metadata floats are float32; the shortest decimal is the number that the model's author wrote.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    width, heads = number("embedding_length"), number("attention.head_count")
    head_size = number("attention.key_length", width // heads)
    if number("attention.value_length", head_size) != head_size or (
        number("rope.dimension_count", head_size) != head_size
    ):
        raise UserError(f"{key}: this {family} model has partial rotary embedding or unequal head sizes")
    if "token_embd.weight" not in shapes:
        raise UserError(f"{key}: the GGUF file has no tensor token_embd.weight; is it a complete model?")
    unknown = {t.tensor_type.name for t in reader.tensors} - QUANTISATIONS
    if unknown:
        raise UserError(
            f"{key}: the GGUF file is quantised as {min(unknown)}, which is not supported; supported:"
            f" {', '.join(sorted(QUANTISATIONS))}"
        )
    for name, neutral in _NEUTRAL.items():
        if (value := _value(reader, f"{family}.{name}", neutral)) != neutral:
            raise UserError(
                f"{key}: this {family} model uses {family}.{name}={value}, which is not supported"
            )
    vocab_size = int(shapes["token_embd.weight"][1])
    rope_theta, max_positions = float(number("rope.freq_base", 1e4)), number("context_length")
    rope_scaling = _rope_scaling(reader, rope_theta, head_size, number, key)
    longest = max(max_positions, (rope_scaling and rope_scaling.reach()) or 0)
    window = _value(reader, f"{family}.attention.sliding_window")
    if window and window < longest:
        raise UserError(
            f"{key}: this {family} model uses {family}.attention.sliding_window={window} in a context of"
            f" {longest} tokens, which is not supported"
        )
    tokens, types = _tokens(reader)
    eos_ids = _end_ids(reader, tokens, types)
    pad_id = _value(reader, "tokenizer.ggml.padding_token_id", eos_ids[0] if eos_ids else 0)
    for i in (*eos_ids, pad_id):
        if type(i) is not int or not 0 <= i < vocab_size:
            raise UserError(f"{key}: the GGUF file names {i!r} an end or padding id, of {vocab_size} ids")
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        valid_vocab=min(len(tokens), vocab_size) or vocab_size,
        width=width,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_size=head_size,
        ffn=number("feed_forward_length"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in shapes,
        qk_norm=family == "qwen3",
        attention_bias=family == "qwen2",
        max_positions=longest,
        eos_ids=eos_ids,
        pad_id=pad_id,
    )


def _rope_scaling(reader: gguf.GGUFReader, theta: float, head_size: int, number: Callable, key: str):
    """The file's rotary scaling, or None.

    llama.cpp stores Llama 3's scaling as one divisor per channel. The divisors of Llama 3.1 and 3.2 are
    recognised. `number(name)` reads a positive number of the model's family.
    """
    family = _value(reader, "general.architecture")
    kind = _value(reader, f"{family}.rope.scaling.type", "none")
    divisors = [tensor.data for tensor in reader.tensors if tensor.name == _DIVISORS]
    if divisors:
        plain_C, _ = rope.frequencies(theta, head_size, None)
        for scaling in _LLAMA3:
            stretched_C, _ = rope.frequencies(theta, head_size, scaling)
            wanted_C = plain_C / stretched_C
            if divisors[0].shape == wanted_C.shape and np.allclose(divisors[0], wanted_C, rtol=1e-4):
                return scaling
        raise UserError(
            f"{key}: this {family} model scales its rotary frequencies by {_DIVISORS}, and not as Llama"
            " 3.1 or 3.2 does, which is not supported; load the Hugging Face folder"
        )
    if kind == "none":
        return None
    fields = {"rope_type": kind, "factor": number("rope.scaling.factor")}
    original = _value(reader, f"{family}.rope.scaling.original_context_length")
    if original:
        fields["original_max_position_embeddings"] = original
    try:
        return rope.from_json(fields, number("context_length"))
    except ValueError as error:
        raise UserError(f"{key}: this {family} model uses {error}, which is not supported") from error


def tokenizer_from_gguf(file, key: str = "student.path"):
    """The file's tokenizer as a transformers PreTrainedTokenizerFast, with its chat template.

    Raises:
      UserError: it is not a byte-level BPE tokenizer, or splits text in an unsupported way.
    """
    with _reading(file, key):
        return _tokenizer(file, key)


def _tokenizer(file, key: str):
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    reader = _open(file, key)
    kind, cut = (
        _value(reader, "tokenizer.ggml.model"),
        _value(reader, "tokenizer.ggml.pre", "default"),
    )
    split = _SPLITS.get(cut) if kind == "gpt2" else None
    unsaid = kind == "gpt2" and cut in (None, "default")
    if split is None and not unsaid:
        raise UserError(
            f"{key}: the GGUF file has a tokenizer {kind!r} of type {cut!r}; supported: 'gpt2' of"
            f" type {', '.join(_SPLITS)}"
        )
    tokens, types = _tokens(reader)
    merges = _value(reader, "tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise UserError(f"{key}: the GGUF file has no tokenizer.ggml.{'merges' if tokens else 'tokens'}")
    if split is None:
        raise UserError(
            f"{key}: the GGUF file does not say how its tokenizer splits text (tokenizer.ggml.pre); convert"
            " the model again with a current llama.cpp, or load the Hugging Face folder"
        )
    merges = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 keeps a piece that is a token whole, whatever the merges would give.
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=cut in _LLAMA3_PRE))
    expression, single_digits = split
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True)] * single_digits
        + [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=token_type == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, types)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: _value(reader, f"tokenizer.ggml.{field}_token_id") for name, field in named.items()}
    if wrong := [i for i in ids.values() if i is not None and not (type(i) is int and 0 <= i < len(tokens))]:
        raise UserError(f"{key}: the GGUF file names {wrong[0]!r} a special token, of {len(tokens)} tokens")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_value(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )


def _open(file, key: str) -> gguf.GGUFReader:
    file = Path(file).expanduser()
    try:
        return _reader(file, file.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be opened ({error.strerror})") from error
    # The reader's error for a damaged file depends on where the file is cut.
    except (ValueError, IndexError, KeyError) as error:
        if "GGMLQuantizationType" in str(error):
            raise UserError(f"{key}: {file} has a quantisation unknown here ({error})") from error
        raise UserError(f"{key}: {file} is not a whole GGUF file; copy it again") from error


@functools.lru_cache(maxsize=2)
def _reader(file: Path, modified: int) -> gguf.GGUFReader:
    """The parsed header. It is cached: parsing takes seconds; config, weights and tokenizer need it."""
    return gguf.GGUFReader(file)


def _value(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    """One metadata value as a Python object."""
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _tokens(reader) -> tuple[list[str], list[int]]:
    """(texts, types) of the token ids, without the filler tokens that pad the vocabulary at its end."""
    tokens = _value(reader, "tokenizer.ggml.tokens", [])
    types = _value(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    length = len(types)
    while length and types[length - 1] == _UNUSED:
        length -= 1
    return tokens[:length], types[:length]


def _end_ids(reader, tokens, types) -> tuple[int, ...]:
    """Ids that end a response: those that the file names, and known end tokens of chat formats."""
    fields = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    named = {_value(reader, field) for field in fields} - {None}
    known = {i for i in range(len(tokens)) if types[i] == _CONTROL and tokens[i] in _END_NAMES}
    return tuple(sorted(named | known))


def _unpermute(rows: np.ndarray, head_size: int) -> np.ndarray:
    """Undoes llama.cpp's order of rotary channels, which puts pairs side by side; rows are whole heads."""
    pairs = rows.reshape(-1, head_size // 2, 2, math.prod(rows.shape[1:]))
    return pairs.swapaxes(1, 2).reshape(rows.shape)
