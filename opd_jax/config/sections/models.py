"""Fields of the run as a whole and of its two models."""

from opd_jax.declare import Field

DTYPES = ("auto", "float32", "bfloat16")
PRODUCTS = ("auto", "compute", "bfloat16")

FIELDS = {
    "seed": Field(
        0,
        """Seed of everything random: sampling and the order of the data. Runs with equal seeds see the same
        prompts and the same draws.""",
        least=0,
        most=2**32 - 1,
    ),
    "plugins": Field(
        (),
        """Python files that register rules or objectives of your own (docs/rules.md). Every process imports
        them before it checks any other field. Give them where the config is made:
        `config.default(plugins=("my_rule.py",))`, or on the command line: `--config.plugins=my_rule.py`, with
        commas between several. Relative paths start in the folder that you run from.""",
    ),
    "student.path": Field(
        "",
        """Where the student comes from: a Hugging Face folder, a `.gguf` file, or `pkg:NAME` for a GGUF
        inside an installed Python package. It has no default: set it.""",
    ),
    "student.drop_layers": Field(
        (),
        "Blocks to remove from the student before training, by index from 0. `()` keeps all.",
        items=int,
    ),
    "student.compute_dtype": Field(
        "auto",
        """Dtype of activations and matrix products. `auto` is bfloat16 on TPU and GPU, and float32 on CPU.
        The master parameters and the optimizer's variance are always float32.""",
        allowed=DTYPES,
    ),
    "student.products": Field(
        "auto",
        """Dtype of the operands of the blocks' matrix products.

        - `compute`: the compute dtype.
        - `bfloat16`: bfloat16 even if the compute dtype is float32. Sums, activations and the output
          matrix stay float32.
        - `auto`: on a CPU, both are timed at the start. bfloat16 is taken if the CPU has the instructions
          and is at least a fifth faster with them. On other devices it is `compute`.

        A run keeps the choice that it started with (docs/models.md).""",
        allowed=PRODUCTS,
    ),
    "teacher.path": Field(
        "",
        """Where the teacher comes from; same forms as `student.path`. It must have the student's tokenizer.
        It has no default: set it.""",
    ),
    "teacher.dtype": Field(
        "auto",
        "Dtype of the teacher's weights and activations. `auto` as in `student.compute_dtype`.",
        allowed=DTYPES,
    ),
    "teacher.products": Field("auto", "Same as `student.products`, for the teacher.", allowed=PRODUCTS),
    "teacher.weights": Field(
        "float",
        """How the teacher's matrices are stored. `float` stores them in `teacher.dtype`. `int8` quantises
        them while loading, with a float32 scale for each output channel. It needs half the memory and
        traffic of bfloat16; docs/models.md has its error and speed.""",
        allowed=("float", "int8"),
    ),
    "teacher.end_id": Field(
        -1,
        """Id of the teacher's end token. Set it if it is not the student's, as for a Base student with an
        Instruct teacher. The teacher's logits of the two end tokens are then swapped, so that the
        teacher rates its own end token where the student writes the student's. -1 is off: both models must
        end with the same token, and a difference is refused.""",
        least=-1,
    ),
    "attention.kernel": Field(
        "auto",
        """How whole sequences attend: prompts in the sampler, and prompts with responses in scoring, in the
        student's gradient and in evaluation.

        - `plain` stores the attention scores of at most 512 queries of a sequence at a time.
        - `splash` is JAX's TPU kernel, which stores none. It computes a head size and a sequence length
          (`data.prompt_tokens`, alone and with `rollout.max_tokens`) as the next multiples of 128.
          `mesh.tensor` must divide the key heads.
        - `auto` is `splash` if the devices and the mesh allow it, else `plain`.""",
        allowed=("auto", "plain", "splash"),
    ),
    "attention.decode": Field(
        "auto",
        """What a decode step of the sampler reads of the KV cache. `auto` is the written slots, by a kernel
        on TPU and in blocks on CPU; on GPU, and with `sharding.cache=slots`, it reads all. `all` reads all
        slots and masks the empty ones. The results are the same up to rounding.""",
        allowed=("auto", "all"),
    ),
}
