"""Reads and writes Hugging Face model folders: config.json (see hf_config.py) and safetensors."""

import contextlib
import functools
import json
import operator
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from opd_jax.errors import UserError
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.files import hf_config, safetensors_out, weights

EMBEDDING = "model.embed_tokens.weight"
ROWS = 8192  # of a matrix that is compared at a time
# Weights in other forms, and what to do with them.
OTHER_WEIGHTS = {
    "adapter_model.*": "merge the adapter into its model with PEFT's merge_and_unload, and save that",
    "pytorch_model*.bin": "open the model with transformers and save it with save_pretrained, as safetensors",
    "*.gguf": "give the path of the .gguf file itself",
}
SHARD_BYTES = 5 * 10**9  # of a weight file; a single larger tensor gets a file of its own
_DTYPES = ("F32", "F16", "BF16")


def load(
    folder,
    mesh=None,
    shardings=None,
    dtype=jnp.float32,
    *,
    key: str = "student.path",
    stored: str = "float",
):
    """Reads a model folder.

    Args:
      folder: holds config.json, and model.safetensors or several files with an index.
      mesh, shardings: where the parameters are placed, see `weights.read_tree`; by default the first device.
      dtype: of the parameters; the files may hold float32, float16 or bfloat16.
      key: the config key that named the folder, for messages.
      stored: ModelConfig.weights of the returned model; "int8" quantises while reading.

    Returns:
      (ModelConfig, params)

    Raises:
      UserError: something is missing, unreadable, unsupported or of another shape.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder, key)
    where = f"{key}: {folder}"
    with contextlib.ExitStack() as stack:
        names, index = _weight_files(folder, where)
        files = {}
        for file in names:
            try:
                files[file] = stack.enter_context(safe_open(folder / file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{where}/{file} cannot be read ({_line(error)}); copy it again") from error
        part_of, shapes, file_of, copied_head = {}, {}, {}, None
        for file_name, file in files.items():
            for name in list(file.keys()):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # Old exports store this constant of rope_theta.
                if name == "lm_head.weight" and config.tie_embeddings:
                    copied_head = file.get_slice(name)  # a copy of the embedding
                    continue
                if name in file_of:
                    raise UserError(
                        f"{where}: {name} is in both {file_of[name]} and {file_name}; copy the folder again"
                    )
                if index is not None and index.get(name) != file_name:
                    raise UserError(
                        f"{where}: {name} is in {file_name}, the index has it in {index.get(name)};"
                        " copy the folder again"
                    )
                file_of[name] = file_name
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise UserError(f"{where}: {name} is {part.get_dtype()}; supported: {', '.join(_DTYPES)}")
                part_of[name], shapes[name] = part, part.get_shape()
        weights.check_shapes(config, "hf", shapes, where)
        if config.tie_embeddings and copied_head is not None:
            _check_tied(copied_head, part_of[EMBEDDING], where)
        config = config.replace(weights=stored)
        params = weights.read_tree(
            config,
            "hf",
            lambda name, index: part_of[name][index],
            dtype=dtype,
            mesh=mesh,
            shardings=shardings,
        )
        weights.check_finite(params, "hf", where, mesh)
    return config, params


def read_config(folder, key: str = "student.path") -> ModelConfig:
    """The ModelConfig of a folder, from its two config files and the tokenizer's length."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}: no folder {folder}; give a model folder, a .gguf file or pkg:NAME")
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {folder} has no config.json; give a Hugging Face model folder")
    config = hf_config.from_json(_read_json(folder / "config.json", key), key)
    if (folder / "generation_config.json").is_file():
        generation = _read_json(folder / "generation_config.json", key)
        where = f"{key}: generation_config.json"
        ends = hf_config.end_ids(generation, config.vocab_size, where)
        config = config.replace(eos_ids=tuple(sorted({*config.eos_ids, *ends})))
    length = _tokenizer_length(folder, key)
    if length is None:
        return config
    if length > config.vocab_size:
        raise UserError(
            f"{key}: the tokenizer in {folder} has {length} ids, the embedding only"
            f" {config.vocab_size} rows; the folder mixes two models"
        )
    return config.replace(valid_vocab=length)


def read_generation(folder) -> dict:
    """How a folder's model is meant to be sampled: its generation_config.json and its bos_token_id."""
    folder = Path(folder).expanduser()
    bos = _read_json(folder / "config.json", str(folder)).get("bos_token_id")
    file = folder / "generation_config.json"
    fields = _read_json(file, str(folder)) if file.is_file() else {}
    fields.pop("_from_model_config", None)  # transformers would then take config.json's fields instead
    return {"bos_token_id": bos} | fields


def check_unused(folder):
    """Refuses to save into a folder that is not empty.

    Raises:
      UserError: the folder is not empty; the message names it.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another or remove it")


def save(
    folder,
    config: ModelConfig,
    params: dict,
    tokenizer=None,
    *,
    dtype=None,
    generation: dict | None = None,
):
    """Writes a model folder that transformers and `load` read; every process calls it.

    The host holds one block of one parameter at a time. The folder gets its name when it is complete, and no
    process returns before that.

    Args:
      folder: must not exist, or be empty. Several hosts give the same folder of a shared disk.
      tokenizer: a transformers tokenizer to save with the weights, including its chat template.
      dtype: of the saved weights: float32, float16 or bfloat16; by default the parameters' own.
      generation: further fields of generation_config.json, such as temperature and bos_token_id; end
        and padding ids are the config's.

    Raises:
      UserError: the folder is not empty.
    """
    folder = Path(folder).expanduser()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    writes = jax.process_index() == 0

    def begin():
        check_unused(folder)
        if writes:
            partial.mkdir(parents=True)

    def finish(saved_dtype):
        fields = generation or {}
        others = {"torch_dtype": saved_dtype, "bos_token_id": fields.get("bos_token_id")}
        _write_json(partial / "config.json", hf_config.to_json(config) | others)
        ends = {"eos_token_id": list(config.eos_ids) or None, "pad_token_id": config.pad_id}
        _write_json(partial / "generation_config.json", fields | ends)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        os.replace(partial, folder)

    try:
        _agree(begin)
        saved_dtype, failed = _save_weights(partial if writes else None, config, params, dtype)
        _agree(lambda: finish(saved_dtype) if writes else None, failed)
    finally:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)


def _agree(act, failed: Exception | None = None):
    """Runs act() unless something has failed before. It succeeds or raises in all processes alike.

    Raises:
      The process's own error, or a UserError if only another process failed.
    """
    try:
        if failed is None:
            act()
    except Exception as error:
        failed = error
    others = jax.process_count() > 1 and multihost_utils.process_allgather(np.array(failed is not None)).any()
    if failed is not None:
        raise failed
    if others:
        raise UserError("the model could not be saved; the process that failed says why")


def _save_weights(
    folder: Path | None, config: ModelConfig, params: dict, dtype
) -> tuple[str, Exception | None]:
    """Writes the safetensors files and, for several, their index.

    Args:
      folder: None in a process that helps to gather tensors but does not write.

    Returns:
      (the dtype's name, the OSError that ended writing or None). After an error the process goes on
      gathering, because the others wait for it at every tensor.
    """
    axes = transformer.logical_axes(config)
    dtype = jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype)
    files, room = [], 0
    for tensor in weights.tensors(config, "hf"):
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        if size > room:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(tensor)
        room -= size

    fetch = functools.lru_cache(maxsize=1)(lambda path, index: _fetch(params, path, index))

    def value(tensor):
        """One stored tensor. The experts of a block are neighbours and come from one fetch."""
        block = fetch(tensor.path, tensor.index[:1])
        for name in tensor.index[1:]:
            block = block[name]
        return weights.to_stored(tensor, block.astype(dtype), _leaf(axes, tensor.path))

    def gather(tensor):
        """This process's part in gathering a tensor that another process writes."""
        return fetch(tensor.path, tensor.index[:1])

    index, total, failed = {}, 0, None
    for number, file in enumerate(files, 1):
        several = f"model-{number:05}-of-{len(files):05}.safetensors"
        name = several if len(files) > 1 else "model.safetensors"
        shapes = {tensor.name: tensor.shape for tensor in file}
        values = map(value if folder is not None else gather, file)
        if folder is not None and failed is None:
            try:
                total += safetensors_out.write(folder / name, shapes, dtype, values)
            except OSError as error:
                if jax.process_count() == 1:
                    raise
                failed = error
        for _ in values:
            pass  # the other processes gather too
        index |= dict.fromkeys(shapes, name)
    if folder is not None and failed is None and len(files) > 1:
        try:
            body = {"metadata": {"total_size": total}, "weight_map": index}
            _write_json(folder / "model.safetensors.index.json", body)
        except OSError as error:
            failed = error
    return dtype.name, failed


def _fetch(params: dict, path: tuple[str, ...], index: tuple[int, ...]) -> np.ndarray:
    """A parameter, or one block of it, on the host of every process."""
    value = _leaf(params, path)
    for layer in index:
        value = value[layer]
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def _leaf(tree: dict, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path of keys."""
    return functools.reduce(dict.__getitem__, path, tree)


def _weight_files(folder: Path, where: str) -> tuple[list[str], dict | None]:
    """Returns (names of the safetensors files, file of each tensor by the index or None without an index)."""
    index = folder / "model.safetensors.index.json"
    alone = (folder / "model.safetensors").is_file()
    if index.is_file() and alone:
        raise UserError(
            f"{where} holds model.safetensors and an index of several files; remove the weights that are old"
        )
    if not index.is_file():
        if alone:
            return ["model.safetensors"], None
        for name, remedy in OTHER_WEIGHTS.items():
            if found := sorted(path.name for path in folder.glob(name)):
                raise UserError(f"{where} holds {found[0]}, which is not read; {remedy}")
        raise UserError(f"{where} has no model.safetensors and no index of one; is it a complete download?")
    weight_map = _read_json(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}: model.safetensors.index.json has no weight_map; copy it again")
    files, there = sorted(set(map(str, weight_map.values()))), {path.name for path in folder.iterdir()}
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{where}: model.safetensors.index.json points outside the folder, at {file!r}")
        if file not in there:
            raise UserError(f"{where} lacks {file}, which its index names; is it a complete download?")
    return files, weight_map


def _check_tied(head, embedding, where: str):
    """Refuses a head that is said to be the embedding and is not.

    Raises:
      UserError: they differ.
    """
    rows = embedding.get_shape()[0]
    same = list(head.get_shape()) == list(embedding.get_shape())
    for first in range(0, rows if same else 0, ROWS):
        part = slice(first, min(first + ROWS, rows))
        same = same and bool(np.array_equal(head[part], embedding[part]))
    if not same:
        raise UserError(
            f"{where}: config.json says tie_word_embeddings, and lm_head.weight is another matrix than"
            f" {EMBEDDING}; set tie_word_embeddings to false in config.json, or remove lm_head.weight"
        )


def _tokenizer_length(folder: Path, key: str) -> int | None:
    """Largest token id + 1 in the tokenizer's files, None without them."""
    ids, length = [], 0
    if (folder / "tokenizer.json").is_file():
        file = folder / "tokenizer.json"
        tokenizer = _read_json(file, key)
        with _ids_of(file, key):
            vocab = (tokenizer.get("model") or {}).get("vocab") or {}
            ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
            ids += [token["id"] for token in tokenizer.get("added_tokens") or ()]
            length = max(map(operator.index, ids), default=-1) + 1
    elif (folder / "vocab.json").is_file():
        file = folder / "vocab.json"
        vocab = _read_json(file, key)
        with _ids_of(file, key):
            length = max(map(operator.index, vocab.values()), default=-1) + 1
    if length and (folder / "tokenizer_config.json").is_file():
        file = folder / "tokenizer_config.json"
        added = _read_json(file, key).get("added_tokens_decoder") or ()
        with _ids_of(file, key):
            length = max(length, 1 + max(map(int, added), default=-1))
    return length or None


@contextlib.contextmanager
def _ids_of(file: Path, key: str):
    """Turns the error of a tokenizer's file that lists its ids in another form into one line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{key}: {file} does not list its tokens and ids as a tokenizer's file does ({_line(error)});"
            " copy it again"
        ) from error


def _read_json(path: Path, key: str) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path} cannot be read as JSON ({_line(error)}); copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{key}: {path} is not a JSON object; copy it again")
    return value


def _write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
