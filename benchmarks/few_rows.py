"""Times the matrix products of a decode step for each layout of the weight and order of the operands.

    python benchmarks/few_rows.py ROWS,IN,OUT [ROWS,IN,OUT ...]
    BENCH_DTYPE=bfloat16 python benchmarks/few_rows.py 8,576,1536

Prints for each product the least wall time and the mean processor time of all threads, in microseconds.
Processor time depends less on the other load of the machine. The forms run in turn, over several copies of
the weight.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp

REPEATS = 60


def summed(left, right, left_axis: int, right_axis: int):
    """The product over one axis of each, in float32."""
    dims = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


FORMS = {  # name: (whether the weight is stored [out, in], the product)
    "x @ w[in,out]": (False, lambda x, w: summed(x, w, 1, 0)),
    "x @ w[out,in].T": (True, lambda x, w: summed(x, w, 1, 1)),
    "(w[out,in] @ x.T).T": (True, lambda x, w: jax.lax.optimization_barrier(summed(w, x, 1, 1)).T),
}


def main():
    dtype = jnp.dtype(os.environ.get("BENCH_DTYPE", "float32"))
    for rows, inputs, outputs in (map(int, shape.split(",")) for shape in sys.argv[1:]):
        copies = max(1, min(20, 2**23 // (inputs * outputs)))

        def drawn(seed, *shape):
            return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)

        x = drawn(0, rows, inputs)
        weights = [drawn(1 + i, inputs, outputs) for i in range(copies)]
        stored = {False: weights, True: [jnp.array(w.T) for w in weights]}
        compiled = {
            name: jax.jit(form).lower(x, stored[turn][0]).compile() for name, (turn, form) in FORMS.items()
        }
        wall, processor = dict.fromkeys(FORMS, float("inf")), dict.fromkeys(FORMS, 0.0)
        repeats = max(6, min(REPEATS, 2**31 // (rows * inputs * outputs * copies)))
        for _ in range(repeats):
            for name, (turn, _) in FORMS.items():
                used = time.process_time()
                for weight in stored[turn]:
                    started = time.perf_counter()
                    jax.block_until_ready(compiled[name](x, weight))
                    wall[name] = min(wall[name], time.perf_counter() - started)
                processor[name] += (time.process_time() - used) / repeats / copies
        for name in FORMS:
            print(
                f"{rows}x{inputs}x{outputs} {dtype} {name:<20} wall {wall[name] * 1e6:8.0f}"
                f"  processor {processor[name] * 1e6:8.0f}"
            )


if __name__ == "__main__":
    main()
