"""Which of the student's parameters are trained. The others keep their values and need no gradient and no
optimizer state.

Parameters are named by the last key of their path, so a name means that weight in every block: `query`,
`down`, `embedding` (which is also the head, if the two are tied).
"""

import optax
from flax import traverse_util

from opd_jax.errors import UserError, nearest


def split(params: dict, names) -> tuple[dict, dict]:
    """(trained, frozen) of nested parameters: two dicts of the same nesting, without what the other has."""
    flat = traverse_util.flatten_dict(params)
    frozen = {path: x for path, x in flat.items() if path[-1] in names}
    trained = {path: x for path, x in flat.items() if path not in frozen}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: dict, frozen: dict) -> dict:
    """The parameters that `split` took apart."""
    flatten = traverse_util.flatten_dict
    return traverse_util.unflatten_dict(flatten(trained) | flatten(frozen))


def alone(optimizer: optax.GradientTransformation, names) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the parameters without `names`, initialised from all of them."""

    def init(params):
        return optimizer.init(split(params, names)[0])

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(optimizer).update)


def check(params: dict, frozen):
    """Refuses names that no parameter has, and a student with nothing left to train.

    Raises:
      UserError: names train.frozen.
    """
    names = {path[-1] for path in traverse_util.flatten_dict(params)}
    for name in frozen:
        if name not in names:
            raise UserError(
                f"train.frozen names {name}, which the student does not have{nearest(name, names)}; "
                f"it has {', '.join(sorted(names))}"
            )
    if names <= set(frozen):
        raise UserError("train.frozen names every parameter of the student; leave one to train")
