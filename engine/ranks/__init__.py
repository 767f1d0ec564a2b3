"""This process among all ranks: where they meet, what they agree on, when they stop, what they record.

May import the files at the top of engine that need no torch.
Read first: distributed.py.
"""
