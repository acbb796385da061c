"""The first ten minutes: full supervision against the release rule, sized to a time budget.

In: minutes. Out: two trained arms, long answers, a report.
May import: every other room and the entries.
"""
