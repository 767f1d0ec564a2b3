"""What encoding makes, and what the tasks encode with: blocks of documents, ids of texts, conversations.

May import chat, shapes and tokenizer.
Read first: blocks.py, then content.py.
"""
