"""Encoded documents as blocks of columns, and what the encode functions of all tasks share.

May import chat, shapes and tokenizer.
Read first: blocks.py, then content.py.
"""
