from . import build as build
from . import figures as figures
from . import long as long
