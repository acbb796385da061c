from . import nltk_segments as nltk_segments
from . import punkt as punkt
from .segments import SegmentTable as SegmentTable
from .segments import check_kind as check_kind
from .segments import segment as segment
