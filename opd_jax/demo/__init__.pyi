from .story import before_and_after as before_and_after
from .story import introduction as introduction
from .story import prepare_arms as prepare_arms
from .story import read_arms as read_arms
from .story import table as table
from .story import train_arms as train_arms
