from . import compile_cache as compile_cache
from . import distributed as distributed
from . import memory as memory
from . import shard_rows as shard_rows
from . import sharding as sharding
from .layouts import DEFAULT as DEFAULT
from .layouts import Layout as Layout
