"""The Hugging Face model: which class, which weights, which attention, and whether packed rows are safe in it.

May import tensor_files and ranks.
Read first: build.py.
"""
