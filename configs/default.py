"""Every field of a run, with its unit, allowed values and what it costs.

A recipe is a file beside this one whose get_config() starts from this and changes what it needs. Any field
can be changed on the command line: --config.release.rule=none. Unknown fields and values are refused.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
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

    c.teacher = ConfigDict()
    # As student.path. Must have the student's tokenizer.
    c.teacher.path = ""
    # Dtype of the teacher's weights and activations: float32, bfloat16, or auto.
    c.teacher.dtype = "auto"

    c.data = ConfigDict()
    # Where prompts come from: demo (reasoning-gym's gsm_symbolic and everyday requests), jsonl, or tfds.
    c.data.source = "demo"
    # jsonl: the file. tfds: the data set's name or folder. demo: unused.
    c.data.path = ""
    # Where prepared data sets are kept; "" is ~/.cache/opd_jax (or $XDG_CACHE_HOME/opd_jax).
    c.data.cache = ""
    # P, the width every prompt is left-padded to, tokens. Costs compute for every padded token.
    c.data.prompt_tokens = 256
    # What happens to a longer prompt: error, or drop (counted).
    c.data.over_long = "error"
    # System message put before each prompt; "" leaves the chat template's own.
    c.data.system_prompt = ""
    # How many prompts are held out for evaluation, never trained on.
    c.data.heldout = 32

    c.rollout = ConfigDict()
    # B, prompts and so rollouts a step, over all devices and hosts.
    c.rollout.batch = 64
    # T, the longest response, tokens.
    c.rollout.max_tokens = 1024
    # Sampling temperature; 0 is greedy. Log-probabilities for training are always at temperature 1.
    c.rollout.temperature = 1.0
    # Sample from the k most likely tokens; 0 keeps all.
    c.rollout.top_k = 0
    # Sample from the smallest set of tokens with this probability; 1 keeps all.
    c.rollout.top_p = 1.0

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
    #                    `pip install nltk`. For checks: the devices wait for it, about 5 seconds for every
    #                    million response tokens of a process (a step of 64 x 1024: 0.3 s), on one core.
    c.segments.kind = "punkt"
    # punkt, nltk: a folder of NLTK's punkt_tab (such as .../punkt_tab/english) to take the word lists from;
    # "" takes the packaged English ones.
    c.segments.punkt = ""

    c.release = ConfigDict()
    # Which positions are supervised: none (all of them), or paper (up to the change point).
    c.release.rule = "paper"
    # Fewest sentences in which a change point is looked for. At 2 any drop fires, at 3 two equal neighbours
    # do; the paper leaves it open.
    c.release.min_segments = 4
    # What restores the loss mass that the mask takes away: sequence, batch, or none.
    c.release.rescale = "sequence"

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-6
    # Updates over which the rate rises from 0.
    c.optimizer.warmup_steps = 0
    # After the warm-up: constant, or linear or cosine towards 0, which the update after the last would have.
    c.optimizer.schedule = "constant"
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    # Largest global gradient norm; 0 never clips.
    c.optimizer.clip_norm = 1.0
    # Dtype of Adam's first moment: float32 or bfloat16 (saves 2 bytes a parameter).
    c.optimizer.mu_dtype = "float32"

    c.train = ConfigDict()
    # Rollout batches to train on.
    c.train.steps = 100
    # Rollouts whose activations are alive at a time; divides rollout.batch. 0 means all of them.
    c.train.micro_batch = 0
    # Optimizer updates on each rollout batch. More than 1 uses the importance ratio, clipped.
    c.train.updates_per_rollout = 1
    # Clip range of the importance ratio, used when updates_per_rollout > 1.
    c.train.clip_ratio = 0.2
    # What the backward pass keeps of each block: none (everything kept), dots (matrix products kept), full
    # (nothing kept: one more forward pass of compute, least memory).
    c.train.remat = "full"

    c.mesh = ConfigDict()
    # Devices along each axis; one may be -1 and takes what is left. Batch is cut over data and fsdp,
    # weights over fsdp (width) and tensor (heads, ffn, vocabulary).
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1

    c.eval = ConfigDict()
    # Steps between evaluations on the held-out prompts, rollout.batch at a time; the first is before
    # training, the last after it. 0 never evaluates.
    c.eval.every = 10

    c.checkpoint = ConfigDict()
    # Steps between checkpoints, beside the one after the last step. 0 saves no checkpoint at all.
    c.checkpoint.every = 50
    # Newest checkpoints kept, beside the best one by held-out KL.
    c.checkpoint.keep = 2

    c.metrics = ConfigDict()
    # Steps between lists of rollouts written to rollouts.jsonl, and how many each time; 0 writes none.
    c.metrics.rollouts_every = 10
    c.metrics.rollouts = 4
    # Write TensorBoard event files.
    c.metrics.tensorboard = True
    # Weights & Biases project; "" stays off. Needs `pip install wandb`.
    c.metrics.wandb = ""
    return c
