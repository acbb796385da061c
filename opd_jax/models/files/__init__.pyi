from . import hf as hf
from . import hf_config as hf_config
from . import safetensors_out as safetensors_out
from . import source as source
from . import weights as weights
from .presets import PREFIX as PREFIX
