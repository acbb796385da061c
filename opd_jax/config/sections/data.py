"""Fields of the prompts, the responses and the teacher's scores."""

from opd_jax.declare import Field

FIELDS = {
    "data.source": Field(
        "demo",
        """Where the prompts come from (docs/data.md has the formats).

        - `demo`: reasoning-gym's gsm_symbolic and everyday requests.
        - `jsonl`, `parquet`: your own files.
        - `deepmath`, `gsm8k`, `dapo`: the files of these data sets.
        - `tfds`: a TensorFlow data set.
        - `rg:TASK`: a generator of reasoning-gym.
        - `mixture`: several of them, see `data.mixture`.""",
    ),
    "data.path": Field(
        "",
        """For `jsonl`, `parquet`, `deepmath`, `gsm8k` and `dapo`: the file, or a pattern for several files
        such as `deepmath-*.parquet`. For `tfds`: the data set's name or folder. Other sources do not read
        it.""",
    ),
    "data.columns.prompt": Field(
        "",
        """For `jsonl`, `parquet` and `tfds`: the column of the prompt, which is a text or a list of messages.
        Use dots for nested columns. `""` takes the first of `messages`, `prompt`, `question` and
        `problem`.""",
    ),
    "data.columns.answer": Field(
        "",
        """The column of the reference answer, such as `reward_model.ground_truth`. `""` takes `answer`.""",
    ),
    "data.mixture": Field(
        (),
        """For `mixture`: its sources, each as `"WEIGHT KIND:PATH [prompt=COLUMN] [answer=COLUMN]"`. Example:
        `("3 rg:chain_sum", "1 jsonl:a.jsonl")`. Each source gets rows in proportion to its weight,
        whatever its size.""",
        items=str,
    ),
    "data.generated": Field(1000, "For `rg:TASK`: the number of problems that are generated.", least=1),
    "data.generated_seed": Field(0, "For `rg:TASK`: the seed that the problems are generated from."),
    "data.cache": Field(
        "",
        """Folder for prepared data sets. `""` is `$XDG_CACHE_HOME/opd_jax` if that variable is set, else
        `~/.cache/opd_jax`.""",
    ),
    "data.prompt_tokens": Field(
        256,
        """P, the width in tokens that prompts are left-padded to. It is also the longest allowed prompt.
        Every padded token costs compute.""",
        least=1,
    ),
    "data.prompt_buckets": Field(
        (),
        """Smaller widths, such as `(64, 128)`. A training batch uses the smallest width that holds its
        longest prompt, else `data.prompt_tokens`. This saves padding and changes no response. The sampler
        and the training step are compiled once for each width that occurs. Evaluations use
        `data.prompt_tokens`.""",
    ),
    "data.over_long": Field(
        "error",
        "What happens to a prompt longer than `data.prompt_tokens`: `error` ends the run, `drop` counts it.",
        allowed=("error", "drop"),
    ),
    "data.repeats": Field(
        "drop",
        """What happens to exact copies of a prompt within one source: `drop` keeps the first and counts the
        others, `keep` keeps all.""",
        allowed=("drop", "keep"),
    ),
    "data.system_prompt": Field(
        "",
        """System message before each prompt. `""` leaves the chat template's own.""",
    ),
    "data.instruction": Field(
        "",
        """Text after each prompt, separated by a blank line, such as where to put the final answer. `""` adds
        nothing.""",
    ),
    "data.few_shot": Field(
        "",
        """JSONL file of `{"prompt", "response"}` lines that are shown as earlier turns before each prompt.
        `""` shows none.""",
    ),
    "data.template": Field(
        "",
        """Extra arguments of the chat template as a JSON object, such as `{"enable_thinking": false}` for
        Qwen3 or `{"date_string": "26 Jul 2024"}` for Llama 3. Student and teacher get the same. `""` gives
        none.""",
    ),
    "data.heldout": Field(
        32, "Prompts that are held out for evaluation. They are never trained on.", least=0
    ),
    "rollout.batch": Field(64, "B, rollouts in a step, over all devices and hosts.", least=1),
    "rollout.samples_per_prompt": Field(
        1,
        """n, responses to each prompt of a training step. The step then has B / n prompts, and the responses
        to one prompt share one prefill. n must divide B, and B / n must be a multiple of `mesh.data` x
        `mesh.fsdp`. Evaluations take one response for each prompt.""",
        least=1,
    ),
    "rollout.max_tokens": Field(1024, "T, the longest response, in tokens.", least=1),
    "rollout.temperature": Field(
        1.0,
        """Sampling temperature. 0 is greedy. Log-probabilities for training are always taken at temperature
        1.""",
        least=0,
    ),
    "rollout.end_ids": Field(
        (),
        """Ids that end a response. `()` takes those that the student's config.json, generation_config.json,
        tokenizer and chat template name. If the teacher's are different, the run is refused.""",
        items=int,
    ),
    "rollout.top_k": Field(
        0,
        """Sample only from the k most likely tokens. 0 is off. The filters apply after the temperature, in
        this order: `top_k`, `top_p`, `min_p`.""",
        least=0,
    ),
    "rollout.top_p": Field(
        1.0,
        "Sample only from the smallest set of tokens with at least this probability. 1 is off.",
        least=1e-6,
        most=1,
    ),
    "rollout.min_p": Field(
        0.0,
        "Sample only from tokens at least this share as likely as the most likely one. 0 is off.",
        least=0,
        most=1,
    ),
    "rollout.cache_dtype": Field(
        "auto",
        """Dtype of cached keys and values. `auto` is the compute dtype. `int8` stores one float32 scale for
        each token and head: 1 + 4 / head_size bytes a value. The sampler's log-probabilities are then
        those of the rounded model, so `scoring.student=sampler` is refused, except with
        `objective.name=sft`, where the teacher writes.""",
        allowed=("auto", "int8"),
    ),
    "rollout.halvings": Field(
        1,
        """How often the rows of the decode loop may halve. When at most half of the rows of every device are
        still written, these go on alone: the steps after it cost half. Each halving compiles its own copy of
        the decode step. No response changes.""",
        least=0,
    ),
    "rollout.prompt_widths": Field(
        (0.25, 0.5),
        """Shares of `data.prompt_tokens`, rounded up to multiples of 32. Prompts are sorted by length and
        read in pieces, each at the smallest of these widths that holds it, or at `data.prompt_tokens`. Each
        width compiles its own copy of the prefill.""",
    ),
    "rollout.slots": Field(
        0,
        """Most rollouts that are written at a time, over all devices; the others wait for their turn. It
        limits the KV cache, for one more reading of the weights in each decode step of each turn. 0 is all of
        `rollout.batch`. No response changes.""",
        least=0,
    ),
    "scoring.candidates": Field(
        4,
        """K, the number of the student's top tokens within which the teacher's margin is taken. The paper
        uses 4.""",
        least=2,
        most=128,
    ),
    "scoring.student": Field(
        "auto",
        """Where the candidates and the advantage's log p_S come from. `sampler` reuses the sampler's numbers
        and is free. `recompute` costs one more forward pass of the student and gives the same numbers up to
        rounding; in bfloat16 that is a noise (docs/sampling.md, "Rounding"). `auto` is `recompute` where the
        noise would count: with `train.updates_per_rollout` above 1, whose first ratio must be 1, and with an
        int8 cache; else `sampler`.""",
        allowed=("auto", "sampler", "recompute"),
    ),
    "scoring.chunk": Field(
        128,
        """Response positions whose logits exist at a time: `train.micro_batch` x chunk x V float32 values.
        Lower it to save memory.""",
        least=1,
    ),
    "segments.kind": Field(
        "punkt",
        """What a segment is.

        - `punkt`: sentences as NLTK's English Punkt model splits them, found on the device.
        - `punkt_untrained`: the same without the model's word lists, so no abbreviations are known.
        - `newline`: lines; blank lines are left out.
        - `fixed:N`: N tokens, such as `fixed:64`.
        - `token`: every token.
        - `nltk`: `punkt` by NLTK itself, for checks. It runs on the host between sampling and the training
          step, and the devices wait for it: 2.5 to 6 seconds for each million response tokens of a process
          (0.16 to 0.4 s for 64 x 1024 tokens) on one core. Needs `pip install nltk`.""",
    ),
    "segments.punkt": Field(
        "",
        """For `punkt` and `nltk`: a folder of NLTK's punkt_tab, such as `.../punkt_tab/english`, to take the
        word lists from. `""` takes the packaged English ones.""",
    ),
}
