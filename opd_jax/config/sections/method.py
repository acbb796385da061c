"""Fields of the release rule, the objective, the reward, the optimizer and the training step."""

from opd_jax.declare import Field, listed_in

FIELDS = {
    "release.rule": Field(
        "paper",
        """Which positions are supervised, and how much. docs/rules.md has the formulas and sources, and says
        how to add a rule. None shortens sampling by itself; see `release.stop`.

        - `none`: all positions.
        - `paper`: up to the drop of the teacher's margin.
        - `advantage_std`: up to the drop of the advantage's standard deviation.
        - `suffix`: only what `paper` releases.
        - `shuffled`: `paper`'s release points, permuted between the rollouts of the batch.
        - `random`: a random cut that keeps as many tokens of the batch as `paper`, in expectation.
        - `prefix`: a fixed length or share.
        - `esr`: a fixed length of 100 tokens.
        - `popd`: a share of the limit that grows with the step to all of it.
        - `kat`: up to where the two models agree for some sentences in a row.
        - `fopd`: a length that grows with the step.
        - `iw_opd`: all, weighted by how little the student has drifted.
        - `prune_opd`: all, with less weight after each token at which the two models' candidates differ.
        - `ta_opd`: the most teachable tokens.""",
        allowed=listed_in("opd_jax.release.rules", "RULES"),
    ),
    "release.min_segments": Field(
        4,
        """Fewest segments in which a change point is looked for. With 2, any drop counts. With 3, two equal
        neighbours are enough. The paper leaves it open.""",
        least=2,
    ),
    "release.rescale": Field(
        "sequence",
        """How the loss mass that the weights take away or add is restored: `sequence` for each response,
        `batch` for the whole batch, `none` not at all.""",
        allowed=listed_in("opd_jax.release", "RESCALES"),
    ),
    "release.stop": Field(
        "never",
        """Whether responses that are trained on end before their end (docs/stopping.md). Evaluations always
        write whole responses.

        - `never`: no.
        - `rule`: where `release.rule` is certain. The teacher reads along and scores each block.
        - `length:N`: after N tokens.
        - `grow:A:B:STEPS`: after a number of tokens that grows from A to B over so many steps.
        - `random:A:B`: after a number of tokens that is drawn for each row between A and B, as a control.""",
    ),
    "release.stop_block": Field(
        64,
        """Tokens that are written before the teacher reads them and the rule looks, with
        `release.stop=rule`. A row ends at most so many tokens late.""",
        least=2,
    ),
    "release.stop_gain": Field(
        4.0, "Nats of BIC gain above which a drop is certain, with `release.stop=rule`.", least=0
    ),
    "release.stop_after": Field(
        8, "Sentences after the cut without which a drop is not certain, with `release.stop=rule`.", least=1
    ),
    "release.stop_cache_dtype": Field(
        "auto",
        """Dtype of the keys and values of the teacher that reads along. `auto` is its compute dtype. `int8`
        takes about half of the memory of bfloat16, and its scores are then those of the rounded model.""",
        allowed=("auto", "int8"),
    ),
    "release.stop_audit": Field(
        0.05,
        """Share of rollouts, drawn at random, that are written to their ends whatever `release.stop` says.
        They tell how often it agrees with the rule on whole responses, and teach how responses end.""",
        least=0,
        most=1,
    ),
    "objective.name": Field(
        "policy_gradient",
        """What the student minimises at each supervised position (docs/objectives.md). S is the student, T
        the teacher, A = log T(y) - log S(y).

        - `policy_gradient`: -A log S(y).
        - `reverse_kl`: KL(S || T).
        - `forward_kl`: KL(T || S).
        - `jsd`: between the two.
        - `sft`: -log S(y) on responses that the teacher writes. The student's scores are recomputed.
        - `eopd`: policy gradient, plus the forward KL on the teacher's top tokens where its entropy is
          high.
        - `aopd`: policy gradient where A > 0, that forward KL elsewhere.

        `reverse_kl`, `forward_kl` and `jsd` cover the whole vocabulary. They apply the teacher's output
        matrix a second time and keep its final hidden states, B x T x D_teacher values.""",
        allowed=listed_in("opd_jax.distill.objectives", "OBJECTIVES"),
    ),
    "objective.top_k": Field(
        16,
        """For `eopd` and `aopd`: how many of the teacher's top tokens count singly. All others form one
        group.""",
        least=1,
        most=64,
    ),
    "objective.advantage_clip": Field(
        0.0,
        """Largest |A| of a token in nats, before any reward is added. 0 is off. Only for objectives that read
        A.""",
        least=0,
    ),
    "objective.importance_cap": Field(
        2.0,
        """Largest importance weight p_S / q of a token, where q is the distribution that it was drawn from.
        It matters only if `rollout.temperature`, `top_k`, `top_p` or `min_p` shape that distribution. Then A
        of each token is multiplied by its weight, in the loss and in the metric `kl`. 0 is off and takes the
        tokens as drawn from p_S.""",
        least=0,
    ),
    "objective.end_weight": Field(
        0.0,
        """Weight of an extra loss at every response position, released ones included: the forward KL of "the
        response ends here". 0 is off. It costs one more pass over each chunk of logits.""",
        least=0,
    ),
    "reward.weight": Field(
        0.0,
        """Nats of advantage for each unit of task reward. It adds weight x (reward - its mean over the batch)
        to A at every token of a response. The reward is 1 for a right final answer and 0 for a wrong one;
        prompts without an `answer` have none. 0 is off. It costs one host round trip a step: the device
        waits while responses are decoded and graded.""",
        least=0,
    ),
    "optimizer.learning_rate": Field(1e-6, "Adam's learning rate after the warm-up.", least=0),
    "optimizer.warmup_steps": Field(
        0, "Updates over which the learning rate rises from 0 to its full value. 0 is off.", least=0
    ),
    "optimizer.schedule": Field(
        "constant",
        """Learning rate after the warm-up: `constant`, or `linear` or `cosine` towards 0, which it would
        reach one update after the last.""",
        allowed=("constant", "linear", "cosine"),
    ),
    "optimizer.decay_steps": Field(
        0,
        """Training steps over which a `linear` or `cosine` schedule runs to 0. 0 is `train.steps`. Set it to
        make a decaying run longer: with another number of steps the rate of the steps done would have been
        another.""",
        least=0,
    ),
    "optimizer.b1": Field(
        0.9,
        """Adam's decay of the first moment. 0 is no momentum and stores no first moment, which saves 4 bytes
        a parameter.""",
        least=0,
        most=0.99999,
    ),
    "optimizer.b2": Field(0.95, "Adam's decay of the second moment.", least=0, most=0.99999),
    "optimizer.eps": Field(1e-8, "Added to the root of the second moment in Adam's denominator.", least=0),
    "optimizer.weight_decay": Field(0.0, "Decoupled weight decay, as in AdamW. 0 is off.", least=0),
    "optimizer.clip_norm": Field(
        1.0, "Largest global norm of the gradient; larger ones are scaled down. 0 is off.", least=0
    ),
    "optimizer.mu_dtype": Field(
        "float32",
        "Dtype of Adam's first moment. `bfloat16` saves 2 bytes a parameter.",
        allowed=("float32", "bfloat16"),
    ),
    "optimizer.memory": Field(
        "device",
        """Where the moments are kept between updates. `host` keeps them in the memory of the hosts, which
        frees 8 bytes of device memory a parameter (6 with a bfloat16 first moment) while responses are
        written and gradients are taken. Each update then moves them over the hosts' buses, both ways.""",
        allowed=("device", "host"),
    ),
    "train.steps": Field(100, "Rollout batches to train on.", least=1),
    "train.micro_batch": Field(
        0,
        """Rollouts whose activations exist at a time; it must divide `rollout.batch`. 0 takes the whole
        batch. Lower it to save memory.""",
        least=0,
    ),
    "train.pack": Field(
        True,
        """Whether rows are laid behind each other before they are scored and their gradient is taken, so that
        padding is not computed: the whole response for scoring, and for the gradient the part up to the last
        supervised token. It takes effect if `train.micro_batch` is smaller than `rollout.batch`. With `False`
        every row is computed at full length.""",
    ),
    "train.updates_per_rollout": Field(
        1,
        "Optimizer updates on each rollout batch. More than 1 uses the clipped importance ratio.",
        least=1,
    ),
    "train.clip_ratio": Field(
        0.2,
        "Clip range of the importance ratio. Used if `train.updates_per_rollout` is more than 1.",
        least=1e-6,
        most=1,
    ),
    "train.max_skips": Field(
        10,
        """Updates in a row that may be skipped because the loss or the gradient is not finite. A skipped
        update changes neither weights nor moments. After one more the run stops, with its last checkpoint
        kept.""",
        least=0,
    ),
    "train.frozen": Field(
        (),
        """Parameters of the student that are not trained, by name, such as `("embedding",)` or `("query",
        "key")`. A name is that weight in every block. If the head is tied, `embedding` is the head too.
        Frozen parameters need no gradient and no optimizer state: 12 bytes a parameter less with a float32
        first moment. `()` trains all.""",
        items=str,
    ),
    "train.remat": Field(
        "full",
        """What is kept of each block for the backward pass. `none` recomputes nothing and keeps everything;
        `dots` keeps the matrix products; `full` keeps nothing, which needs the least memory and costs one
        more forward pass.""",
        allowed=("none", "dots", "full"),
    ),
}
