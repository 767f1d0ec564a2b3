"""The Hugging Face model: which class, which weights, which attention, and whether packed rows are safe in it.

May import tasks, tensor_files, and batches, arithmetic, config and errors at the top of engine.
Read first: build.py.
"""
