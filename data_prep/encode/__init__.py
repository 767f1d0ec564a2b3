"""Encoded documents as blocks of columns, and what the encode functions of all tasks share.

May import tokenizer, sources (a record), and the types of chat.
Read first: blocks.py, then content.py.
"""
