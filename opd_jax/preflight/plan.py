"""The programs of a config for devices that are not attached."""

from opd_jax.config import validate
from opd_jax.parallel import sharding
from opd_jax.run import programs, resolve, sizes


def plan(config, devices) -> programs.Programs:
    """The programs of a config on given devices.

    Raises:
      UserError: the first thing that is wrong.
    """
    validate(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    resolve.settle_products(config, mesh)
    student, teacher = resolve.models(config, mesh)
    valid = min(student.valid_vocab, teacher.valid_vocab)
    student, teacher = (m.replace(eos_ids=student.eos_ids, valid_vocab=valid) for m in (student, teacher))
    if config.teacher.end_id >= 0:  # costs a copy of the teacher's output matrix, whichever ids they are
        teacher = teacher.replace(swapped_ids=(0, config.teacher.end_id))
    sizes.check(config, mesh, student, teacher)
    return programs.Programs.of(config, mesh, student, teacher)
