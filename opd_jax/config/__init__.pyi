from .fields import default as default
from .flags import get as get
from .flags import load as load
from .flags import load_module as load_module
from .flags import run as run
from .flags import validate as validate
