"""Run file, model and token store held against one another before ranks start: what does not fit, and what is odd.

May import tasks, finding, arithmetic, config and errors at the top of engine, and the token store; no torch.
Read first: model_facts.py (what is known of a model), then labels.py.
"""
