from . import costs as costs
from . import jaxprs as jaxprs
from . import notebook as notebook
