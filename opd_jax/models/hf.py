"""Hugging Face model folders: config.json and safetensors, in and out.

Families: llama (SmolLM2, Llama 2), qwen2 (Qwen2, Qwen2.5) and qwen3, dense. What a config asks for
and this code does not do is refused by name; nothing is loaded approximately.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opd_jax.errors import UserError
from opd_jax.models import transformer, weights
from opd_jax.models.config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Largest weight file that `save` writes, bytes.
SHARD_BYTES = 5 * 10**9
_DTYPES = ("F32", "F16", "BF16")


def load(folder, mesh=None, shardings=None, dtype=jnp.float32, *, key: str = "student.path"):
    """Reads a model folder.

    Args:
      folder: holds config.json and model.safetensors or its sharded form with an index.
      mesh, shardings: where the parameters go, see `weights.read_tree`; default: the first device.
      dtype: of the parameters; the files may hold float32, float16 or bfloat16.
      key: the config key that named the folder, for messages.

    Returns:
      (ModelConfig, params)

    Raises:
      UserError: anything missing, unreadable, unsupported or of another shape.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder, key)
    where = f"{key}: {folder}"
    with contextlib.ExitStack() as stack:
        files = []
        for file in _weight_files(folder, where):
            try:
                files.append(stack.enter_context(safe_open(folder / file, framework="numpy")))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{where}/{file} cannot be read ({_line(error)}); copy it again"
                ) from error
        part_of, shapes = {}, {}
        for file in files:
            for name in list(file.keys()):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # Old exports store this constant of rope_theta.
                if name == "lm_head.weight" and config.tie_embeddings:
                    continue  # A copy of the embedding.
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{where}: {name} is {part.get_dtype()}; supported: {', '.join(_DTYPES)}"
                    )
                part_of[name], shapes[name] = part, part.get_shape()
        weights.check_shapes(config, "hf", shapes, where)
        params = weights.read_tree(
            config,
            "hf",
            lambda name, index: part_of[name][index],
            dtype=dtype,
            mesh=mesh,
            shardings=shardings,
        )
    return config, params


def read_config(folder, key: str = "student.path") -> ModelConfig:
    """The ModelConfig of a folder: its two configs' contents and the tokenizer's length."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}: no folder {folder}; give a model folder, a .gguf file or pkg:NAME")
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {folder} has no config.json; give a Hugging Face model folder")
    config = config_from_json(_read_json(folder / "config.json", key), key)
    if (folder / "generation_config.json").is_file():
        generation = _read_json(folder / "generation_config.json", key)
        ends = set(config.eos_ids) | set(_ids(generation.get("eos_token_id")))
        config = config.replace(eos_ids=tuple(sorted(ends)))
    length = _tokenizer_length(folder, key)
    if length is None:
        return config
    if length > config.vocab_size:
        raise UserError(
            f"{key}: the tokenizer in {folder} has {length} ids, the embedding only"
            f" {config.vocab_size} rows; the folder mixes two models"
        )
    return config.replace(valid_vocab=length)


def config_from_json(raw: dict, key: str = "student.path") -> ModelConfig:
    """The ModelConfig that a config.json describes; absent fields take transformers' defaults.

    Raises:
      UserError: an unsupported model type or feature, or a field that is missing or not a number.
    """
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UserError(f"{key}: model type {family!r} is not supported; supported: {supported}")
    _refuse_unsupported(raw, family, key)

    def positive(name, default=None, kinds=(int,)):
        value = raw.get(name)
        value = default if value is None else value
        if type(value) not in kinds or value <= 0:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(
                f"{key}: config.json needs a positive {names} {name!r}, it has {value!r}"
            )
        return value

    width, heads = positive("hidden_size"), positive("num_attention_heads")
    vocab_size, kv_heads = positive("vocab_size"), positive("num_key_value_heads", heads)
    # transformers' Qwen3 does not derive its head size from the width.
    head_size = positive("head_dim", 128 if family == "qwen3" else width // heads)
    if heads % kv_heads or head_size % 2:
        raise UserError(
            f"{key}: {heads} heads over {kv_heads} key/value heads of size {head_size} is not"
            " grouped-query attention with rotary positions; is config.json damaged?"
        )
    rope = raw.get("rope_parameters") or {}
    eos_ids = _ids(raw.get("eos_token_id"))
    pad_id = raw.get("pad_token_id")
    if pad_id is None or not 0 <= pad_id < vocab_size:
        pad_id = eos_ids[0] if eos_ids else 0
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        valid_vocab=vocab_size,
        width=width,
        layers=positive("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=positive("intermediate_size"),
        rope_theta=float(rope.get("rope_theta") or positive("rope_theta", 1e4, (int, float))),
        norm_eps=float(positive("rms_norm_eps", 1e-6, (int, float))),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        attention_bias=family == "qwen2",
        max_positions=positive("max_position_embeddings", 2048),
        eos_ids=eos_ids,
        pad_id=pad_id,
    )


def config_to_json(config: ModelConfig) -> dict:
    """A config.json that transformers 4 and 5 load: the rotary base is given in both spellings."""
    return {
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
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
    } | ({} if config.attention_bias else {"attention_bias": False})


def save(folder, config: ModelConfig, params: dict, tokenizer=None, *, dtype=None):
    """Writes a model folder that transformers and `load` read; every process calls it.

    One tensor at a time is brought to the host, where one weight file (SHARD_BYTES) is held. The
    folder appears under its name only when it is complete.

    Args:
      folder: must not exist, or be empty.
      tokenizer: a transformers tokenizer to write beside the weights.
      dtype: of the saved weights; default: as the parameters are.

    Raises:
      UserError: the folder holds something already.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another or remove it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    writes = jax.process_index() == 0
    try:
        if writes:
            partial.mkdir(parents=True)
        saved_dtype = _save_weights(partial if writes else None, config, params, dtype)
        if writes:
            _write_json(
                partial / "config.json", config_to_json(config) | {"torch_dtype": saved_dtype}
            )
            generation = {
                "eos_token_id": list(config.eos_ids) or None,
                "pad_token_id": config.pad_id,
            }
            _write_json(partial / "generation_config.json", generation)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            for file in partial.glob("*.safetensors"):
                # safetensors makes files that only their owner may read.
                shutil.copymode(partial / "config.json", file)
            os.replace(partial, folder)
    finally:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)


def _save_weights(folder: Path | None, config, params, dtype) -> str:
    """Writes the safetensors files and, for several, their index; returns the dtype's name."""
    axes = transformer.logical_axes(config)
    dtype = jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype)
    shards, room = [], 0
    for tensor in weights.tensors(config, "hf"):
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= size

    index, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        content = {}
        for tensor in shard:
            value, value_axes = params, axes
            for step in tensor.path:
                value, value_axes = value[step], value_axes[step]
            value = value if tensor.layer is None else value[tensor.layer]
            if isinstance(value, jax.Array) and not value.is_fully_addressable:
                value = multihost_utils.process_allgather(value, tiled=True)
            if folder is not None:
                value = np.asarray(value).astype(dtype)
                content[tensor.name] = weights.to_stored(tensor, value, value_axes)
                total += content[tensor.name].nbytes
        if folder is not None:
            save_file(content, folder / name, metadata={"format": "pt"})
            index |= {tensor.name: name for tensor in shard}
    if folder is not None and len(shards) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": index}
        _write_json(folder / "model.safetensors.index.json", body)
    return dtype.name


def _refuse_unsupported(raw: dict, family: str, key: str):
    """Raises UserError for each feature of the family that this code does not compute."""
    ropes = [raw.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    rope_types = {rope.get("rope_type") or rope.get("type") or "default" for rope in ropes}
    scaling = ", ".join(sorted(rope_types - {"default"}))
    partial = {rope.get("partial_rotary_factor") or 1 for rope in (raw, *ropes)} - {1}
    layer_types = set(raw.get("layer_types") or ())
    windowed = raw.get("use_sliding_window") and not layer_types
    features = {
        f"rotary scaling {scaling!r}": scaling,
        "partial rotary embedding": partial,
        "sliding-window attention": windowed or bool(layer_types - {"full_attention"}),
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        # Qwen2's own biases need no switch; this one also adds a bias to the output projection.
        "attention_bias": family != "qwen2" and raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "a quantised checkpoint (quantization_config)": raw.get("quantization_config"),
    }
    for feature, present in features.items():
        if present:
            raise UserError(f"{key}: this {family} model uses {feature}, which is not supported")


def _weight_files(folder: Path, where: str) -> list[str]:
    """Names of the safetensors files of a folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise UserError(
                f"{where} has no model.safetensors and no index of one; is it a complete download?"
            )
        return ["model.safetensors"]
    weight_map = _read_json(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}: model.safetensors.index.json has no weight_map; copy it again")
    files = sorted(set(map(str, weight_map.values())))
    for file in files:
        if Path(file).name != file:
            raise UserError(
                f"{where}: model.safetensors.index.json points outside the folder, at {file!r}"
            )
        if not (folder / file).is_file():
            raise UserError(
                f"{where} lacks {file}, which its index names; is it a complete download?"
            )
    return files


def _tokenizer_length(folder: Path, key: str) -> int | None:
    """Largest token id + 1 over the tokenizer's files, None without any."""
    ids = []
    if (folder / "tokenizer.json").is_file():
        tokenizer = _read_json(folder / "tokenizer.json", key)
        vocab = tokenizer.get("model", {}).get("vocab", {})
        ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        ids += [token["id"] for token in tokenizer.get("added_tokens", ())]
    elif (folder / "vocab.json").is_file():
        ids += _read_json(folder / "vocab.json", key).values()
    if ids and (folder / "tokenizer_config.json").is_file():
        ids += map(
            int, _read_json(folder / "tokenizer_config.json", key).get("added_tokens_decoder", ())
        )
    return max(ids) + 1 if ids else None


def _ids(value) -> tuple[int, ...]:
    """Token ids given as None, one id or a list."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _read_json(path: Path, key: str) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {path} cannot be read as JSON ({_line(error)}); copy it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{key}: {path} is not a JSON object; copy it again")
    return value


def _write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
