"""What looks like a secret, so that it is refused where others could read it: run files, command lines.

A name or a value is enough to refuse; the message never repeats the value. Imports without torch.
"""

import re
from collections.abc import Iterator
from typing import Any

_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|APIKEY|COOKIE)(?:$|_)|_KEY(?:$|_ID$)|^KEY$|"
    r"(?:ACCESS|API|PRIVATE|SECRET|SIGNING|ENCRYPTION)_?KEY",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"[a-z][a-z0-9+.-]*://[^/\s@]+@"  # a user, perhaps with a password, in front of a host
    r"|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\bsk-[A-Za-z0-9_-]{32,}|\bxox[abp]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)


def names_a_secret(name: str) -> bool:
    """True if a variable of this name holds a token, key or password by custom (HF_TOKEN, AWS_SECRET_ACCESS_KEY)."""
    return _NAME.search(name) is not None


def is_secret_value(text: str) -> bool:
    """True if a text has the form of a well-known token or key, or is a URL with a user in it."""
    return _VALUE.search(text) is not None


def find_secrets(values: Any, dotted: str = "") -> Iterator[str]:
    """The dotted keys of plain data under which such a value stands."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from find_secrets(value, f"{dotted}.{key}" if dotted else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from find_secrets(value, f"{dotted}.{number}")
    elif isinstance(values, str) and is_secret_value(values):
        yield dotted
