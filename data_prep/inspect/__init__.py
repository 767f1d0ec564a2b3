"""Shows a token store: in the terminal and as a page.

May import token_store, rows, chat, shapes and tokenizer.
Read first: facts.py, then terminal.py.
"""
