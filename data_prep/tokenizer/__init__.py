"""Tokenizers: opened from any kind of file, trained, extended.

May import sources (a record and its place).
Read first: tokenizer.py.
"""
