"""What a config leaves open, settled by the machine: compute dtypes, products, attention kernels, layers.

Nothing here reads weights.
"""

import jax

from opd_jax.errors import UserError
from opd_jax.models import ModelConfig, cpu, few_rows
from opd_jax.models import cache as kv
from opd_jax.models.files import source
from opd_jax.parallel import Layout, distributed
from opd_jax.run.run_record import has_steps, read_config


def models(config, mesh) -> tuple[ModelConfig, ModelConfig]:
    """(student, teacher) as they run on the mesh: compute dtypes resolved, the student pruned.

    Raises:
      UserError: there is no such model, or it does not have the layers to drop.
    """
    teacher = model(config.teacher.path, "teacher.path", mesh, config.teacher.dtype)
    teacher = teacher.replace(
        weights=config.teacher.weights,
        products=config.teacher.products,
        layout=layout(config, "teacher"),
        cache_reads=cache_reads(config, teacher),
        attention=attention_kernel(config, mesh, "teacher.path", teacher),
    )
    return student_model(config, mesh), teacher


def student_model(config, mesh) -> ModelConfig:
    """The student of `models`."""
    student = model(config.student.path, "student.path", mesh, config.student.compute_dtype)
    drop = config.student.drop_layers
    try:
        pruned = student.without(drop)
    except ValueError:
        raise UserError(
            f"student.drop_layers={tuple(drop)} does not fit a model of {student.layers} layers; "
            f"give indices from 0 to {student.layers - 1}, and keep at least one"
        ) from None
    return pruned.replace(
        products=config.student.products,
        layout=layout(config, "student"),
        cache_reads=cache_reads(config, student),
        attention=attention_kernel(config, mesh, "student.path", student),
    )


def settle_products(config, mesh, workdir=None) -> cpu.Probe | None:
    """Replaces student.products and teacher.products of auto by what this machine takes, in place.

    On a CPU that is what the run in `workdir` began with, or what a probe finds; process 0 decides for all.
    Elsewhere it is compute. Call it in every process.

    Returns:
      The probe; None where none was needed.

    Raises:
      UserError: the workdir's config.json is damaged.
    """
    models = [name for name in ("student", "teacher") if config[name].products == "auto"]
    probe, taken = None, dict.fromkeys(models, "compute")
    if models and mesh.devices.flat[0].platform == "cpu":
        probe = cpu.probe()
        begun = (read_config(workdir) if workdir is not None and has_steps(workdir) else None) or {}
        found = [begun.get(name, {}).get("products", probe.choice) for name in models]
        narrow = [name == "bfloat16" for name in found]
        if jax.process_count() > 1:
            narrow = distributed.gathered(narrow)[0]
        taken = {name: "bfloat16" if on else "compute" for name, on in zip(models, narrow, strict=True)}
    for name, choice in taken.items():
        config[name].products = choice
    return probe


def layout(config, name: str) -> Layout:
    """The tables that `student` or `teacher` runs by."""
    return Layout(config.sharding[name], config.sharding.cache, config.sharding.batch)


def model(path: str, key: str, mesh, dtype: str) -> ModelConfig:
    """One model as it runs on the mesh; `key` names the path in messages, a dtype of auto is resolved.

    A TPU multiplies float32 in bfloat16 passes unless JAX asks for more. With a float32 model it does, in the
    whole process.
    """
    platform = mesh.devices.flat[0].platform
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    if platform == "tpu" and dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    return source.config(path, key).replace(
        compute_dtype=dtype,
        decoding=few_rows.decoding(platform),
        cache_reads=kv.reads(platform),
    )


def cache_reads(config, model: ModelConfig) -> str:
    """ModelConfig.cache_reads, as attention.decode and sharding.cache allow."""
    whole = config.attention.decode == "all" or config.sharding.cache == "slots"
    return "all" if whole else model.cache_reads


def attention_kernel(config, mesh, key: str, model: ModelConfig) -> str:
    """ModelConfig.attention for prompt and response together, as attention.kernel says.

    Raises:
      UserError: splash is asked for and the devices or the model at `key` do not allow it.
    """
    asked, refused = config.attention.kernel, None
    if mesh.devices.flat[0].platform != "tpu":
        refused = "runs on TPU alone"
    elif model.kv_heads % mesh.shape["tensor"]:
        refused = f"needs a mesh.tensor that divides the {model.kv_heads} key heads of {key}"
    if asked == "splash" and refused:
        raise UserError(f"attention.kernel=splash {refused}; set it to auto or plain")
    return "splash" if asked != "plain" and not refused else "plain"
