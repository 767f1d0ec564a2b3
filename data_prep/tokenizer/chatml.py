"""ChatML: the two special tokens around a turn, and the template that writes them."""

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
