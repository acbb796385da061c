from .fields import default as default
from .flags import run as run
from .recipes import load as load
from .recipes import load_module as load_module
from .validation import get as get
from .validation import validate as validate
