from .progress import Progress as Progress
from .progress import own as own
