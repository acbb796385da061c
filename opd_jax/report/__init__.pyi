from . import build as build
from . import display as display
from . import figures as figures
from . import long as long
