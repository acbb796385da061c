from .arms import grid as grid
