"""Chat templates: rendered once, with proof which characters are trained.

May import shapes and tokenizer.
Read first: format.py.
"""
