from .fields import default as default
from .fields import get as get
from .flags import run as run
from .recipes import load as load
from .recipes import load_module as load_module
from .validation import validate as validate
