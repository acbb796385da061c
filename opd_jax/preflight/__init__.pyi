from . import costs as costs
from . import hlo as hlo
from . import notebook as notebook
