from . import records as records
from .conversations import QUESTION_COLUMNS as QUESTION_COLUMNS
from .conversations import Conversation as Conversation
from .generated import generate as generate
from .generated import generator_environment as generator_environment
