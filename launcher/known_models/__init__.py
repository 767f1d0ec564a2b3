"""Small real models that every machine can get: from the Hub, or from packages of the Python package index.

May import engine and data_prep; of the launcher nothing.
Read first: known.py.
"""
