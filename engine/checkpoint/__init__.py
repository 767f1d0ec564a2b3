"""Resumable checkpoints: when to save, how it is written beside the training, how any world size takes it up.

May import zero, model, tensor_files and ranks.
Read first: format.py, then save.py.
"""
