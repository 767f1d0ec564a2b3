"""The hosts of a DeepSpeed hostfile: every line is read as DeepSpeed reads it, or refused with what to write instead.

DeepSpeed gets the same file, so nothing is accepted here that it would read in another way.
"""

import re
from pathlib import Path

from engine.errors import ConfigError, MissingInputError
from launcher.job.hosts import Node, is_host_name

# OpenMPI's limit on what may be started besides; DeepSpeed does not look at what follows the slots.
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})(\s+max[-_]slots=[0-9]+)?\s*(#.*)?")
_RANGE = re.compile(r"[\w.-]*\[[0-9,-]+\][\w.-]*")
_IPV6 = re.compile(r"\[?[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%\w+)?\]?(:[0-9]+)?")
_HIGHEST_COUNT = 1023  # after a colon: more is a port
_MOST_FAULTS = 20


def read_hostfile(path: Path) -> list[Node]:
    """The hosts of a hostfile (``name slots=N`` a line), in its order. ConfigError names every bad line."""
    try:
        return parse_hostfile(path.read_text(encoding="utf-8"), path)
    except (FileNotFoundError, IsADirectoryError):
        raise MissingInputError(f"--hostfile {path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text: save it as UTF-8, a line `host slots=N` for each host") from None
    except OSError as error:
        raise ConfigError(f"--hostfile {path}: cannot be read: {error.strerror}") from error


def parse_hostfile(text: str, path: Path) -> list[Node]:
    """The hosts in the text of a hostfile; `path` is for messages."""
    nodes: dict[str, Node] = {}
    faults = []
    for number, line in enumerate(text.split("\n"), start=1):  # as DeepSpeed does; splitlines knows other line ends
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or not is_host_name(match[1]) or int(match[2]) < 1:
            faults.append(f"{path}:{number}: `{_shown(line.strip())}`: {_advice(line.strip())}")
        elif match[1] in nodes:
            faults.append(
                f"{path}:{number}: host {match[1]} is given twice: write one line for it, with all of its slots"
            )
        else:
            nodes[match[1]] = Node(match[1], tuple(range(int(match[2]))))
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"{path}: and {len(faults) - _MOST_FAULTS} more such lines"]
    if faults:
        raise ConfigError("\n".join(faults))
    if not nodes:
        raise ConfigError(f"{path}: names no host; write lines such as `worker-0 slots=8`")
    return list(nodes.values())


def _shown(text: str) -> str:
    """A text for a terminal: characters that cannot be seen are spelled out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _advice(line: str) -> str:
    """The text that is to stand in place of a bad line."""
    if line.startswith("\ufeff"):
        return "the file begins with a byte-order mark, a part of the name for DeepSpeed: save it as UTF-8 without one"
    if line.startswith((";", "//", "--")):
        return "a comment begins with #"
    name, *rest = line.partition("#")[0].split()
    if not rest and re.fullmatch(r"slots=\S*", name):
        return f"the host's name goes first: write `host {name}`"
    if name.startswith("slots=") and is_host_name(rest[0]):
        name, rest = rest[0], [name, *rest[1:]]
    slots, is_given = _slots(rest)
    user, at, host = name.rpartition("@")
    if at:
        inner = host if is_host_name(host) else "host"
        return f"write `{inner} slots={slots}`, and in ~/.ssh/config the lines `Host {inner}` and `User {user}`"
    if _RANGE.fullmatch(name):
        first = re.sub(r"\[([0-9]+).*?\]", r"\1", name, count=1)
        listed = f"`scontrol show hostnames {name}` lists them"
        return f"write a line for each host, the first `{first} slots={slots}`; {listed}"
    if "," in name:
        return f"write a line for each host, the first `{name.partition(',')[0]} slots={slots}`"
    return _address_advice(name, slots, is_given) or _slots_advice(name, rest, slots, is_given)


def _slots(rest: list[str]) -> tuple[str, bool]:
    """The number of slots that the words behind a name probably mean, "N" for none; and if it is there at all."""
    numbers = re.findall(r"(?<![0-9.-])[0-9]+(?![0-9.,-])", " ".join(rest[:3]))
    return (numbers[0] if numbers and int(numbers[0]) > 0 else "N"), bool(rest)


def _address_advice(name: str, slots: str, is_given: bool) -> str:
    """Advice where the name is an address or brings a port; "" where it is neither."""
    if _IPV6.fullmatch(name):
        address = re.sub(r"^\[(.*)\].*$", r"\1", name)
        return (
            f"an IPv6 address cannot stand here: write a name, `node1 slots={slots}`, and in ~/.ssh/config the lines "
            f"`Host node1` and `HostName {address}` (or the name in /etc/hosts on every node)"
        )
    host, colon, number = name.partition(":")
    if not colon or not number.isdecimal() or not is_host_name(host):
        return ""
    if not is_given and 0 < int(number) <= _HIGHEST_COUNT:
        return f"write `{host} slots={number}`"
    return f"write `{host} slots={slots}`, and in ~/.ssh/config the lines `Host {host}` and `Port {number}`"


def _slots_advice(name: str, rest: list[str], slots: str, is_given: bool) -> str:
    """Advice on the name itself and on what follows it."""
    if not is_host_name(name):
        trimmed = name.rstrip(".")
        if is_host_name(trimmed):
            return f"write `{trimmed} slots={slots}`"
        return f"`{_shown(name)}` is no host name: use letters, digits, `.` and `-`, as in `worker-0 slots={slots}`"
    if not is_given:
        return f"write `{name} slots=N`, where N is the number of its ranks (usually its GPUs)"
    match = re.fullmatch(r"slots=(\S+)", rest[0])
    if match is None:
        return f"write `{name} slots={slots}`"
    if re.fullmatch(r"[0-9]{1,6}", match[1]) is None:
        return f"write `{name} slots={slots}`, a whole number: of its ranks (usually its GPUs)"
    if int(match[1]) == 0:
        return f"0 slots are no rank: leave the line out, or write `{name} slots=1`"
    return f"write `{name} slots={slots}`; nothing but a comment (# ...) may follow, and `{' '.join(rest[1:])}` does"
