"""Records to a store: inputs, worker processes, parts, and the store they are joined into.

May import every room of data_prep but inspect.
Read first: work.py, then worker.py.
"""
