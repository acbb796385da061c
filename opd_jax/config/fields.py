"""Every field of a run, with its unit, allowed values and what it costs.

A recipe is a file beside this one whose get_config() starts from this and changes what it needs. Any field
can be changed on the command line: --config.release.rule=none. Unknown fields and values are refused.
"""

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """The default of every field; student.path and teacher.path have none and must be set."""
    c = ConfigDict()

    # Seed of everything random: sampling, data order. Runs with equal seeds see the same prompts and draws.
    c.seed = 0

    c.student = ConfigDict()
    # Where the student comes from: a Hugging Face folder, a .gguf file, or pkg:NAME for a GGUF inside an
    # installed Python package.
    c.student.path = ""
    # 0-based indices of blocks to remove before training; () keeps all.
    c.student.drop_layers = ()
    # Dtype of activations and matrix products: float32, bfloat16, or auto (bfloat16 on TPU and GPU, float32
    # on CPU). Master parameters and the optimizer's variance are always float32.
    c.student.compute_dtype = "auto"
    # Operands of the blocks' matrix products: compute (the compute dtype), bfloat16 where that is float32
    # (sums, activations and the output matrix stay float32), or auto. On a CPU, auto times both at the start
    # and takes bfloat16 if the CPU has the instructions and gains at least a fifth by them; elsewhere it is
    # compute. A run keeps what it began with (docs/models.md).
    c.student.products = "auto"

    c.teacher = ConfigDict()
    # As student.path. Must have the student's tokenizer.
    c.teacher.path = ""
    # Dtype of the teacher's weights and activations: float32, bfloat16, or auto.
    c.teacher.dtype = "auto"
    # As student.products, when the teacher scores.
    c.teacher.products = "auto"
    # How its matrices are kept: float (in that dtype), or int8 with a float32 scale for each output channel,
    # quantised while loading: half the memory and traffic of bfloat16. docs/models.md has what it costs.
    c.teacher.weights = "float"
    # The id of the teacher's end token where it is not the student's (a Base student, an Instruct teacher):
    # the teacher's logits of the two are exchanged, so that it is asked for its own end where the student
    # writes the student's. -1: both end with the same token, and a difference is refused.
    c.teacher.end_id = -1

    c.attention = ConfigDict()
    # How whole sequences (scoring, the student's gradient, evaluation) attend: plain, which writes every
    # score; splash, JAX's TPU kernel, which writes none, for head sizes and sequences (data.prompt_tokens +
    # rollout.max_tokens) divisible by 128; or auto, splash where devices and sizes allow it.
    c.attention.kernel = "auto"

    c.data = ConfigDict()
    # Where prompts come from: demo (reasoning-gym's gsm_symbolic and everyday requests), jsonl, parquet,
    # deepmath, gsm8k, dapo (files of these data sets), tfds, rg:TASK (a generator of reasoning-gym), or
    # mixture. docs/data.md has the formats.
    c.data.source = "demo"
    # jsonl, parquet, deepmath, gsm8k, dapo: the file, or several: deepmath-*.parquet. tfds: the data set's
    # name or folder. Others: unused.
    c.data.path = ""
    # jsonl, parquet, tfds: columns of the prompt (text or messages) and of the reference answer, dotted where
    # nested (reward_model.ground_truth). "": messages, prompt, question or problem; and answer.
    c.data.columns = ConfigDict({"prompt": "", "answer": ""})
    # mixture: ("WEIGHT KIND:PATH [prompt=COLUMN] [answer=COLUMN]", ...), as in ("3 rg:chain_sum",
    # "1 jsonl:a.jsonl").
    # Rows of the batches come from each source in proportion to its weight, whatever its size.
    c.data.mixture = ()
    # rg: how many problems are generated, and the seed they are generated from.
    c.data.generated = 1000
    c.data.generated_seed = 0
    # Where prepared data sets are kept; "" is ~/.cache/opd_jax (or $XDG_CACHE_HOME/opd_jax).
    c.data.cache = ""
    # P, the width prompts are left-padded to, tokens; the longest that a prompt may be. Costs compute for
    # every padded token.
    c.data.prompt_tokens = 256
    # Smaller widths, such as (64, 128): a training batch takes the least that holds its longest prompt, else
    # prompt_tokens. Changes no response, only padding; sampler and training step are compiled once for each
    # width that occurs. Evaluations keep prompt_tokens.
    c.data.prompt_buckets = ()
    # What happens to a longer prompt: error, or drop (counted).
    c.data.over_long = "error"
    # What happens to exact copies of a prompt within one source: drop (the first stays; counted), or keep.
    c.data.repeats = "drop"
    # System message put before each prompt; "" leaves the chat template's own.
    c.data.system_prompt = ""
    # Text put after each prompt, after a blank line, such as where to put the final answer.
    c.data.instruction = ""
    # JSONL file of {"prompt", "response"} shown as earlier turns before each prompt; "" shows none.
    c.data.few_shot = ""
    # Extra arguments of the chat template, a JSON object, such as {"enable_thinking": false} for Qwen3 or
    # {"date_string": "26 Jul 2024"} for Llama 3; "" gives none. Student and teacher are read with the same.
    c.data.template = ""
    # How many prompts are held out for evaluation, never trained on.
    c.data.heldout = 32

    c.rollout = ConfigDict()
    # B, rollouts a step, over all devices and hosts.
    c.rollout.batch = 64
    # n, responses to each prompt of a training step, which then has B / n prompts; they share one prefill.
    # Must divide B, and B / n must be a multiple of mesh.data x mesh.fsdp. Evaluation takes one a prompt.
    c.rollout.samples_per_prompt = 1
    # T, the longest response, tokens.
    c.rollout.max_tokens = 1024
    # Sampling temperature; 0 is greedy. Log-probabilities for training are always at temperature 1.
    c.rollout.temperature = 1.0
    # Ids that end a response. (): those that config.json, generation_config.json, tokenizer and chat template
    # of the student name, and where the teacher's are others, the run is refused.
    c.rollout.end_ids = ()
    # Sample from the k most likely tokens; 0 keeps all.
    c.rollout.top_k = 0
    # Sample from the smallest set of tokens with this probability; 1 keeps all.
    c.rollout.top_p = 1.0
    # Sample from the tokens at least this share as likely as the most likely one, 0 to 1; 0 keeps all. The
    # filters apply in this order, after the temperature: top_k, top_p, min_p.
    c.rollout.min_p = 0.0
    # Dtype of cached keys and values: auto (the compute dtype), or int8 with one float32 scale a token and
    # head: 1 + 4 / head_size bytes a value. The sampler's log-probabilities are then of the rounded model, so
    # scoring.student=recompute is required, except where the teacher writes (objective.name=sft).
    c.rollout.cache_dtype = "auto"
    # Sizes the KV cache grows through while a response is written. A decode step reads the whole cache: n
    # stages save (n - 1) / 2n of that traffic for the response part, and compile the decode step n times.
    c.rollout.cache_stages = 1

    c.scoring = ConfigDict()
    # K, the student's top tokens within which the teacher's margin is taken; at least 2, the paper's is 4.
    c.scoring.candidates = 4
    # Whose logits give the candidates and log p_S of the advantage: sampler (free), or recompute (one more
    # student forward pass; the same numbers up to rounding).
    c.scoring.student = "sampler"
    # Positions of a response whose logits exist at a time: micro_batch x chunk x V float32 values.
    c.scoring.chunk = 128

    c.segments = ConfigDict()
    # What a segment is:
    #   punkt            sentences as NLTK's English Punkt model splits them, found on device
    #   punkt_untrained  the same without the model's word lists (no abbreviations known)
    #   newline          lines, blank ones left out
    #   fixed:N          N tokens, such as fixed:64
    #   token            every token
    #   nltk             punkt by NLTK itself, on the host, between sampling and the training step; needs
    #                    `pip install nltk`. For checks: the devices wait for it, 2.5 to 6 seconds for every
    #                    million response tokens of a process (64 x 1024 tokens: 0.16 to 0.4 s), on one core.
    c.segments.kind = "punkt"
    # punkt, nltk: a folder of NLTK's punkt_tab (such as .../punkt_tab/english) to take the word lists from;
    # "" takes the packaged English ones.
    c.segments.punkt = ""

    c.release = ConfigDict()
    # Which positions are supervised, and how much; docs/rules.md has the formulas and sources.
    #   none          all of them
    #   paper         up to the drop of the teacher's margin
    #   advantage_std up to the drop of the advantage's standard deviation
    #   suffix        what paper releases, and nothing else
    #   shuffled      paper's release points, permuted between the rollouts of the batch
    #   random        a random cut that keeps as many tokens of the batch as paper, expected
    #   prefix        a fixed length or share
    #   fopd          a length that grows with the step
    #   iw_opd        all, weighted by how little the student had drifted
    #   prune_opd     all, weighted down with each token at which the two models' candidates differ
    #   ta_opd        the most teachable tokens
    # All score the whole response: none shortens sampling.
    c.release.rule = "paper"
    # Fewest sentences in which a change point is looked for. At 2 any drop fires, at 3 two equal neighbours
    # do; the paper leaves it open.
    c.release.min_segments = 4
    # What restores the loss mass that the mask takes away (or weights add): sequence, batch, or none.
    c.release.rescale = "sequence"
    # prefix: tokens kept of each response; 0 keeps the share prefix_fraction instead.
    c.release.prefix_tokens = 0
    # prefix: share of each response kept, above 0 and at most 1; used where prefix_tokens is 0.
    c.release.prefix_fraction = 0.3
    # fopd: tokens kept at the first step, and from step number fopd_steps on; linear between.
    c.release.fopd_start = 128
    c.release.fopd_end = 1024
    c.release.fopd_steps = 100
    # iw_opd: gamma, how much more than 1 the first token weighs.
    c.release.iw_gamma = 0.5
    # prune_opd: a token has drifted if a smaller share of the student's scoring.candidates is among the
    # teacher's as many best, 0 to 1. The authors' runs use 16 to 256 candidates.
    c.release.prune_overlap = 0.7
    # prune_opd: weight lost for each drifted token, from 1 down to 0, and what is added to it everywhere.
    # With a base of 0, tokens after 1 / prune_drop drifted ones are not supervised at all.
    c.release.prune_drop = 0.01
    c.release.prune_base = 0.5
    # ta_opd: share of each response's tokens supervised, above 0 and at most 1.
    c.release.ta_share = 0.05

    c.objective = ConfigDict()
    # What the student minimises at each supervised position (S student, T teacher; docs/objectives.md):
    # policy_gradient (-A log S(y), A = log T(y) - log S(y)), reverse_kl (KL(S || T)), forward_kl
    # (KL(T || S)), jsd (between the two), sft (-log S(y), on responses that the teacher writes), eopd
    # (policy gradient, plus forward KL on the teacher's top tokens where its entropy is high) or aopd
    # (policy gradient where A > 0, that forward KL elsewhere). The three divergences over the whole
    # vocabulary apply the teacher's output matrix a second time and keep its final hidden states,
    # B x T x D_teacher values; sft samples from the teacher, and recomputes the student's scores.
    c.objective.name = "policy_gradient"
    # jsd: beta of beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S. 0 is forward_kl, 1 is
    # reverse_kl. Unused by the others.
    c.objective.beta = 0.5
    # eopd, aopd: how many of the teacher's top tokens count singly, 1 to 64; all others form one group.
    c.objective.top_k = 16
    # eopd: teacher entropy in nats above which the forward KL is added.
    c.objective.entropy_threshold = 0.8
    # Largest |A| of a token, nats, before any reward is mixed in; 0 does not clip. For objectives with A.
    c.objective.advantage_clip = 0.0

    # Weight, 0 or more, of an extra loss at every response position, released ones too: the forward KL of
    # "the response ends here". 0 leaves it out. Costs one more pass over each chunk of logits.
    c.objective.end_weight = 0.0

    c.reward = ConfigDict()
    # Nats of advantage a unit of task reward: adds weight x (reward - its mean over the batch) to A at every
    # token of a response. The reward is 1 for a right final answer and 0 for a wrong one; prompts without an
    # `answer` have none. Costs one host round trip a step, in which the device waits: responses are decoded
    # and graded between sampling and the training step. 0 leaves all of that out.
    c.reward.weight = 0.0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-6
    # Updates over which the rate rises from 0.
    c.optimizer.warmup_steps = 0
    # After the warm-up: constant, or linear or cosine towards 0, which the update after the last would have.
    c.optimizer.schedule = "constant"
    # Adam's decay of the first moment. 0 is no momentum, and keeps no first moment: 4 bytes a parameter less.
    c.optimizer.b1 = 0.9
    # Its decay of the second moment.
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    # Largest global gradient norm; 0 never clips.
    c.optimizer.clip_norm = 1.0
    # Dtype of Adam's first moment: float32 or bfloat16 (saves 2 bytes a parameter).
    c.optimizer.mu_dtype = "float32"
    # Where the moments lie between updates: device, or host (memory of the devices' hosts, from which every
    # update fetches them, and to which it returns them). host frees 8 bytes of device memory a parameter (6
    # with a bfloat16 first moment) while responses are written and gradients taken, at the price of that
    # traffic, both ways, over the hosts' buses in every update.
    c.optimizer.memory = "device"

    c.train = ConfigDict()
    # Rollout batches to train on.
    c.train.steps = 100
    # Rollouts whose activations are alive at a time; divides rollout.batch. 0 means all of them.
    c.train.micro_batch = 0
    # Optimizer updates on each rollout batch. More than 1 uses the importance ratio, clipped.
    c.train.updates_per_rollout = 1
    # Clip range of the importance ratio, used when updates_per_rollout > 1.
    c.train.clip_ratio = 0.2
    # The student's parameters that keep their values, by name: ("embedding",), ("query", "key"). A name is
    # that weight in every block; where the head is tied, embedding is the head too. They cost no gradient
    # and no optimizer state: with a float32 first moment 12 bytes a parameter less.
    c.train.frozen = ()
    # What the backward pass keeps of each block: none (everything kept), dots (matrix products kept), full
    # (nothing kept: one more forward pass of compute, least memory).
    c.train.remat = "full"

    c.mesh = ConfigDict()
    # A mesh by name, with the sizes of data x fsdp x tensor:
    #   one_chip  1 x 1 x 1
    #   one_host  1 x all x 1        the chips of one host
    #   slice     1 x all x 1        the chips of one slice
    #   slices    slices x rest x 1  several slices: only data goes across them; good on one as well
    #   replicas  all x 1 x 1        every device holds whole models: where they fit, the least traffic
    c.mesh.preset = "slices"
    # Devices along each axis, in place of the preset's; 0 leaves the preset's, and one may be -1 and takes
    # what is left. The batch is cut over data and fsdp, weights over fsdp (width) and tensor (heads, ffn,
    # vocabulary). More tensor for fewer rollouts than devices, or where a weight must be cut further.
    c.mesh.data = 0
    c.mesh.fsdp = 0
    c.mesh.tensor = 0

    # Which mesh axes cut which axes of an array; the tables are data in opd_jax/parallel/layouts.py.
    c.sharding = ConfigDict()
    # The student's weights, gradients and moments: fsdp (width over fsdp; heads, ffn, vocabulary and experts
    # over tensor; a block's weights are gathered over fsdp when its turn comes), tensor (over tensor alone:
    # nothing is gathered, and a device holds fsdp times as much) or whole (every device holds all).
    c.sharding.student = "fsdp"
    # The teacher's weights, as sharding.student.
    c.sharding.teacher = "fsdp"
    # Keys and values while responses are written, over tensor: heads (key heads), or slots (positions, for a
    # mesh.tensor that does not divide the key heads: each step then sums over tensor). Rows always lie with
    # their rollouts.
    c.sharding.cache = "heads"
    # Activations: rows (over data and fsdp), or positions (between the blocks over tensor too, by position:
    # a tensor-th of what train.remat=full keeps, at the price of a gather and a scatter in every block).
    c.sharding.batch = "rows"

    c.compile = ConfigDict()
    # Where compiled programs are kept for the next start: a folder; off; or auto, which is
    # $JAX_COMPILATION_CACHE_DIR where set, else ~/.cache/opd_jax/compiled on TPU and GPU, and off on CPU.
    c.compile.cache = "auto"

    c.eval = ConfigDict()
    # Steps between evaluations on the held-out prompts, rollout.batch at a time; the first is before
    # training, the last after it. 0 never evaluates.
    c.eval.every = 10
    # Benchmarks answered and graded during training, by the same compiled sampler: ("gsm8k:FILE", "champ",
    # "rg:chain_sum", "heldout"); docs/evaluation.md has the names.
    c.eval.benchmark = ()
    # Steps between these, beside the one after the last step.
    c.eval.benchmark_every = 50
    # Responses a problem there.
    c.eval.samples = 1

    c.checkpoint = ConfigDict()
    # Steps between checkpoints, beside the one after the last step. 0 saves no checkpoint at all.
    c.checkpoint.every = 50
    # Newest checkpoints kept, beside the best one by held-out KL.
    c.checkpoint.keep = 2

    c.metrics = ConfigDict()
    # Steps between lists of rollouts written to rollouts.jsonl, and how many each time; 0 writes none. Those
    # whose prompts have an `answer` are graded, in processes of their own while the device works on the next
    # step. The report's curves of S, and those of right and wrong answers, are of these rollouts alone.
    c.metrics.rollouts_every = 10
    c.metrics.rollouts = 4
    # Steps between measurements of the gradient's norm and signal-to-noise ratio, of the tokens trained on,
    # of all and of the released ones; 0 never measures, and costs nothing. Each is a program of its own
    # before the step: it scores the rollouts again and takes three gradients over the batch, up to thrice
    # the time of the training step, and needs twice the student's float32 parameters of memory beside the
    # activations of a micro-batch.
    c.metrics.gradient_noise_every = 0
    # Write TensorBoard event files.
    c.metrics.tensorboard = True
    # Weights & Biases project; "" stays off. Needs `pip install wandb`.
    c.metrics.wandb = ""
    return c


get_config = default  # as a recipe has it
