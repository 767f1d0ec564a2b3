"""Examples become token ids, target marks and task columns.

May import chat, shapes and tokenizer.
Read first: blocks.py.
"""
