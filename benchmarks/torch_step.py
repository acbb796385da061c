"""Times one on-policy distillation step in PyTorch and transformers, as opd_jax.bench times ours.

    python benchmarks/torch_step.py LAYERS WIDTH FFN HEADS KV_HEADS HEAD_SIZE VOCABULARY \\
        BATCH PROMPT RESPONSE [--teacher_layers=N] [--sample_only] [--autocast]

sample: generate() with its default KV cache, temperature 1, no truncation, no early stop. The logits
        are kept.
score:  one forward pass of the teacher under no_grad: log p_T of the response, and the margin between
        the teacher's best two of the student's four most likely tokens.
update: forward and backward pass of the student under the policy gradient, clipping, fused AdamW.

Weights are random and float32, embeddings are tied, attention is sdpa. Outside generate(), logits are
computed only at response positions.
"""

import argparse
import os
import time

import torch
import torch.nn.functional as F
import transformers

NAMES = ["layers", "width", "ffn", "heads", "kv_heads", "head_size", "vocabulary"]
NAMES += ["batch", "prompt", "response"]
MATMUL = 2048  # size of the square product that measures the machine
CANDIDATES = 4  # K, the student's top tokens within which the margin is taken


def best_seconds(fn, *args, repeats: int):
    """Least wall time of fn(*args) over `repeats` runs after a warm-up run, and the last result."""
    fn(*args)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = fn(*args)
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def llama(sizes: argparse.Namespace, layers: int, seed: int) -> transformers.LlamaForCausalLM:
    """A randomly initialised model."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_size,
        max_position_embeddings=sizes.prompt + sizes.response,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    return transformers.LlamaForCausalLM(config)


def response_logits(model, tokens_BL, t: int):
    """Logits [B, t, V] that predict the last t tokens."""
    return model(tokens_BL[:, :-1], use_cache=False, logits_to_keep=t).logits


def sample(student, prompt_BP, t: int):
    """Tokens [B, P + t], and the student's logits as t arrays [B, V]."""
    out = student.generate(
        prompt_BP,
        attention_mask=torch.ones_like(prompt_BP),
        do_sample=True,
        temperature=1.0,
        top_k=0,  # transformers' own default is 50
        top_p=1.0,
        min_new_tokens=t,
        max_new_tokens=t,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, out.logits


@torch.no_grad()
def score(teacher, tokens_BL, student_logits):
    """The teacher's log-probability of each response token and its margin M: [B, T], nats."""
    t = len(student_logits)
    candidate_BTK = torch.stack([x.topk(CANDIDATES).indices for x in student_logits], dim=1)
    logits_BTV = response_logits(teacher, tokens_BL, t)
    chosen_BT = logits_BTV.gather(-1, tokens_BL[:, -t:, None])[..., 0]
    best_BT2 = logits_BTV.gather(-1, candidate_BTK).topk(2).values
    return chosen_BT - logits_BTV.logsumexp(-1), best_BT2[..., 0] - best_BT2[..., 1]


def update(student, optimizer, tokens_BL, teacher_logp_BT):
    """One step on -A_t log p_S, A_t = log p_T - log p_S held constant; returns the loss."""
    t = teacher_logp_BT.shape[1]
    logits_BTV = response_logits(student, tokens_BL, t)
    logp_BT = -F.cross_entropy(
        logits_BTV.flatten(0, 1), tokens_BL[:, -t:].flatten(), reduction="none"
    ).view_as(teacher_logp_BT)
    loss = -((teacher_logp_BT - logp_BT.detach()) * logp_BT).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in NAMES:
        parser.add_argument(name, type=int)
    parser.add_argument("--teacher_layers", type=int, default=0, help="the student's if 0")
    parser.add_argument("--sample_only", action="store_true", help="time only generate()")
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16 (torch.autocast)")
    sizes = parser.parse_args()
    with torch.autocast("cpu", torch.bfloat16, enabled=sizes.autocast):
        measure(sizes)


def measure(sizes):
    """Times the phases and prints them."""
    b, p, t = sizes.batch, sizes.prompt, sizes.response
    torch.set_num_threads(os.cpu_count())

    student = llama(sizes, sizes.layers, seed=0)
    prompt_BP = torch.randint(sizes.vocabulary, (b, p))
    seconds = {}
    seconds["sample"], (tokens_BL, logits) = best_seconds(sample, student, prompt_BP, t, repeats=2)
    if tokens_BL.shape != (b, p + t):
        raise RuntimeError(f"generate() returned {tuple(tokens_BL.shape)}, not {(b, p + t)}")
    if not sizes.sample_only:
        teacher = llama(sizes, sizes.teacher_layers or sizes.layers, seed=1)
        seconds["score"], (teacher_logp_BT, _) = best_seconds(score, teacher, tokens_BL, logits, repeats=2)
        del logits
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        seconds["update"], _ = best_seconds(update, student, optimizer, tokens_BL, teacher_logp_BT, repeats=2)

    x = torch.ones(MATMUL, MATMUL)
    rate = 2 * MATMUL**3 / best_seconds(torch.matmul, x, x, repeats=5)[0]
    print(
        f"cpu, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"float32{', autocast to bfloat16' if sizes.autocast else ''}, {torch.get_num_threads()} threads; "
        f"a {MATMUL}³ matrix product runs at {rate / 1e9:.0f} GFLOP/s"
    )
    print(" ".join(f"{name}={getattr(sizes, name)}" for name in NAMES))
    print(f"{sum(w.numel() for w in student.parameters())} parameters in the student")
    print(f"{'phase':<12}{'seconds':>10}{'tokens/s':>10}")
    if not sizes.sample_only:
        seconds["step"] = sum(seconds.values())
    for name, value in seconds.items():
        print(f"{name:<12}{value:>10.4f}{b * t / value:>10.0f}")


if __name__ == "__main__":
    main()
