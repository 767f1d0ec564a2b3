"""Everything that knows DeepSpeed 0.19.8: its JSON, its partitions, its operators.

May import model, tensor_files and ranks.
Read first: ds_config.py, then zero_state.py.
"""
