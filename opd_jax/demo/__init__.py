"""The first ten minutes: full supervision against the release rule, sized to a time budget.

In: minutes. Out: two trained arms, long answers, a report.
May import: every other room and the entries.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
