"""A pair of models small enough for any test, with a real tokenizer: one token a byte."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf_tokenizers
import transformers

from opd_jax.config import default
from opd_jax.distill import Rollouts
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.files import hf
from opd_jax.progress import Progress
from opd_jax.run import metrics

PAD, START, END = 256, 257, 258
# For jax.jit(compiler_options=...): as a user's program; tests/conftest.py's flags round a little otherwise.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a:{% endif %}"
)
STUDENT = ModelConfig(
    family="llama",
    vocab_size=264,
    valid_vocab=259,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    ffn=48,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qk_norm=False,
    attention_bias=False,
    max_positions=256,
    eos_ids=(END,),
    pad_id=PAD,
)
TEACHER = STUDENT.replace(layers=3, vocab_size=272)


def tokenizer():
    """A byte-level tokenizer without merges: ids 0 to 255 are the bytes, then three special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocab = {characters[byte]: byte for byte in range(256)}
    backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf_tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=CHAT_TEMPLATE,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
    )


def student_params() -> dict:
    """The student's random weights."""
    return transformer.init(STUDENT, jax.random.key(1))


def teacher_params() -> dict:
    """The teacher's random weights."""
    return transformer.init(TEACHER, jax.random.key(5))


@functools.cache
def weights(config, seed=0) -> dict:
    """Random weights of any config, drawn by NumPy: no program to compile."""
    draw = np.random.default_rng(seed).normal

    def weight(path, like):
        shift, scale = (1, 0.3) if "norm" in path[-1].key else (0, like.shape[-1] ** -0.5)
        return jnp.asarray(shift + scale * draw(size=like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(weight, transformer.abstract(config))


def save_pair(folder) -> None:
    """Writes folder/student, folder/teacher and folder/prompts.jsonl."""
    hf.save(folder / "student", STUDENT, student_params(), tokenizer())
    hf.save(folder / "teacher", TEACHER, teacher_params(), tokenizer())
    lines = [json.dumps({"prompt": f"What is {n} + {n * n}?"}) for n in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def config(folder, **overrides):
    """The default config with the pair of `save_pair`, tiny sizes, and dotted keys replaced."""
    c = default()
    values = {
        "student.path": str(folder / "student"),
        "teacher.path": str(folder / "teacher"),
        "student.products": "compute",  # what auto takes depends on the machine
        "teacher.products": "compute",
        "data.source": "jsonl",
        "data.path": str(folder / "prompts.jsonl"),
        "data.prompt_tokens": 48,
        "data.heldout": 6,
        "rollout.batch": 8,
        "rollout.max_tokens": 12,
        "rollout.halvings": 0,  # each compiles another copy of the decode step
        "scoring.chunk": 8,
        "optimizer.learning_rate": 1e-3,
        "train.steps": 4,
        "train.remat": "none",
        "eval.every": 2,
        "checkpoint.every": 2,
        "metrics.rollouts_every": 2,
        "metrics.tensorboard": False,
    }
    c.update_from_flattened_dict(values | overrides)
    return c


def told_to_stop(job, step: int):
    """The job, in which SIGTERM arrives as training step number `step` begins, from 1."""
    calls = itertools.count(1)

    def train_step(*arguments):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return job.train_step(*arguments)

    told = dataclasses.replace(job)
    told.__dict__["train_step"] = train_step
    return told


def entry(module, *arguments, start=subprocess.run, env=None, command=(sys.executable, "-m"), **options):
    """Runs `python -m module`, or another command, from the repository's root on one CPU device.

    `start` may be Popen.
    """
    if start is subprocess.run:
        options |= {"capture_output": True, "text": True, "timeout": 600}
    return start(
        [*command, *map(str, (module, *arguments))],
        env=os.environ | (env or {}),
        **{"cwd": Path(__file__).parents[1]} | options,
    )


def written(texts, model: ModelConfig, tree: dict, *, width: int, candidates: int = 4) -> Rollouts:
    """Rollouts whose responses are these texts, as if the model had written them.

    Log-probabilities and candidates are NumPy's, in float64, from the model's whole logits.
    """
    prompt = list(b"Say it.")
    rows = [[*text.encode()[: width - 1], END] for text in texts]
    tokens_BL = np.array([[PAD] + prompt + row + [PAD] * (width - len(row)) for row in rows], np.int32)
    prompt_mask_BP = np.array([[False] + [True] * len(prompt)] * len(rows))
    mask_BT = np.array([[t < len(row) for t in range(width)] for row in rows])
    logits_BLV = _logits(model)(tree, tokens_BL, np.concatenate([prompt_mask_BP, mask_BT], axis=1))
    logits_BTV = np.asarray(logits_BLV, np.float64)[:, len(prompt) : -1]
    logp_BTV = logits_BTV - np.logaddexp.reduce(logits_BTV, axis=-1, keepdims=True)
    token_BT = tokens_BL[:, len(prompt) + 1 :]
    logp_BT = np.take_along_axis(logp_BTV, token_BT[..., None], axis=-1)[..., 0]
    logp_BT = np.where(mask_BT, logp_BT, 0).astype(np.float32)
    topk_BTK = np.argsort(-logp_BTV, axis=-1, kind="stable")[..., :candidates].astype(np.int32)
    topk_logp_BTK = np.take_along_axis(logp_BTV, topk_BTK, axis=-1)
    return Rollouts(
        tokens_BL=tokens_BL,
        prompt_mask_BP=prompt_mask_BP,
        mask_BT=mask_BT,
        logp_BT=logp_BT,
        behaviour_logp_BT=logp_BT,
        topk_BTK=np.where(mask_BT[..., None], topk_BTK, 0),
        topk_logp_BTK=np.where(mask_BT[..., None], topk_logp_BTK, 0).astype(np.float32),
        stop_BT=np.where(mask_BT, np.exp(logp_BTV[..., END]), 0).astype(np.float32),
        finished_B=np.ones(len(rows), bool),
    )


def _logits(model: ModelConfig):
    def whole(tree, tokens_BL, mask_BL):
        hidden_BLD = transformer.forward(model, tree, tokens_BL, mask_BL)
        return transformer.logits(model, transformer.head(model, tree), hidden_BLD)

    return jax.jit(whole)


def whole_logp(model: ModelConfig, tree: dict, rollouts: Rollouts):
    """log softmax over the whole [B, T, V] logits of the response; -inf at absent ids."""
    mask_BL = jnp.concatenate([rollouts.prompt_mask_BP, rollouts.mask_BT], axis=1)
    width = rollouts.prompt_mask_BP.shape[1]
    logits_BLV = _logits(model)(tree, rollouts.tokens_BL, mask_BL)
    return jax.nn.log_softmax(logits_BLV[:, width - 1 : -1])


def naive_loss(model: ModelConfig, tree: dict, rollouts: Rollouts, weight_BT):
    """-sum(weight x log p) / response tokens, from whole logits; differentiable in tree."""
    logp_BTV = whole_logp(model, tree, rollouts)
    logp_BT = jnp.take_along_axis(logp_BTV, rollouts.response_BT[..., None], axis=-1)[..., 0]
    return -jnp.where(rollouts.mask_BT, weight_BT * logp_BT, 0).sum() / rollouts.mask_BT.sum()


@contextlib.contextmanager
def writer(workdir, *, resume_step=None, stream=None, total_steps=100, tensorboard=False, wandb=""):
    """A MetricWriter whose progress goes to a stream."""
    config = default()
    config.train.steps, config.metrics.tensorboard, config.metrics.wandb = total_steps, tensorboard, wandb
    with Progress(stream or io.StringIO()) as progress:
        progress.expect("step", total_steps - (resume_step or 0))
        with metrics.MetricWriter(config, workdir, resume_step, progress, plain_every=10) as out:
            yield out
