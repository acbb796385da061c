"""The study of docs/study.md: does releasing supervision help, and where does it let go?"""
