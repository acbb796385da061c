"""What preflight finds of each program, and of a step."""

import dataclasses


@dataclasses.dataclass
class ProgramReport:
    """One compiled program; bytes and seconds are one device's.

    Attributes:
      name: sample, train_step, evaluation, evaluation_sample or gradient_noise.
      arguments, temporaries, peak: bytes, as the compiler counts them; peak has the first two in it.
      host: bytes of the arguments that lie in the host's memory, in none of those.
      resident: bytes of the run that lie in memory meanwhile and are not the program's arguments.
      capacity: bytes that a program may use.
      flops: of the model's matrix products and causal attention, a device.
      program_flops: of every matrix product of the program, a device, what is masked and recomputed included.
      bytes: HBM traffic, counted from shapes.
      compute_seconds, memory_seconds, link_seconds, network_seconds: each alone at its peak; the network is
        what joins slices.
      host_seconds: of copies from and to the host's memory, at the bus's speed.
      collectives: kind -> [times, result bytes, bytes sent]; "between slices" those over the network.
      compile_seconds: wall time of tracing and compiling.
      release: (operations, bytes) of segments and the release rule, a device, an upper estimate.
      largest: [bytes, shape, operation] of the largest arrays that it writes.
      faults: what must not be in it, a line each.
      shortage: what the compiler said where it found no room, else "".
    """

    name: str
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    host: int = 0
    resident: int = 0
    capacity: int = 0
    flops: float = 0.0
    program_flops: float = 0.0
    bytes: float = 0.0
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    link_seconds: float = 0.0
    network_seconds: float = 0.0
    host_seconds: float = 0.0
    collectives: dict = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    release: tuple[int, int] = (0, 0)
    largest: list = dataclasses.field(default_factory=list)
    faults: list = dataclasses.field(default_factory=list)
    shortage: str = ""

    @property
    def fits(self) -> bool:
        return not self.shortage and self.peak + self.resident <= self.capacity

    @property
    def seconds(self) -> float:
        """The slowest of the four, which the others may hide behind, and the copies of the host's memory."""
        return max(self._sides().values()) + self.host_seconds

    @property
    def bound(self) -> str:
        sides = self._sides()
        return max(sides, key=lambda name: sides[name])

    def _sides(self) -> dict:
        return {
            "compute": self.compute_seconds,
            "HBM": self.memory_seconds,
            "links": self.link_seconds,
            "network": self.network_seconds,
        }


@dataclasses.dataclass
class Ragged:
    """A step whose responses have given lengths; seconds of [sample, train_step].

    Attributes:
      mean_tokens: of a response.
      full: with every response at its limit.
      written: with these lengths.
      padded: with these lengths if every row waited for the longest, each decode step read the whole cache,
        and every row were scored and learnt from at the limit.
    """

    mean_tokens: float
    full: list[float]
    written: list[float]
    padded: list[float]


@dataclasses.dataclass
class StepReport:
    """A step on one slice.

    Attributes:
      programs: sample, train_step, evaluation, and evaluation_sample where evaluations sample otherwise,
        gradient_noise where it is measured, sample_N and train_step_N for prompt buckets of N tokens.
      seconds: predicted time of sample and train_step at full-length responses.
      tokens_a_second: response tokens a second a device, at that time.
      held: what lies in a device's memory between programs, name -> bytes.
      micro_batch: the config's.
      largest_micro_batch: the largest with which train_step fits; None where none does or was sought.
      ragged: a step with given lengths; None where none were given.
    """

    programs: list[ProgramReport]
    seconds: float
    tokens_a_second: float
    held: dict
    micro_batch: int
    largest_micro_batch: int | None = None
    ragged: Ragged | None = None

    @property
    def ok(self) -> bool:
        return all(program.fits and not program.faults for program in self.programs)
