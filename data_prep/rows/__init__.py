"""Documents become rows: packed, truncated, mixed, and counted in the ledger.

May import token_store.
Read first: arrange.py.
"""
