"""Checks a run's config before anything is loaded, and reads it from the command line."""

import contextlib
import importlib.util
import itertools
import os
import pathlib
import sys
import traceback
import types

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from opd_jax import release
from opd_jax.distill import objectives
from opd_jax.errors import UserError, fail, nearest
from opd_jax.parallel import layouts
from opd_jax.release.segments import check_kind

# Where recipes lie: in an installed package, and in a checkout.
DEFAULT = pathlib.Path(__file__).with_name("fields.py")
RECIPES = tuple(pathlib.Path(__file__).parents[n] / name for n, name in ((1, "recipes"), (2, "configs")))

ALLOWED = {
    "student.compute_dtype": ("auto", "float32", "bfloat16"),
    "student.products": ("auto", "compute", "bfloat16"),
    "teacher.dtype": ("auto", "float32", "bfloat16"),
    "teacher.products": ("auto", "compute", "bfloat16"),
    "teacher.weights": ("float", "int8"),
    "attention.kernel": ("auto", "plain", "splash"),
    "data.over_long": ("error", "drop"),
    "data.repeats": ("drop", "keep"),
    "rollout.cache_dtype": ("auto", "int8"),
    "scoring.student": ("sampler", "recompute"),
    "release.rule": release.RULES,
    "release.rescale": release.RESCALES,
    "objective.name": objectives.OBJECTIVES,
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "optimizer.mu_dtype": ("float32", "bfloat16"),
    "optimizer.memory": ("device", "host"),
    "train.remat": ("none", "dots", "full"),
    "mesh.preset": layouts.MESHES,
    "sharding.student": layouts.WEIGHTS,
    "sharding.teacher": layouts.WEIGHTS,
    "sharding.cache": layouts.CACHE,
    "sharding.batch": layouts.BATCH,
}

# field: (least value, most value or None)
RANGES = {
    "seed": (0, 2**32 - 1),
    "teacher.end_id": (-1, None),
    "data.prompt_tokens": (1, None),
    "data.heldout": (0, None),
    "rollout.batch": (1, None),
    "rollout.samples_per_prompt": (1, None),
    "rollout.max_tokens": (1, None),
    "rollout.temperature": (0, None),
    "rollout.top_k": (0, None),
    "rollout.top_p": (1e-6, 1),
    "rollout.min_p": (0, 1),
    "rollout.cache_stages": (1, None),
    "scoring.candidates": (2, 128),
    "scoring.chunk": (1, None),
    "release.min_segments": (2, None),
    "release.prefix_tokens": (0, None),
    "release.prefix_fraction": (1e-6, 1),
    "release.fopd_start": (1, None),
    "release.fopd_end": (1, None),
    "release.fopd_steps": (1, None),
    "release.iw_gamma": (0, None),
    "release.prune_overlap": (0, 1),
    "release.prune_drop": (0, 1),
    "release.prune_base": (0, None),
    "release.ta_share": (1e-6, 1),
    "objective.beta": (0, 1),
    "objective.top_k": (1, 64),
    "objective.entropy_threshold": (0, None),
    "objective.advantage_clip": (0, None),
    "objective.end_weight": (0, None),
    "reward.weight": (0, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.clip_norm": (0, None),
    "optimizer.b1": (0, 0.99999),
    "optimizer.b2": (0, 0.99999),
    "optimizer.eps": (0, None),
    "optimizer.weight_decay": (0, None),
    "train.steps": (1, None),
    "train.micro_batch": (0, None),
    "train.updates_per_rollout": (1, None),
    "train.clip_ratio": (1e-6, 1),
    "data.generated": (1, None),
    "eval.every": (0, None),
    "eval.benchmark_every": (1, None),
    "eval.samples": (1, None),
    "checkpoint.every": (0, None),
    "checkpoint.keep": (1, None),
    "metrics.rollouts_every": (0, None),
    "metrics.rollouts": (0, None),
    "metrics.gradient_noise_every": (0, None),
}


def get(config: ConfigDict, key: str):
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def validate(config: ConfigDict, *, teacher: bool = True) -> ConfigDict:
    """Checks every value and fills in what derives from others (train.micro_batch of 0).

    Args:
      teacher: whether the run needs one.

    Returns:
      The config.

    Raises:
      UserError: the first field with a value that is not allowed.
    """
    for key, values in ALLOWED.items():
        value = get(config, key)
        if value not in values:
            raise UserError(
                f"{key}={value} is not known{nearest(value, values)}; use one of {', '.join(values)}"
            )
    for key, (low, high) in RANGES.items():
        value = get(config, key)
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{key}={value} is out of range; it must be {limits}")
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
    if config.rollout.batch % config.rollout.samples_per_prompt:
        raise UserError(
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} does not divide "
            f"rollout.batch={config.rollout.batch}, which counts rollouts; choose a divisor"
        )
    if config.rollout.cache_stages > config.rollout.max_tokens:
        raise UserError(
            f"rollout.cache_stages={config.rollout.cache_stages} is more than "
            f"rollout.max_tokens={config.rollout.max_tokens}; lower it"
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
    with config.unlocked():
        config.train.micro_batch = config.train.micro_batch or config.rollout.batch
    if config.rollout.batch % config.train.micro_batch:
        raise UserError(
            f"train.micro_batch={config.train.micro_batch} does not divide "
            f"rollout.batch={config.rollout.batch}; choose a divisor"
        )
    if config.eval.every and not config.data.heldout:
        raise UserError("eval.every needs held-out prompts; set data.heldout, or eval.every=0")
    return config


def load(path: str, *arguments: str) -> ConfigDict:
    """get_config(*arguments) of a Python file.

    Raises:
      UserError: as `load_module`, or the file has no get_config, or that fails.
    """
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path} has no get_config(); see configs/demo.py")
    with _running(path):
        return module.get_config(*arguments)


def find(path: str) -> pathlib.Path:
    """The file that a path, or the name of a recipe such as demo or ablations/rule, stands for.

    Raises:
      UserError: there is none.
    """
    named = (folder / f"{path}.py" for folder in RECIPES)
    for file in (pathlib.Path(path), *named):
        if file.is_file():
            return file
    known = sorted({file.stem for folder in RECIPES for file in folder.glob("*.py") if file.stem[0] != "_"})
    raise UserError(
        f"--config={path}: no such file or recipe{nearest(path, known)}; give a Python file, or one of "
        f"{', '.join(known)}"
    )


def load_module(path: str) -> types.ModuleType:
    """A Python file of configs, or a recipe by its name.

    Raises:
      UserError: there is no such file, or Python cannot run it.
    """
    path = str(find(path))
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    with _running(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _running(path: str):
    """What a user's file raises becomes one line that says where."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else place[:2]
        raise UserError(
            f"--config={path} cannot be run ({type(error).__name__}: {error}, {file}:{line}); mend it"
        ) from error


def run(main, *, config: str | None = None, without_file: bool = False):
    """Parses the command line and runs main(argv); a user's mistake ends in one line and status 2.

    Args:
      main: called with the remaining arguments once flags are parsed.
      config: default of --config=FILE, whose fields --config.key=value replaces.
      without_file: --config.key=value alone changes the default of every field.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there
    default = str(find(config)) if config else None
    about = "A Python file with get_config(), or a recipe by its name."
    config_flags.DEFINE_config_file("config", default, about, lock_config=True)

    def parse(argv):
        given = _config_argument(argv)
        if not given and without_file and any(a.startswith("--config.") for a in argv):
            given = str(DEFAULT)
            argv = [argv[0], f"--config={given}", *argv[1:]]
        path, *arguments = (given or default or "").split(":", 1)
        if given:
            argv = _with_file(argv, given, ":".join([str(find(path)), *arguments]))
        try:
            if path:
                known = _flat(load(path, *arguments))
                _check_fields(argv, known)
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, OSError, ValueError, TypeError) as error:
            fail(error)

    def guarded(argv):
        if not any(a.startswith(("--verbosity", "-v")) for a in sys.argv):
            logging.set_verbosity(logging.WARNING)  # orbax and absl tell every step of a save
        try:
            main(argv)
        except UserError as error:
            fail(error)

    app.run(guarded, flags_parser=parse)


def _config_argument(argv) -> str | None:
    """What --config=FILE[:ARGUMENT] or --config FILE[:ARGUMENT] names."""
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return None


def _with_file(argv: list[str], given: str, file: str) -> list[str]:
    """The words of a command with the file in place of the recipe's name that --config gives."""
    joined = {f"{dash}config={given}": f"{dash}config={file}" for dash in ("--", "-")}
    before = ["", *argv]
    return [
        file if a == given and b in ("--config", "-config") else joined.get(a, a)
        for a, b in zip(argv, before)
    ]


def _check_fields(argv, known: list[str]):
    """Refuses the first --config.KEY that is not among the known keys."""
    for key in (a.partition("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")):
        if key.split("[")[0] not in known:
            raise UserError(f"--config.{key}: no such field{nearest(key, known)}; see configs/default.py")


def _flat(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in config.items():
        keys += _flat(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return keys
