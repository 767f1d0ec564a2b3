"""What records mean: their shape is recognised and read as an example.

May import sources (a record and its place).
Read first: recognise.py.
"""
