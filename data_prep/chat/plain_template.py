"""The chat template for tokenizers that bring none."""

from data_prep.errors import DataConfigError
from data_prep.tokenizer.tokenizer import Tokenizer

#: Used, and saved with the tokenizer, when neither the tokenizer nor the run file brings a template.
#: Plain text that needs no new tokens; the end of an assistant's turn is the tokenizer's eos token.
PLAIN_TEMPLATE = """\
{%- if bos_first %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def plain_template(tokenizer: Tokenizer) -> str:
    """The built-in template as text that stands alone, for a tokenizer without one. It needs an eos token."""
    if tokenizer.eos_id is None:
        raise DataConfigError("the tokenizer has no end-of-sequence token to end a turn; give data.chat.template")
    bos_first = tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.prefix_ids
    return PLAIN_TEMPLATE.replace(
        "{%- if bos_first %}{{ bos_token }}{% endif %}\n", "{{- bos_token }}\n" if bos_first else ""
    )
