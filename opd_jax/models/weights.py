"""How checkpoints store each parameter, and the parameter tree read from them one piece at a time.

Both file formats hold one matrix a block, [out, in]; our tree stacks blocks and splits heads. The
tables below are the only place that knows the correspondence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.errors import UserError
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig


class Stored(NamedTuple):
    """A parameter in a checkpoint.

    Attributes:
      hf, gguf: tensor names; "{}" stands for the block's number.
      axes: the stored tensor's axes, each a group of the logical axes that it flattens, in order.
    """

    hf: str
    gguf: str
    axes: tuple[tuple[str, ...], ...]


_EMBED, _FFN, _VOCAB = ("embed",), ("ffn",), ("vocab",)
_HEADS, _KV_HEADS, _HEAD = ("heads", "head_size"), ("kv_heads", "head_size"), ("head_size",)

TOP = {
    "embedding": Stored("model.embed_tokens.weight", "token_embd.weight", (_VOCAB, _EMBED)),
    "final_norm": Stored("model.norm.weight", "output_norm.weight", (_EMBED,)),
    "head": Stored("lm_head.weight", "output.weight", (_VOCAB, _EMBED)),
}
BLOCKS = {
    name: Stored(f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", axes)
    for name, (hf, gguf, axes) in {
        "attention_norm": ("input_layernorm.weight", "attn_norm.weight", (_EMBED,)),
        "query": ("self_attn.q_proj.weight", "attn_q.weight", (_HEADS, _EMBED)),
        "key": ("self_attn.k_proj.weight", "attn_k.weight", (_KV_HEADS, _EMBED)),
        "value": ("self_attn.v_proj.weight", "attn_v.weight", (_KV_HEADS, _EMBED)),
        "output": ("self_attn.o_proj.weight", "attn_output.weight", (_EMBED, _HEADS)),
        "query_bias": ("self_attn.q_proj.bias", "attn_q.bias", (_HEADS,)),
        "key_bias": ("self_attn.k_proj.bias", "attn_k.bias", (_KV_HEADS,)),
        "value_bias": ("self_attn.v_proj.bias", "attn_v.bias", (_KV_HEADS,)),
        "query_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight", (_HEAD,)),
        "key_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight", (_HEAD,)),
        "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight", (_EMBED,)),
        "gate": ("mlp.gate_proj.weight", "ffn_gate.weight", (_FFN, _EMBED)),
        "up": ("mlp.up_proj.weight", "ffn_up.weight", (_FFN, _EMBED)),
        "down": ("mlp.down_proj.weight", "ffn_down.weight", (_EMBED, _FFN)),
    }.items()
}


class Tensor(NamedTuple):
    """One stored tensor: its name and shape in the file, the parameter and block it belongs to."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None


def tensors(config: ModelConfig, file_format: str) -> list[Tensor]:
    """Every tensor that a checkpoint of this model holds; file_format is "hf" or "gguf"."""
    size = {
        "vocab": config.vocab_size,
        "embed": config.width,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_size": config.head_size,
        "ffn": config.ffn,
    }

    def tensor(path, stored, layer=None):
        name = getattr(stored, file_format).format(layer)
        shape = tuple(math.prod(size[axis] for axis in group) for group in stored.axes)
        return Tensor(name, shape, path, layer)

    declared = transformer.logical_axes(config)
    blocks = [
        tensor(("blocks", name), stored, layer)
        for layer in range(config.layers)
        for name, stored in BLOCKS.items()
        if name in declared["blocks"]
    ]
    top = {name: tensor((name,), stored) for name, stored in TOP.items() if name in declared}
    return [top.pop("embedding"), *blocks, *top.values()]


def check_shapes(config: ModelConfig, file_format: str, found: dict, where: str):
    """Refuses a checkpoint that lacks a tensor, has one too many, or has one of another shape.

    Args:
      found: tensor name -> shape, as the file says.
      where: the config key and the path, the start of each message.

    Raises:
      UserError: naming the first offender and how many more there are.
    """
    wanted = {tensor.name: tensor.shape for tensor in tensors(config, file_format)}
    problems = (
        ("has no tensor", [name for name in wanted if name not in found]),
        (
            "has a tensor that this model does not have:",
            [name for name in found if name not in wanted],
        ),
    )
    for problem, names in problems:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{where} {problem} {names[0]}{more}; is it a complete {config.family} model?"
            )
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(found[name])}, the model's config needs {shape}"
            )


def read_tree(
    config: ModelConfig,
    file_format: str,
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    *,
    dtype,
    mesh=None,
    shardings=None,
) -> dict:
    """Builds the parameter tree, holding one parameter's host copy at a time.

    Args:
      read: (tensor name, slice of each stored axis) -> that part of the stored tensor.
      dtype: of the parameters.
      mesh: without shardings, every parameter is replicated on it.
      shardings: a tree of Shardings like the parameters; a process reads only its devices' parts.
    """
    declared = transformer.abstract(config, dtype)
    axes = transformer.logical_axes(config)
    if shardings is None:
        replicated = mesh and NamedSharding(mesh, PartitionSpec())
        shardings = jax.tree.map(lambda _: replicated, declared)

    def build(path, like, axes, sharding):
        part = _PartReader([key.key for key in path], like, axes, file_format, read)
        if sharding is None:
            return jnp.asarray(part((slice(None),) * len(like.shape)))
        return jax.make_array_from_callback(like.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(build, declared, axes, shardings)


class _PartReader:
    """Reads any rectangular part of one parameter, a part that devices share only once."""

    def __init__(self, path, like, axes, file_format, read):
        self.stored = BLOCKS[path[1]] if path[0] == "blocks" else TOP[path[0]]
        self.name = getattr(self.stored, file_format)
        self.like, self.axes, self.read = like, axes, read
        self.size = dict(zip(axes, like.shape))
        self.parts = {}

    def __call__(self, index):
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, self.like.shape))
        if ranges not in self.parts:
            self.parts[ranges] = self._part(dict(zip(self.axes, ranges)))
        return self.parts[ranges]

    def _part(self, ranges):
        if "layers" not in ranges:
            return self._matrix(self.name, ranges).astype(self.like.dtype)
        first, last = ranges.pop("layers")
        shape = (last - first, *(stop - start for start, stop in ranges.values()))
        out = np.empty(shape, self.like.dtype)
        for layer in range(first, last):
            out[layer - first] = self._matrix(self.name.format(layer), ranges)
        return out

    def _matrix(self, name, ranges):
        """One stored tensor's part, in our axes and their order."""
        # A flattened axis is cut at its outermost name; the names inside are cut after reading.
        slab, unflat, inner = [], [], []
        for group in self.stored.axes:
            start, stop = ranges[group[0]]
            step = math.prod(self.size[axis] for axis in group[1:])
            slab.append(slice(start * step, stop * step))
            unflat += [stop - start, *(self.size[axis] for axis in group[1:])]
            inner += [slice(None), *(slice(*ranges[axis]) for axis in group[1:])]
        names = [axis for group in self.stored.axes for axis in group]
        value = self.read(name, tuple(slab)).reshape(unflat)[tuple(inner)]
        return value.transpose([names.index(axis) for axis in ranges])


def to_stored(tensor: Tensor, value: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
    """The inverse for one block: our array (without its layer axis) as the file stores it."""
    stored = BLOCKS[tensor.path[1]] if tensor.path[0] == "blocks" else TOP[tensor.path[0]]
    ours = [axis for axis in axes if axis != "layers"]
    order = [ours.index(axis) for group in stored.axes for axis in group]
    return np.ascontiguousarray(value.transpose(order)).reshape(tensor.shape)
