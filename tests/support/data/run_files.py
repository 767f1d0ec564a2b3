"""A run file as text."""

RUN_FILE = """\
run_dir: run
task: causal_lm
data:
  store_dir: store
  train: [records.jsonl, more/*.jsonl]
  tokenizer: tokenizer
  row_tokens: 128
model: {config: {model_type: llama}, init: random}
optimizer: {learning_rate: 1e-3}
batch: {global_rows: 8}
duration: {steps: 10}
"""
