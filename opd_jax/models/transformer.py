"""The decoder-only transformer: its parameters, declared once, and its forward pass.

Parameters are a plain nested dict ("params") with every block's weights stacked along a leading layer
axis; the forward pass is a pure function that scans over it, so compile time does not grow with depth.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from opd_jax.models import attention, bf16_products, few_rows, int8, moe, splash
from opd_jax.models.config import ModelConfig
from opd_jax.parallel import DEFAULT, Layout, sharding

# What the backward pass keeps of each block; see train.remat in docs/configs.md.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

LOOKED_UP = 2**14  # ids whose gradients `look_up` adds at a time


class Block(nnx.Module):
    """The stacked weights of all blocks: every parameter has a leading axis of size config.layers."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        n, d, f = config.layers, config.width, config.ffn
        h, k, c = config.heads, config.kv_heads, config.head_size

        def weight(fan_in, **axes):
            shape = (n, *axes.values())
            init = jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5
            return nnx.Param(init, logical_axes=("layers", *axes), eager_sharding=False)

        def constant(fill, **axes):
            init = jnp.full((n, *axes.values()), fill, dtype)
            return nnx.Param(init, logical_axes=("layers", *axes), eager_sharding=False)

        self.attention_norm = constant(1, embed=d)
        self.query = weight(d, embed=d, heads=h, head_size=c)
        self.key = weight(d, embed=d, kv_heads=k, head_size=c)
        self.value = weight(d, embed=d, kv_heads=k, head_size=c)
        self.output = weight(h * c, heads=h, head_size=c, embed=d)
        if config.attention_bias:
            self.query_bias = constant(0, heads=h, head_size=c)
            self.key_bias = constant(0, kv_heads=k, head_size=c)
            self.value_bias = constant(0, kv_heads=k, head_size=c)
        if config.qk_norm:
            self.query_norm = constant(1, head_size=c)
            self.key_norm = constant(1, head_size=c)
        self.ffn_norm = constant(1, embed=d)
        experts = {}
        if config.experts:
            experts = {"experts": config.experts}
            self.router = weight(d, embed=d, router=config.experts)
        self.gate = weight(d, **experts, embed=d, ffn=f)
        self.up = weight(d, **experts, embed=d, ffn=f)
        self.down = weight(f, **experts, ffn=f, embed=d)


class Transformer(nnx.Module):
    """Declares every parameter with its shape, dtype, initial value and logical axes."""

    def __init__(self, config: ModelConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
        v, d = config.vocab_size, config.width

        def table(key):
            init = jax.random.normal(key, (v, d), dtype) * d**-0.5
            return nnx.Param(init, logical_axes=("vocab", "embed"), eager_sharding=False)

        self.config = config
        self.embedding = table(rngs.params())
        self.blocks = Block(config, dtype, rngs)
        self.final_norm = nnx.Param(jnp.ones((d,), dtype), logical_axes=("embed",), eager_sharding=False)
        if not config.tie_embeddings:
            self.head = table(rngs.params())

    def __call__(self, tokens_BL, mask_BL):
        """Final hidden states [B, L, D]; see `forward`."""
        return forward(self.config, nnx.to_pure_dict(nnx.state(self)), tokens_BL, mask_BL)


def init(config: ModelConfig, key, dtype=jnp.float32) -> dict:
    """Random parameters (normal, 1/sqrt(fan-in)) as a nested dict of arrays, quantised as the config says."""
    params = nnx.to_pure_dict(nnx.state(Transformer(config, dtype, rngs=nnx.Rngs(params=key))))
    return int8.quantise_tree(params, declared_axes(config)) if config.weights == "int8" else params


def abstract(config: ModelConfig, dtype=jnp.float32) -> dict:
    """The tree of `init` with jax.ShapeDtypeStruct leaves; allocates nothing."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0), dtype))


def logical_axes(config: ModelConfig) -> dict:
    """The tree of `init` with a tuple of logical axis names at each leaf."""
    axes = declared_axes(config)
    return int8.split_axes(axes) if config.weights == "int8" else axes


def declared_axes(config: ModelConfig) -> dict:
    """A tuple of logical axis names for each parameter, quantised or not."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda v: v.replace(v.get_metadata()["logical_axes"]),
            state,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
    )


def rms_norm(x, scale, eps: float):
    """x / sqrt(mean(x²) + eps) · scale over the last axis; statistics in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * inverse).astype(x.dtype) * scale


def block(config: ModelConfig, p: dict, x_BLD, rope, attend, *, spread: bool = False):
    """Applies one block to x_BLD. `attend(q_BLHC, k_BLKC, v_BLKC)` computes the attention and owns any cache.

    With config.narrow, products round their operands to bfloat16 (bf16_products.py), except those of experts.

    Args:
      p: what `gather_block` or `decode_block` returned.
      spread: as in `gather_block`.

    Returns:
      (x_BLD, the second value that `attend` returned, the experts' moe.Routing or None).
    """
    x_BLD = sharding.constrain(x_BLD, "batch", "positions", layout=config.layout)
    times = functools.partial(project, narrow=config.narrow)
    with jax.named_scope("attention"):
        h_BLD = rms_norm(x_BLD, p["attention_norm"], config.norm_eps)
        q, k, v = (times(h_BLD, p[name]) for name in ("query", "key", "value"))
        if config.attention_bias:
            bias = (p[name][None, None] for name in ("query_bias", "key_bias", "value_bias"))
            q, k, v = (x + b for x, b in zip((q, k, v), bias, strict=True))
        if config.qk_norm:
            q = rms_norm(q, p["query_norm"], config.norm_eps)
            k = rms_norm(k, p["key_norm"], config.norm_eps)
        q, k = attention.rotate(q, rope), attention.rotate(k, rope)
        out_BLHC, kept = attend(q, k, v)
        x_BLD = x_BLD + times(out_BLHC, p["output"], inputs=2)
    with jax.named_scope("ffn"):
        h_BLD = rms_norm(x_BLD, p["ffn_norm"], config.norm_eps)
        if config.experts:
            routing = moe.route(config, p["router"], h_BLD)
            return x_BLD + moe.feed_forward(config, p, h_BLD, routing, spread=spread), kept, routing
        if "gate_up" in p:
            gate_BLF, up_BLF = jnp.split(times(h_BLD, p["gate_up"]), 2, axis=-1)
        else:
            gate_BLF, up_BLF = times(h_BLD, p["gate"]), times(h_BLD, p["up"])
        gated_BLF = jax.nn.silu(gate_BLF) * up_BLF
        return x_BLD + times(gated_BLF, p["down"]), kept, None


def gather_block(config: ModelConfig, p: dict, *, spread: bool = False) -> dict:
    """One block's weights in the compute dtype or int8, whole along fsdp.

    Args:
      spread: each expert stays on a single device of the fsdp and tensor axes, and tokens go to it.
    """
    axes = block_axes(config)

    def placed(name, weight):
        if spread and "experts" in axes[name]:
            weight = int8.cast(weight, config.dtype)
            put = functools.partial(sharding.constrain, layout=config.layout)
            return jax.tree.map(lambda w: put(w, "spread_experts"), weight)
        return gather(config, weight, axes[name])

    return {name: placed(name, w) for name, w in p.items()}


def decode_block(config: ModelConfig, p: dict, rows: int) -> dict:
    """Converts what `gather_block` returned, once, to the form that every decode step reads.

    Matrices are rounded to bfloat16 if products are narrow. They are stored [out, in] if config.decoding is
    "columns" and `rows`, the batch size, is small.
    """
    names = {"query", "key", "value", "output"} | (set() if config.experts else {"gate", "up", "down"})
    columns = few_rows.apply(config, rows)

    def stored(name):
        weight = int8.cast(p[name], jnp.bfloat16) if config.narrow else p[name]
        if not columns or int8.is_quantised(weight):
            return weight
        return few_rows.turned(weight, inputs=2 if name == "output" else 1)

    kept = p | {name: stored(name) for name in names}
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(kept["gate"], few_rows.Columns) and (mesh.empty or mesh.size == 1):
        # One product is faster than two on a CPU without AVX-512 (docs/sampling.md).
        kept["gate_up"] = few_rows.joined(kept.pop("gate"), kept.pop("up"))
    return kept


def gather(config: ModelConfig, weight, axes):
    """Gathers a weight along fsdp for the products, in the compute dtype or int8."""
    weight = int8.cast(weight, config.dtype)
    return jax.tree.map(lambda w: sharding.gather_weight(w, axes, config.layout), weight)


@functools.cache
def block_axes(config: ModelConfig) -> dict:
    """Logical axes of one block's weights, without the axis of layers."""
    return {name: axes[1:] for name, axes in declared_axes(config)["blocks"].items()}


def project(x, weight, inputs: int = 1, *, narrow: bool = False):
    """Multiplies x by a weight, summing over the last `inputs` axes of x and the first ones of the weight.

    With `narrow`, operands are rounded to bfloat16; the result still has x's dtype.

    Both are first flattened to two axes, so that the product and its two gradients are plain matrix products.
    With more axes a compiler may insert a transposed copy before each weight gradient.
    """
    lead, out = x.shape[: x.ndim - inputs], weight.shape[inputs:]
    rows = x.reshape(-1, math.prod(weight.shape[:inputs]))
    if isinstance(weight, few_rows.Columns):
        product = few_rows.product(rows.astype(weight.values_NR.dtype), weight.values_NR, x.dtype)
        return product.reshape(*lead, *out)
    weight_RN = int8.flat(weight, inputs)
    if not narrow:
        product = int8.product(rows, weight_RN)
    elif int8.is_quantised(weight_RN):
        product = int8.product(rows.astype(jnp.bfloat16), weight_RN, x.dtype)
    else:
        product = bf16_products.product(rows, weight_RN)
    return product.reshape(*lead, *out)


def embed(config: ModelConfig, params: dict, tokens):
    """Embedding rows of integer ids [B, ...], in the compute dtype: [B, ..., D]."""
    table, tokens = params["embedding"], sharding.constrain(tokens, "replica")
    # Every device looks up its columns for all rows: moving the result is cheaper than moving the table.
    if int8.is_quantised(table):
        x = int8.rows(table, tokens, config.dtype)
    else:
        x = look_up(table, tokens, config.layout).astype(config.dtype)
    x = sharding.constrain(x, "replica", *(None,) * (tokens.ndim - 1), "embed", layout=config.layout)
    return sharding.constrain(x, "batch")


def _look_up(table_VD, ids, layout: Layout = DEFAULT) -> jax.Array:
    """Rows [..., D] of a table; the gradient is summed over LOOKED_UP ids at a time.

    A TPU first sorts the indices of a scatter-add. For a million of them the compiler takes a minute.
    """
    return table_VD[ids]


def _look_up_gradient(layout, residuals, grad):
    table_VD, ids = residuals
    *rows, length = ids.shape
    width = min(length, max(1, LOOKED_UP // math.prod(rows)))

    def cut(x):
        padding = [(0, 0)] * x.ndim
        padding[len(rows)] = (0, -length % width)  # zero gradients, added to the table's first row
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*rows, -1, width, *x.shape[ids.ndim :]), len(rows), 0)

    def add(sum_VD, part):
        ids, grad = part
        return sum_VD.at[ids].add(grad), None

    zero_VD = sharding.constrain(jnp.zeros_like(table_VD), "vocab", "embed", layout=layout)
    return jax.lax.scan(add, zero_VD, (cut(ids), cut(grad)))[0], None


look_up = jax.custom_vjp(_look_up, nondiff_argnums=(2,))
look_up.defvjp(lambda table_VD, ids, _: (table_VD[ids], (table_VD, ids)), _look_up_gradient)


def forward(config: ModelConfig, params: dict, tokens_BL, mask_BL, *, remat: str = "none"):
    """Final, normalised hidden states; multiply by `head` for logits.

    Args:
      tokens_BL: int32 ids.
      mask_BL: True at real tokens. Padding may be on either side or both. A token's rotary position is the
        number of real tokens before it. Padding gives finite, meaningless values.
      remat: a name of REMAT_POLICIES.

    Returns:
      hidden_BLD in the compute dtype.
    """
    return forward_and_load(config, params, tokens_BL, mask_BL, positions(mask_BL), remat=remat)[0]


def forward_and_load(
    config: ModelConfig, params: dict, tokens_BL, row_BL, position_BL, *, remat: str = "none"
):
    """`forward` of sequences with several rows behind each other, which do not see each other.

    Args:
      row_BL: the row that a token belongs to, from 1, and 0 at padding; or True at real tokens, of one row.
      position_BL: the rotary position of each token.

    Returns:
      (hidden_BLD, the moe.Load of the experts or None without experts).
    """
    rope = attention.rope_tables(config, position_BL)
    attend = causal(config, row_BL)

    def step(x_BLD, p):
        p = gather_block(config, p)
        x_BLD, _, routing = block(config, p, x_BLD, rope, lambda *qkv: (attend(*qkv), None))
        return x_BLD, None if routing is None else moe.block_load(config, routing, row_BL > 0)

    if REMAT_POLICIES[remat] is not None:
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    x_BLD, load = jax.lax.scan(step, embed(config, params, tokens_BL), params["blocks"])
    if load is not None:
        load = dataclasses.replace(load, tokens=load.tokens[0])
    x_BLD = sharding.constrain(x_BLD, "batch")  # the callers read the positions chunk by chunk
    return rms_norm(x_BLD, params["final_norm"], config.norm_eps), load


def causal(config: ModelConfig, row_BL):
    """attend(q_BLHC, k_BLKC, v_BLKC) of whole sequences, as config.attention says.

    Args:
      row_BL: as for `attention.causal_mask`; padding gives finite, meaningless values.
    """
    if config.attention == "splash":
        return lambda q, k, v: splash.attend(q, k, v, row_BL)
    attend = attention.causal(row_BL)
    return lambda q, k, v: attend(q, *attention.cached(k, v))


def positions(mask_BL):
    """Rotary position of each token: the number of real tokens before it; 0 in the padding on the left."""
    return jnp.maximum(jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1, 0)


def head(config: ModelConfig, params: dict):
    """The output matrix [V, D] in the compute dtype or int8, gathered along fsdp."""
    return gather_head(config, params["embedding" if config.tie_embeddings else "head"])


def gather_head(config: ModelConfig, head_VD):
    """Gathers a stored output matrix, and swaps the rows of config.swapped_ids."""
    head_VD = gather(config, head_VD, ("vocab", "embed"))
    if config.swapped_ids is not None:
        pair = jnp.array(config.swapped_ids)
        head_VD = jax.tree.map(lambda x: x.at[pair].set(x[pair[::-1]]), head_VD)
    return head_VD


def logits(config: ModelConfig, head_VD, hidden, *, decoding: bool = False):
    """float32 logits [..., V] of hidden [..., D]; ids past the tokenizer's length are -inf.

    With `decoding`, the product follows config.decoding.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    if decoding and config.decoding == "columns" and not int8.is_quantised(head_VD):
        out = few_rows.product(rows, head_VD, jnp.float32)
    else:
        out = int8.product_with_rows(rows, head_VD)
    return mask_vocabulary(config, out.reshape(*hidden.shape[:-1], -1))


def mask_vocabulary(config: ModelConfig, logits_V):
    """-inf at ids that the tokenizer does not have, over the last axis."""
    if config.valid_vocab == config.vocab_size:
        return logits_V
    valid = jnp.arange(config.vocab_size) < config.valid_vocab
    return jnp.where(valid.reshape((1,) * (logits_V.ndim - 1) + (-1,)), logits_V, -jnp.inf)


def prune(config: ModelConfig, params: dict, layers) -> tuple[ModelConfig, dict]:
    """Removes blocks by their 0-based index. The other weights are shared with `params`.

    Raises:
      ValueError: an index is outside 0..config.layers-1, or no block is left.
    """
    pruned = config.without(layers)
    kept = jnp.array([i for i in range(config.layers) if i not in set(layers)])
    blocks = jax.tree.map(lambda w: jnp.take(w, kept, axis=0), params["blocks"])
    return pruned, params | {"blocks": blocks}
