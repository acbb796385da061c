"""Costs of a step, computed from its shapes: FLOPs, and bytes between HBM and the compute units.

FLOPs are the multiplications and additions of matrix products and causal attention only. Bytes are those of
arrays that are too large to stay on the chip; docs/preflight.md lists the terms.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from opd_jax.models import ModelConfig, attention

LOGIT_BYTES = 12  # per logit: written once and read twice in float32


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The rollouts that one device works on at a time.

    Attributes:
      rows: of one device.
      prompt, response: P and T, positions.
      mesh: size of each axis.
      pieces: micro-batches of a step.
    """

    rows: int
    prompt: int
    response: int
    mesh: Mapping[str, int]
    pieces: int = 1

    @property
    def length(self) -> int:
        """L = P + T."""
        return self.prompt + self.response

    @property
    def tensor(self) -> int:
        """Devices along tensor."""
        return self.mesh["tensor"]


def value_bytes(model: ModelConfig) -> int:
    """Bytes of an activation: 2 in bfloat16, 4 in float32."""
    return model.dtype.itemsize


def matrix_bytes(model: ModelConfig) -> int:
    """Bytes of a weight that products read. Vectors, scales and routers are too small to count."""
    return 1 if model.weights == "int8" else value_bytes(model)


def attention_flops(model: ModelConfig, start: int, count):
    """FLOPs of causal attention for `count` tokens, the first of which sees start + 1 keys; arrays too."""
    keys = count * start + count * (count + 1) // 2
    return 4 * keys * model.heads * model.head_size * model.layers


def phase_flops(student: ModelConfig, teacher: ModelConfig, batch: int, p: int, t, samples: int = 1) -> dict:
    """FLOPs of each phase of a step on batch x (p + t) tokens, with `samples` rollouts per prompt.

    Args:
      t: tokens of every response, or an array with those of each of some responses, as which all are counted.
    """
    block, whole = (student.matmul_flops_per_token(head=h) for h in (False, True))
    head = whole - block
    t = np.atleast_1d(np.asarray(t, object))  # Python's whole numbers have no limit
    length = p + t
    prefill = p * block + attention_flops(student, 0, p)
    sample = prefill // samples + t * whole + attention_flops(student, p, t)
    score = length * teacher.matmul_flops_per_token(head=False)
    score += t * 2 * teacher.vocab_size * teacher.width + attention_flops(teacher, 0, length)
    update = 3 * (length * block + t * head + attention_flops(student, 0, length))
    return {
        name: batch * int(each.sum()) // len(t)
        for name, each in (("sample", sample), ("score", score), ("update", update))
    }


def block_values(model: ModelConfig) -> int:
    """Number of activations that the blocks write for one token."""
    heads = model.head_size * (3 * model.heads + 4 * model.kv_heads)
    feed_forward = 3 * model.ffn
    if model.experts:  # a row to and from each chosen expert; the router's float32 softmax
        feed_forward = model.experts_per_token * (3 * model.ffn + 2 * model.width) + 2 * model.experts
    return model.layers * (heads + 6 * model.width + feed_forward)


def weight_bytes(model: ModelConfig, tensor: int) -> int:
    """Bytes of one device's weights in the products: bfloat16 or int8, gathered along fsdp."""
    return matrix_bytes(model) * model.parameter_count() // _cut(model, tensor)


def read_bytes(model: ModelConfig, tokens: int, tensor: int, spread: int = 1) -> int:
    """The part of `weight_bytes` that a pass reads, assuming uniform routing to experts.

    Args:
      tokens: of one device.
      spread: number of devices along fsdp over which the experts are spread.
    """
    if not model.experts:
        return weight_bytes(model, tensor)
    idle = (1 - model.experts_per_token / model.experts) ** (tokens * spread)
    experts = 3 * model.width * model.ffn * model.experts * model.layers
    values = model.parameter_count() - experts + (1 - idle) * experts / spread
    return int(matrix_bytes(model) * values / _cut(model, tensor))


def forward_bytes(model: ModelConfig, rows: int, length: int, tensor: int) -> int:
    """HBM traffic of one device's blocks for rows x length tokens; plain attention writes its scores."""
    activations = rows * length * block_values(model) // tensor
    weights = read_bytes(model, rows * length, tensor)
    if "embed" in model.layout.rules:  # gathered first
        weights += weight_bytes(model, tensor)
    written_and_read = 2 * value_bytes(model) * activations
    return weights + written_and_read + attention_bytes(model, rows, length, tensor)


def attention_bytes(model: ModelConfig, rows: int, length: int, tensor: int) -> int:
    """HBM traffic of one device's scores: those of plain attention are written and read, splash has none."""
    if model.attention != "plain":
        return 0
    heads = rows * model.heads // min(tensor, model.heads) * model.layers
    # A score is written and read in float32, its weight in the activations' dtype.
    return (8 + 2 * value_bytes(model)) * heads * attention.score_count(length)


class Stretch(NamedTuple):
    """Decode steps with one number of rows.

    Attributes:
      rows: of one device.
      steps: how many.
      slots: of the cache that a step reads of each row, the mean.
    """

    rows: int
    steps: int
    slots: float


def sample_bytes(
    model: ModelConfig,
    batch: MicroBatch,
    decoded: Sequence[Stretch],
    samples: int = 1,
    int8_cache: bool = False,
    spread: int = 1,
) -> int:
    """HBM traffic of one device to sample the responses of all its rows.

    Args:
      decoded: the decode steps, as `lengths.decode` or `lengths.of_config` returns them.
      samples: rollouts that share one prefill.
      int8_cache: the cache holds one byte per value, and one float32 per token and head.
      spread: number of devices along fsdp over which the experts are spread while decoding.
    """
    tensor = batch.tensor
    kv_heads = -(-model.kv_heads // tensor)
    head_bytes = model.head_size + 4 if int8_cache else value_bytes(model) * model.head_size
    total = forward_bytes(model, batch.rows // samples, batch.prompt, tensor)
    for rows, steps, slots in decoded:
        cache = 2 * rows * model.layers * kv_heads * head_bytes * slots
        logits = LOGIT_BYTES * rows * model.vocab_size // tensor
        total += steps * (read_bytes(model, rows, tensor, spread) + cache + logits)
    return int(total)


def read_along_bytes(
    teacher: ModelConfig,
    batch: MicroBatch,
    decoded: Sequence[Stretch],
    block: int,
    samples: int = 1,
    int8_cache: bool = False,
) -> int:
    """HBM traffic of one device for a teacher that reads responses in blocks while they are written.

    Args:
      Others as `sample_bytes`'.
    """
    total = forward_bytes(teacher, batch.rows // samples, batch.prompt, batch.tensor)
    head_bytes = teacher.head_size + 4 if int8_cache else value_bytes(teacher) * teacher.head_size
    of_slot = 2 * teacher.layers * -(-teacher.kv_heads // batch.tensor) * head_bytes
    for rows, steps, slots in decoded:
        tokens = rows * block
        each = read_bytes(teacher, tokens, batch.tensor) + rows * of_slot * slots
        each += 2 * value_bytes(teacher) * tokens * block_values(teacher) // batch.tensor
        each += LOGIT_BYTES * tokens * teacher.vocab_size // batch.tensor
        total += steps / block * each
    return int(total)


def train_bytes(
    student: ModelConfig,
    teacher: ModelConfig | None,
    batch: MicroBatch,
    mu_bytes: int,
    recomputed: bool = False,
    updates: int = 1,
) -> int:
    """HBM traffic of one device in score, gradient and update.

    Args:
      teacher: None if it has read the responses already.
      mu_bytes: of one value of the first moment; 0 where it is not kept.
      recomputed: scoring also runs the student.
      updates: updates on the same rollouts, which are scored once.
    """
    scored = score_bytes(student, teacher, batch, recomputed)
    own = _own(student, batch.mesh)
    accumulated = 8 * own  # float32 gradients, read and written
    update = own * (4 + 2 * 4 + 2 * mu_bytes + 2 * 4)  # gradient, parameters, both moments
    learnt = _gradient_bytes(student, batch) + accumulated
    return batch.pieces * scored + updates * (batch.pieces * learnt + update)


def gradient_noise_bytes(
    student: ModelConfig, teacher: ModelConfig, batch: MicroBatch, groups: int, recomputed: bool = False
) -> int:
    """HBM traffic of one device for scoring and three gradients of each group.

    Args:
      recomputed: as in `train_bytes`.
      groups: number of groups of the batch, which replace the micro-batches for the gradients.
    """
    own = _own(student, batch.mesh)
    moments = 6 * 4 * own  # float32: the group's gradient, the old mean and the new one, written and read
    group = dataclasses.replace(batch, rows=batch.rows * batch.pieces // groups)
    scored = score_bytes(student, teacher, batch, recomputed)
    return batch.pieces * scored + 3 * groups * (_gradient_bytes(student, group) + moments)


def _cut(model: ModelConfig, tensor: int) -> int:
    """Number of parts into which tensor cuts a matrix."""
    return model.layout.parts("heads", {"tensor": tensor})


def _own(model: ModelConfig, mesh_shape: Mapping[str, int]) -> int:
    """Number of parameters that one device stores."""
    parts = model.layout.parts("embed", mesh_shape) * _cut(model, mesh_shape["tensor"])
    return model.parameter_count() // parts


def score_bytes(
    student: ModelConfig, teacher: ModelConfig | None, batch: MicroBatch, recomputed: bool = False
) -> int:
    """HBM traffic of scoring one micro-batch."""
    models = [model for model in (teacher, student if recomputed else None) if model is not None]
    vocabulary = sum(model.vocab_size for model in models)
    logits = LOGIT_BYTES * batch.rows * batch.response * vocabulary // batch.tensor
    return sum(_forward_bytes(model, batch) for model in models) + logits


def _gradient_bytes(student: ModelConfig, batch: MicroBatch) -> int:
    """HBM traffic of a micro-batch's gradient: two forward passes, and a backward pass that counts as two.

    Attention in blocks computes its scores once more.
    """
    logits = LOGIT_BYTES * batch.rows * batch.response * 3 * student.vocab_size // batch.tensor
    again = attention_bytes(student, batch.rows, batch.length, batch.tensor)
    again *= batch.length > attention.ONE_PRODUCT
    return 4 * _forward_bytes(student, batch) + again + logits


def divergence_bytes(student: ModelConfig, teacher: ModelConfig, batch: MicroBatch) -> int:
    """HBM traffic of one device for the KL of an evaluation."""
    vocabulary = teacher.vocab_size + student.vocab_size
    logits = LOGIT_BYTES * batch.rows * batch.response * vocabulary // batch.tensor
    models = sum(_forward_bytes(model, batch) for model in (student, teacher))
    return batch.pieces * (models + logits)


def _forward_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """`forward_bytes` of a micro-batch's prompts and responses."""
    return forward_bytes(model, batch.rows, batch.length, batch.tensor)
