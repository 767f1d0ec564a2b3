"""Everything that knows DeepSpeed 0.19.8: its JSON, its partitions, its operators.

May import tasks, batches, model, tensor_files and ranks.
Read first: zero_model.py, then wrap.py.
"""
