from . import costs as costs
from . import jaxprs as jaxprs
from . import lengths as lengths
from . import notebook as notebook
