from . import records as records
from .sources import QUESTION_COLUMNS as QUESTION_COLUMNS
from .sources import Conversation as Conversation
from .sources import generate as generate
