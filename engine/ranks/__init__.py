"""This process among all ranks: where they meet, what they agree on, when they stop, what they record.

May import model (for bf16 on CPUs), and errors and file_modes at the top of engine.
Read first: distributed.py.
"""
