"""Hugging Face folders: from a checkpoint, from a running training, and their files.

May import checkpoint, zero, model, tensor_files and ranks.
Read first: from_checkpoint.py.
"""
