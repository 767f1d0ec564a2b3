"""Safetensors files: read by range with hashes on the way, written with bounded memory.

May import only errors and file modes of engine.
Read first: reader.py.
"""
