from . import costs as costs
from . import hlo as hlo
