"""How checkpoints store each parameter; reads the parameter tree piece by piece.

Both file formats hold one matrix [out, in] per block. Our tree stacks the blocks and splits the heads. Only
the tables below know how the two correspond.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.errors import UserError
from opd_jax.models import int8, transformer
from opd_jax.models.config import ModelConfig

# Beginnings of tensor names that wrappers of a model leave in a checkpoint.
PREFIXES = {
    "module.": "PyTorch's DistributedDataParallel puts there",
    "_orig_mod.": "torch.compile puts there",
    "base_model.model.": "PEFT puts there",
    "model.language_model.": "a model of images and text puts there",
}


class Stored(NamedTuple):
    """A parameter in a checkpoint.

    Attributes:
      hf, gguf: tensor names; "{layer}" and "{expert}" stand for numbers. "" means that GGUF does not have it.
      axes: the stored tensor's axes; each is a group of the logical axes that it flattens, in order.
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
    name: Stored(f"model.layers.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}", axes)
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
# These replace the dense feed-forward in a sparse model's blocks. No supported GGUF architecture has them.
EXPERTS = {
    name: Stored(f"model.layers.{{layer}}.mlp.{hf}", "", axes)
    for name, (hf, axes) in {
        "router": ("gate.weight", (("router",), _EMBED)),
        "gate": ("experts.{expert}.gate_proj.weight", (_FFN, _EMBED)),
        "up": ("experts.{expert}.up_proj.weight", (_FFN, _EMBED)),
        "down": ("experts.{expert}.down_proj.weight", (_EMBED, _FFN)),
    }.items()
}
# Axes along which a checkpoint has separate tensors, and the field for their number in a tensor's name.
_SPREAD = {"layers": "layer", "experts": "expert"}


class Tensor(NamedTuple):
    """One stored tensor.

    Attributes:
      name: in the file.
      shape: in the file.
      path: keys of the parameter that it is a part of.
      index: its place in that parameter: the block's number, the block's and the expert's, or nothing.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int, ...]


def tensors(config: ModelConfig, file_format: str) -> list[Tensor]:
    """All tensors of a checkpoint of this model, block by block; file_format is "hf" or "gguf"."""
    declared, axes = transformer.abstract(config), transformer.declared_axes(config)

    def parts(path, like, names):
        stored = _stored(path, names)
        size = dict(zip(names, like.shape))
        shape = tuple(math.prod(size[axis] for axis in group) for group in stored.axes)
        spread = [axis for axis in names if axis in _SPREAD]
        for index in np.ndindex(*(size[axis] for axis in spread)):
            yield Tensor(_name(stored, file_format, spread, index), shape, path, index)

    top = {name: parts((name,), declared[name], axes[name]) for name in TOP if name in declared}
    blocks = [
        tensor
        for name in BLOCKS | EXPERTS
        if name in declared["blocks"]
        for tensor in parts(("blocks", name), declared["blocks"][name], axes["blocks"][name])
    ]
    blocks.sort(key=lambda tensor: tensor.index[0])
    return [*top.pop("embedding"), *blocks, *(tensor for part in top.values() for tensor in part)]


def _stored(path: tuple[str, ...], axes: tuple[str, ...]) -> Stored:
    """How a parameter with these logical axes is stored."""
    if path[0] != "blocks":
        return TOP[path[0]]
    return EXPERTS[path[1]] if "experts" in axes or "router" in axes else BLOCKS[path[1]]


def _name(stored: Stored, file_format: str, spread, index) -> str:
    """A tensor's name at one index along the spread axes."""
    numbers = dict(zip((_SPREAD[axis] for axis in spread), index))
    return getattr(stored, file_format).format(**numbers)


def check_shapes(config: ModelConfig, file_format: str, found: dict, where: str):
    """Refuses a checkpoint that lacks a tensor, has an extra one, or has one of another shape.

    Args:
      found: tensor name -> shape, from the file.
      where: the config key and the path, with which each message starts.

    Raises:
      UserError: names the first such tensor and how many more there are.
    """
    least = config.layers * max(config.experts, 1)
    if least > len(found):
        raise UserError(
            f"{where} has {len(found)} tensors, fewer than the {least} that its config asks for; is it"
            f" a complete {config.family} model?"
        )
    wanted = {tensor.name: tensor.shape for tensor in tensors(config, file_format)}
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in found) and not any(
            name.startswith(prefix) for name in wanted
        ):
            raise UserError(
                f"{where}: the names of its tensors begin with {prefix!r}, which {PREFIXES[prefix]}; save the"
                " model itself"
            )
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
            raise UserError(f"{where} {problem} {names[0]}{more}; is it a complete {config.family} model?")
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
    """Builds the parameter tree with one block of one parameter on the host at a time.

    Experts make a block's parameter hundreds of times larger, so of these the host holds one per device at a
    time.

    A model with int8 weights is quantised on the devices, block by block, because a channel's largest value
    may be on another device. Only one block is in floating point at a time.

    Args:
      read: (tensor name, slice of each stored axis) -> that part of the stored tensor.
      dtype: of the parameters; of int8 parameters, before they are quantised.
      mesh: every parameter is replicated on it if there are no shardings.
      shardings: a tree of NamedShardings like the parameters; a process reads only its devices' parts.
    """
    declared = transformer.abstract(config.replace(weights="float"), dtype)
    axes = transformer.declared_axes(config)
    if shardings is None:
        replicated = mesh and NamedSharding(mesh, PartitionSpec())
        shardings = jax.tree.map(lambda _: replicated, declared)

    def build(path, like, names, sharding):
        path = tuple(key.key for key in path)
        stored = _stored(path, names)
        summed = int8.summed_axes(path[-1], names) if config.weights == "int8" else ()
        placing = sharding.values if int8.is_quantised(sharding) else sharding
        name = getattr(stored, file_format)
        if path[0] != "blocks":
            value = _place(_PartReader(name, stored.axes, like, names, read), placing)
            return _quantise(sharding, summed)(value) if summed else value
        zeros, put = _programs(sharding, tuple(axis - 1 for axis in summed))
        whole = zeros(like.shape, like.dtype)
        block_sharding = placing and NamedSharding(placing.mesh, PartitionSpec(*placing.spec[1:]))
        shape, turns = like.shape[1:], 1
        if names[1] == "experts":
            ways = _ways(block_sharding)
            shape, turns = (ways, *shape[1:]), shape[0] // ways
        block = jax.ShapeDtypeStruct(shape, like.dtype)
        for layer, turn in np.ndindex(config.layers, turns):
            of_layer = name.replace("{layer}", str(layer))
            reader = _PartReader(of_layer, stored.axes, block, names[1:], read, (turns, turn))
            whole = put(whole, _place(reader, block_sharding), layer, turn)
        # Without this the host could run ahead and hold every block that the device has not received yet.
        return jax.block_until_ready(whole)

    return jax.tree_util.tree_map_with_path(build, declared, axes, shardings)


def check_finite(params: dict, file_format: str, where: str, mesh=None):
    """Refuses parameters of which one holds NaN or infinity. Call it in every process of the mesh.

    Args:
      params: the tree that `read_tree` returned.
      where: the config key and the path, with which the message starts.

    Raises:
      UserError: names the first such parameter as the file does.
    """
    floats = [
        (path, x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    whole = mesh and NamedSharding(mesh, PartitionSpec())
    found = _all_finite(whole)([x for _, x in floats])
    for (path, x), finite in zip(floats, jax.device_get(found), strict=True):
        if not finite:
            names = [key.key for key in path if hasattr(key, "key")]
            tables = (TOP,) if names[0] != "blocks" else (BLOCKS, EXPERTS)
            stored = next(table[name] for table in tables for name in names if name in table)
            name = getattr(stored, file_format).replace("{layer}", "*").replace("{expert}", "*")
            raise UserError(
                f"{where}: {name} holds a number that is not finite as {x.dtype}; copy the file again, or"
                " export the model from an earlier checkpoint"
            )


@functools.cache
def _all_finite(sharding):
    """Compiled: whether each of a list of arrays is finite."""
    return jax.jit(lambda arrays: jnp.stack([jnp.isfinite(x).all() for x in arrays]), out_shardings=sharding)


def _ways(sharding: NamedSharding | None) -> int:
    """Number of parts into which a sharding cuts the first axis."""
    if sharding is None or not sharding.spec:
        return 1
    axes = sharding.spec[0]
    axes = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[axis] for axis in axes if axis is not None)


def _place(reader: "_PartReader", sharding):
    """The array of a reader's parameter on its devices; on the first device if sharding is None."""
    if sharding is None:
        return jnp.asarray(reader((slice(None),) * len(reader.like.shape)))
    return jax.make_array_from_callback(reader.like.shape, sharding, reader)


@functools.cache
def _quantise(sharding, summed: tuple[int, ...]):
    """Compiled quantise(weight)."""
    return jax.jit(functools.partial(int8.quantise, summed=summed), out_shardings=sharding)


@functools.cache
def _programs(sharding, summed: tuple[int, ...]):
    """zeros(shape, dtype), and put(whole, block, layer, turn), which writes one block into `whole` in place.

    `whole` is quantised over the axes `summed` of a block; `block` is in floating point. If a block has fewer
    rows than `whole`, its rows are row `turn` of each of as many equal stretches.
    """

    def zeros(shape, dtype):
        block = jax.eval_shape(lambda: int8.quantise(jnp.zeros(shape[1:], dtype), summed))
        return jax.tree.map(lambda like: jnp.zeros((shape[0], *like.shape), like.dtype), block)

    def put(whole, block, layer, turn):
        def write(whole, block):
            # As bits: to write a 16-bit block, XLA's CPU compiler would convert all of `whole` to float32.
            unsigned = f"uint{8 * whole.dtype.itemsize}"
            bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=unsigned)
            layers, rows, *rest = whole.shape
            stretches = bits(whole).reshape(layers, block.shape[0], rows // block.shape[0], *rest)
            at = layer, 0, turn, *(0 for _ in rest)
            written = jax.lax.dynamic_update_slice(stretches, bits(block)[None, :, None], at)
            return jax.lax.bitcast_convert_type(written.reshape(whole.shape), whole.dtype)

        return jax.tree.map(write, whole, int8.quantise(block, summed))

    zeros = jax.jit(zeros, static_argnums=(0, 1), out_shardings=sharding)
    return zeros, jax.jit(put, donate_argnums=0, out_shardings=sharding)


class _PartReader:
    """Reads any rectangular part of one parameter or block. A part that several devices share is read once.

    Args:
      name: of the stored tensor; "{expert}" stands for a number.
      stored_axes: as in `Stored`.
      like: shape and dtype of the parameter or block.
      axes: its logical axes.
      read: read(name, index) of the file.
      experts: (turns, turn): expert i of the block is number i * turns + turn of the checkpoint.
    """

    def __init__(self, name: str, stored_axes, like, axes, read, experts=(1, 0)):
        self.name, self.stored_axes, self.like, self.axes, self.read = name, stored_axes, like, axes, read
        self.size = dict(zip(axes, like.shape))
        self.experts = experts
        self.parts = {}

    def __call__(self, index):
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, self.like.shape))
        if ranges not in self.parts:
            self.parts[ranges] = self._part(dict(zip(self.axes, ranges)))
        return self.parts[ranges]

    def _part(self, ranges):
        if "experts" not in ranges:
            return self._matrix(self.name, ranges).astype(self.like.dtype, copy=False)
        first, last = ranges.pop("experts")
        shape = (last - first, *(stop - start for start, stop in ranges.values()))
        out = np.empty(shape, self.like.dtype)
        turns, turn = self.experts
        for i in range(first, last):
            out[i - first] = self._matrix(self.name.format(expert=i * turns + turn), ranges)
        return out

    def _matrix(self, name, ranges):
        """A part of one stored tensor, with our axes in our order."""
        # Reading cuts a flattened axis along its outermost name. The inner names are cut after reading.
        slab, unflat, inner = [], [], []
        for group in self.stored_axes:
            start, stop = ranges[group[0]]
            step = math.prod(self.size[axis] for axis in group[1:])
            slab.append(slice(start * step, stop * step))
            unflat += [stop - start, *(self.size[axis] for axis in group[1:])]
            inner += [slice(None), *(slice(*ranges[axis]) for axis in group[1:])]
        names = [axis for group in self.stored_axes for axis in group]
        value = self.read(name, tuple(slab)).reshape(unflat)[tuple(inner)]
        return value.transpose([names.index(axis) for axis in ranges])


def to_stored(tensor: Tensor, value: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
    """The inverse of reading, for one tensor: the part of our array at tensor.index, in the file's layout.

    Args:
      axes: the whole parameter's logical axes.
    """
    ours = [axis for axis in axes if axis not in _SPREAD]
    order = [ours.index(axis) for group in _stored(tensor.path, axes).axes for axis in group]
    return np.ascontiguousarray(value.transpose(order)).reshape(tensor.shape)
