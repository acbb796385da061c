"""Checks a config before anything is loaded: each field by itself, then fields against each other."""

from ml_collections import ConfigDict

from opd_jax.config.fields import fields, get
from opd_jax.config.plugins import declared_by_others
from opd_jax.distill import objectives, stopping
from opd_jax.errors import UserError
from opd_jax.release.segments import check_kind


def validate(config: ConfigDict, *, teacher: bool = True) -> ConfigDict:
    """Checks every value and fills in what derives from others (train.micro_batch of 0).

    Args:
      teacher: whether the run needs one.

    Returns:
      The config.

    Raises:
      UserError: the first field with a value that is not allowed.
    """
    _check_fields(config)
    _check_together(config, teacher)
    with config.unlocked():
        config.train.micro_batch = config.train.micro_batch or config.rollout.batch
    return config


def _check_fields(config: ConfigDict):
    """Each field by what it is declared to be."""
    plugins = tuple(config.get("plugins", ()))
    for key, field in fields(plugins).items():
        try:
            value = get(config, key)
        except KeyError as error:
            if key == "plugins":  # of a config that is older than the field
                continue
            remedy = f"start from opd_jax.config.default(plugins={plugins})"
            raise UserError(f"{key} is not set; {remedy}") from error
        field.check(key, value)
    hidden = declared_by_others(plugins)
    for key in ("release.rule", "objective.name"):
        section, name = key.partition(".")[0], get(config, key)
        if (section, name) in hidden:
            raise UserError(f"{key}={name} is of a file that `plugins` does not name; add the file")


def _check_together(config: ConfigDict, teacher: bool):
    """Checks fields whose allowed values depend on other fields."""
    teacher_writes = objectives.OBJECTIVES[config.objective.name].writer == "teacher"
    if config.rollout.cache_dtype == "int8" and config.scoring.student == "sampler" and not teacher_writes:
        raise UserError(
            "rollout.cache_dtype=int8 rounds what the sampler's log-probabilities are made of, and "
            "scoring.student=sampler trains on those; set scoring.student=recompute"
        )
    buckets = config.data.prompt_buckets
    if any(not isinstance(n, int) or not 1 <= n <= config.data.prompt_tokens for n in buckets):
        raise UserError(
            f"data.prompt_buckets={tuple(buckets)}: give widths from 1 to "
            f"data.prompt_tokens={config.data.prompt_tokens}, which is always one of them"
        )
    shares = config.rollout.prompt_widths
    if any(not isinstance(share, float) or not 0 < share < 1 for share in shares):
        raise UserError(
            f"rollout.prompt_widths={tuple(shares)}: give shares of data.prompt_tokens above 0 and below 1, "
            "such as (0.25, 0.5), or () for none"
        )
    if config.rollout.batch % config.rollout.samples_per_prompt:
        raise UserError(
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} does not divide "
            f"rollout.batch={config.rollout.batch}, which counts rollouts; choose a divisor"
        )
    if config.release.fopd_start > config.release.fopd_end:
        raise UserError(
            f"release.fopd_start={config.release.fopd_start} is more than "
            f"release.fopd_end={config.release.fopd_end}; the prefix grows, so give a smaller start"
        )
    if config.eval.samples > 1 and config.rollout.temperature == 0:
        raise UserError(
            f"eval.samples={config.eval.samples} needs rollout.temperature above 0, since greedy responses"
            " are all the same; set it to 1"
        )
    for key in ("objective.advantage_clip", "reward.weight"):
        if get(config, key) and not objectives.OBJECTIVES[config.objective.name].advantage:
            readers = (name for name, known in objectives.OBJECTIVES.items() if known.advantage)
            raise UserError(
                f"{key}={get(config, key)} has no effect on objective.name={config.objective.name}, which "
                f"reads no advantage; set it to 0, or use one of {', '.join(readers)}"
            )
    for key in ("student.path", "teacher.path") if teacher else ("student.path",):
        if not get(config, key):
            raise UserError(f"{key} is not set; give a model folder, a .gguf file or pkg:NAME")
    check_kind(config.segments.kind, config.segments.punkt)
    stopping.check(config)
    if config.rollout.batch % (config.train.micro_batch or config.rollout.batch):
        raise UserError(
            f"train.micro_batch={config.train.micro_batch} does not divide "
            f"rollout.batch={config.rollout.batch}; choose a divisor"
        )
    if config.eval.every and not config.data.heldout:
        raise UserError("eval.every needs held-out prompts; set data.heldout, or eval.every=0")
