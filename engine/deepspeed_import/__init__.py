"""DeepSpeed's own checkpoints become Hugging Face folders, without running anything that lies in them.

May import export, checkpoint, model and tensor_files.
Read first: convert.py.
"""
