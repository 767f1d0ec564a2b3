"""Turns raw text into token stores: the only package that sees text. Imports nothing of ours."""
