from . import records as records
from .generated import generate as generate
from .generated import generator_environment as generator_environment
from .sources import QUESTION_COLUMNS as QUESTION_COLUMNS
from .sources import Conversation as Conversation
