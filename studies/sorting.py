"""A task whose first wrong sentence can be found exactly: sorting numbers, one sentence a step.

    python -m studies.sorting --out=runs/sorting

writes the problems (reasoning-gym's number_sorting), worked in sentences, and OUT/shape, the teacher's model
folder without weights. A response to "Sort 42 17 93 upwards." reads "The smallest of 42 17 93 is 17. The
smallest of 42 93 is 42. The smallest of 93 is 93. So the order is 17 42 93."
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers as hf_tokenizers
from absl import flags

from opd_jax import config
from opd_jax.errors import UserError

LEAST, MOST = 4, 7  # numbers to sort
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
LAYERS, WIDTH = 3, 96


def problems(count: int, seed: int) -> list[tuple[list[str], bool]]:
    """`count` distinct (numbers, whether upwards) of reasoning-gym's number_sorting.

    Raises:
      UserError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            "the sorting problems need the package reasoning-gym; pip install reasoning-gym"
        ) from error
    dataset = reasoning_gym.create_dataset(
        "number_sorting",
        size=count + count // 10,
        seed=seed,
        min_numbers=LEAST,
        max_numbers=MOST,
        min_decimals=0,
        max_decimals=0,
        min_value=10,
        max_value=99,
    )
    found = {}
    for item in dataset:
        numbers = [str(round(float(n))) for n in item["metadata"]["original_numbers"]]
        found[tuple(numbers), item["metadata"]["direction"] == "ascending"] = None
    return [(list(numbers), upwards) for numbers, upwards in found][:count]


def question(numbers: Sequence[str], upwards: bool) -> str:
    """What the model is asked."""
    return f"Sort {' '.join(numbers)} {'upwards' if upwards else 'downwards'}."


def solution(numbers: Sequence[str], upwards: bool) -> str:
    """The one right response: a sentence for each number taken out, then the order."""
    left, order, sentences = list(numbers), [], []
    word, best = ("smallest", min) if upwards else ("largest", max)
    while left:
        taken = best(left, key=int)
        sentences.append(f"The {word} of {' '.join(left)} is {taken}.")
        left.remove(taken)
        order.append(taken)
    return " ".join([*sentences, f"So the order is {' '.join(order)}."])


def solution_of(text: str) -> str:
    """The right response to a `question`."""
    numbers, direction = re.fullmatch(r"Sort ([\d ]+) (upwards|downwards)\.", text).groups()
    return solution(numbers.split(), direction == "upwards")


def first_error(response: str, right: str) -> int | None:
    """Number of the first sentence, from 0, that differs from the right response's; None where none does.

    A response that stops early, but is right up to there, has its error at the sentence that is missing.
    """
    given, expected = (re.findall(r"\S[^.]*\.?", text) for text in (response, right))
    for n, sentence in enumerate(expected):
        if n >= len(given) or given[n] != sentence:
            return n
    return None if len(given) == len(expected) else len(expected)


def make_tokenizer():
    """A byte-level BPE tokenizer in which every number from 10 to 99, with its space, is one token."""
    import transformers

    backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf_tokenizers.decoders.ByteLevel()
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(SPECIAL),
        initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(0)
    numbers = [[str(draw.randint(10, 99)) for _ in range(LEAST)] for _ in range(2000)]
    texts = [f"{question(n, up)} {solution(n, up)}" for n in numbers for up in (True, False)]
    backend.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=CHAT_TEMPLATE, pad_token="<|pad|>", eos_token="<|end|>"
    )


def write_shape(folder: Path) -> None:
    """Writes a folder with config and tokenizer of a Qwen3 model, no weights."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // 16,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 3 * WIDTH,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n")


def write_problems(out: Path) -> None:
    """Writes OUT/worked.jsonl (to learn from) and OUT/prompts.jsonl (to distil on); they share no problem."""
    worked = problems(60_000, seed=0)
    seen = {(tuple(numbers), upwards) for numbers, upwards in worked}
    fresh = [(n, up) for n, up in problems(4_000, seed=1_000_000) if (tuple(n), up) not in seen]
    with (out / "worked.jsonl").open("w") as file:
        for numbers, upwards in worked:
            messages = [
                {"role": "user", "content": question(numbers, upwards)},
                {"role": "assistant", "content": solution(numbers, upwards)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    scratch = out / ".prompts.jsonl.new"  # the last file: make study takes it for all of them
    with scratch.open("w") as file:
        for numbers, upwards in fresh:
            order = " ".join(sorted(numbers, key=int, reverse=not upwards))
            file.write(json.dumps({"prompt": question(numbers, upwards), "answer": order}) + "\n")
    scratch.replace(out / "prompts.jsonl")


def main(_):
    out = Path(flags.FLAGS.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_shape(out / "shape")
        write_problems(out)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror}); choose another folder") from error


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/sorting", "Folder for the files.")
    config.run(main)
