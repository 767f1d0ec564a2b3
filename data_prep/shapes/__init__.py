"""Shapes of records: each is recognised, and its records are read as examples.

May import sources (a record and its place).
Read first: recognise.py.
"""
