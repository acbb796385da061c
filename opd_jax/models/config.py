"""What a model is: sizes, switches between the families, and the vocabulary that counts."""

import dataclasses

import jax.numpy as jnp

from opd_jax.models import rope
from opd_jax.parallel import DEFAULT, Layout


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and family of one decoder-only transformer; hashable, so it can be a static argument.

    Attributes:
      family: "llama", "qwen2", "qwen3" or "qwen3_moe"; the Hugging Face model type it is saved as.
      vocab_size: rows of the embedding, V.
      valid_vocab: ids below this exist in the tokenizer; ids from here to V get -inf logits everywhere.
      width: residual width, D.
      layers: number of blocks.
      heads, kv_heads: query heads and key/value heads; heads is a multiple of kv_heads.
      head_size: channels a head; need not be width / heads.
      ffn: hidden width of the gated feed-forward, or of one expert.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square in RMS norm.
      tie_embeddings: the output head is the embedding.
      qk_norm: RMS norm on each query and key head (Qwen3).
      attention_bias: bias on the query, key and value projections (Qwen2).
      max_positions: longest sequence that the model supports, tokens.
      eos_ids: ids that end a response.
      pad_id: id written at padded positions; never attended to.
      compute_dtype: dtype of activations and matrix products, "float32" or "bfloat16".
      rope_scaling: scaling of the rotary frequencies, or None.
      experts: number of experts in each block; 0 is a dense model.
      experts_per_token: experts that each token is sent to.
      normalise_experts: the weights of a token's experts are scaled to sum to 1.
      weights: how matrices are stored, "float" (the parameters' dtype) or "int8"; see int8.py.
      products: operands of a block's products, "compute" (compute_dtype) or "bfloat16", which float32
        activations are rounded to; see bf16_products.py.
      decoding: how a decode step multiplies a few rows by a weight: "rows" (row times matrix), or "columns"
        with weights stored [out, in]; see few_rows.py.
      cache_reads: what a decode step reads of the cache: "all" slots, or those that are written, in "blocks"
        (attention.py) or by a "kernel" (decode_attention.py).
      attention: attention over whole sequences, prefill included: "plain" (attention.py) or "splash"
        (splash.py).
      swapped_ids: two ids whose logits are swapped, or None. It lets a teacher's end token stand for the
        student's.
      layout: tables that say how its weights, cache and activations are cut over a mesh.
    """

    family: str
    vocab_size: int
    valid_vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qk_norm: bool
    attention_bias: bool
    max_positions: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    compute_dtype: str = "float32"
    rope_scaling: rope.Scaling | None = None
    experts: int = 0
    experts_per_token: int = 0
    normalise_experts: bool = False
    weights: str = "float"
    products: str = "compute"
    decoding: str = "rows"
    cache_reads: str = "all"
    attention: str = "plain"
    swapped_ids: tuple[int, int] | None = None
    layout: Layout = DEFAULT

    @property
    def dtype(self):
        """compute_dtype as a jax dtype."""
        return jnp.dtype(self.compute_dtype)

    @property
    def narrow(self) -> bool:
        """Whether a block's products round float32 operands to bfloat16."""
        return self.products == "bfloat16" and self.compute_dtype == "float32"

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def without(self, layers) -> "ModelConfig":
        """The config of a model without some of its blocks, given by their 0-based indices.

        Raises:
          ValueError: an index is outside 0..layers-1, or no block is left.
        """
        dropped = set(layers)
        if not dropped <= set(range(self.layers)) or len(dropped) == self.layers:
            raise ValueError(f"cannot remove layers {sorted(dropped)} from a model of {self.layers}")
        return self.replace(layers=self.layers - len(dropped))

    def parameter_count(self) -> int:
        """Number of parameters; a tied head counts once."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        if self.attention_bias:
            attention += self.head_size * (self.heads + 2 * self.kv_heads)
        if self.qk_norm:
            attention += 2 * self.head_size
        feed_forward = 3 * self.width * self.ffn * max(self.experts, 1) + self.width * self.experts
        block = attention + feed_forward + 2 * self.width
        tables = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return self.layers * block + tables + self.width

    def matmul_flops_per_token(self, *, head: bool) -> int:
        """FLOPs of the weight products in one token's forward pass, without the attention scores."""
        block = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        block += 3 * self.width * self.ffn * max(self.experts_per_token, 1) + self.width * self.experts
        return 2 * (self.layers * block + (self.vocab_size * self.width if head else 0))
