"""The fields of a config, each declared once: its default, its text, and what it may be.

In: nothing. Out: `FIELDS` of each file, dotted name -> `Field`, in the order of docs/configs.md.
May import: declare.
"""
