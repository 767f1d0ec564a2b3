"""Checks of all nodes together: do they answer, are they alike, do they see and reach one another."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.finding import Finding
from launcher.doctor.gather import Answer

_SKEW_WARNING_SECONDS, _SKEW_ERROR_SECONDS = 1.0, 60.0
#: Differences here change results or stop a run; others are only warnings.
_MUST_BE_EQUAL = ("torch", "deepspeed", "transformers", "torch CUDA", "fulltune")


def check_job(answers: Sequence[Answer], first: str, port: int | None, over_ssh: bool) -> list[Finding]:
    """All findings that need the facts of several nodes, or how they were reached."""
    there = {answer.node: answer.facts for answer in answers if answer.facts is not None}
    found = [*_reached(answers, over_ssh)]
    if len(there) > 1:
        found += [*_versions(there), *_machines(there)]
    found += [*_clocks(answers), *_shared(answers), *_port(answers, first, port)]
    if over_ssh:
        found += [*_ssh_back(there, first)]
    return found


def _reached(answers: Sequence[Answer], over_ssh: bool) -> Iterator[Finding]:
    name = "ssh" if over_ssh else "nodes"
    for answer in answers:
        if answer.facts is None:
            yield Finding(name, "error", answer.error, _advice(answer, over_ssh), answer.node)
    if over_ssh or len(answers) > 1:
        reached = sum(1 for answer in answers if answer.facts is not None)
        if reached == len(answers):
            yield Finding(name, "ok", f"all {reached} answered" if reached > 1 else "it answered")


def _advice(answer: Answer, over_ssh: bool) -> str:
    detail = answer.error.lower()
    if "host key" in detail:
        return f"log in once by hand (`ssh {answer.node}`) and accept its key"
    if "permission denied" in detail:
        return f"a key that needs no password: `ssh-copy-id {answer.node}`"
    if "resolve" in detail or "not known" in detail:
        return "correct the name in the hostfile, or add it to /etc/hosts"
    if "no such file" in detail or "not found" in detail or "no module" in detail:
        return "fulltune must be installed there at the same path as here"
    return f"`ssh {answer.node} true` must work without a question" if over_ssh else "look at the node"


def _differences(there: Mapping[str, Mapping[str, Any]], section: str, key: str) -> str:
    """An empty text where all nodes have the same value, else who has which."""
    values: dict[str, list[str]] = {}
    for node, facts in there.items():
        values.setdefault(str(facts[section].get(key)), []).append(node)
    if len(values) < 2:
        return ""
    return "; ".join(f"{value} on {_names(nodes)}" for value, nodes in values.items())


def _names(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def _versions(there: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    keys = list(next(iter(there.values()))["versions"])
    different = [(key, detail) for key in keys if (detail := _differences(there, "versions", key))]
    for key, detail in different:
        minor = (
            key == "python" and len({facts["versions"]["python"].rpartition(".")[0] for facts in there.values()}) > 1
        )
        is_bad = key in _MUST_BE_EQUAL or minor
        what = "the source of fulltune" if key == "fulltune" else key
        advice = "install the same on all nodes, or start from a shared folder"
        yield Finding("versions", "error" if is_bad else "warning", f"{what} differs: {detail}", advice)
    if not different:
        yield Finding("versions", "ok", f"the same on all {len(there)} nodes")


def _machines(there: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    gpus = {node: _gpu_text(facts["gpus"]["gpus"]) for node, facts in there.items()}
    found = []
    if len(set(gpus.values())) > 1:
        some_have_none = any(not facts["gpus"]["gpus"] for facts in there.values())
        detail = "; ".join(f"{text or 'none'} on {node}" for node, text in gpus.items())
        advice = "leave out the nodes without" if some_have_none else "all wait for the slowest"
        found.append(Finding("differences", "error" if some_have_none else "warning", f"GPUs: {detail}", advice))
    drivers = {
        node: next((gpu["driver_version"] for gpu in facts["gpus"]["gpus"]), "") for node, facts in there.items()
    }
    if len(set(drivers.values())) > 1 and all(drivers.values()):
        detail = "; ".join(f"{driver} on {node}" for node, driver in drivers.items())
        found.append(Finding("differences", "warning", f"GPU drivers: {detail}", "install one version"))
    for section, key, what in (
        ("machine", "cores", "cores"), ("limits", "open files", "the limit of open files"), ("machine", "libc", "libc"),
    ):  # fmt: skip
        if detail := _differences(there, section, key):
            found.append(Finding("differences", "warning", f"{what}: {detail}", "make them alike"))
    totals = [facts["memory"]["limit_bytes"] for facts in there.values()]
    if min(totals) < 0.9 * max(totals):
        detail = "; ".join(
            f"{facts['memory']['limit_bytes'] / 2**30:.0f} GiB on {node}" for node, facts in there.items()
        )
        found.append(Finding("differences", "warning", f"memory: {detail}", "the smallest decides"))
    yield from found
    if not found:
        yield Finding("differences", "ok", "none in GPUs, cores, memory and limits")


def _gpu_text(gpus: Sequence[Mapping[str, str]]) -> str:
    kinds = sorted({f"{gpu['name']} {gpu['memory.total']} MiB" for gpu in gpus})
    return f"{len(gpus)} x {', '.join(kinds)}" if gpus else ""


def _clocks(answers: Sequence[Answer]) -> Iterator[Finding]:
    others = [answer for answer in answers if answer.facts is not None]
    wrong = [answer for answer in others if abs(answer.skew_seconds) > _SKEW_WARNING_SECONDS]
    for answer in wrong:
        is_bad = abs(answer.skew_seconds) > _SKEW_ERROR_SECONDS
        way = "ahead of" if answer.skew_seconds > 0 else "behind"
        found = f"at least {abs(answer.skew_seconds):.0f} s {way} this machine's"
        advice = "have chrony or systemd-timesyncd set it"
        yield Finding("clock", "error" if is_bad else "warning", found, advice, answer.node)
    if len(others) > 1 and not wrong:
        yield Finding("clock", "ok", f"all within {_SKEW_WARNING_SECONDS:.0f} s")


def _shared(answers: Sequence[Answer]) -> Iterator[Finding]:
    there = [answer for answer in answers if answer.facts is not None]
    if len(there) < 2:
        return
    for name in {name: None for answer in there for name in answer.shares}:
        blind = [answer.node for answer in there if not answer.shares.get(name)]
        if blind:
            found = f"the {name} of {_names(blind)} is not the one seen here"
            advice = "it must lie on a file system that all nodes share"
            yield Finding("shared folder", "error", found, advice)
        else:
            yield Finding("shared folder", "ok", f"the {name} is the same on all nodes")


def _port(answers: Sequence[Answer], first: str, port: int | None) -> Iterator[Finding]:
    if port is None:
        return
    facts = next((answer.facts for answer in answers if answer.node == first), None)
    if facts is None:
        yield Finding("port", "skipped", f"{first} did not answer")
    elif facts["port_error"]:
        advice = "end what listens there, or give --master-port"
        yield Finding("port", "error", f"{port}: {facts['port_error']}", advice, first)
    else:
        yield Finding("port", "ok", f"{port} is free", node=first)
    tried = [answer for answer in answers if answer.reach_error is not None and answer.node != first]
    for answer in tried:
        if answer.reach_error:
            advice = f"open the way from {answer.node} to {first}: a firewall, another network, or a wrong /etc/hosts"
            yield Finding("way to the first node", "error", answer.reach_error, advice, answer.node)
    if tried and not any(answer.reach_error for answer in tried):
        yield Finding("way to the first node", "ok", f"open from {len(tried)} other node{'s' * (len(tried) > 1)}")


def _ssh_back(there: Mapping[str, Mapping[str, Any]], first: str) -> Iterator[Finding]:
    asked = {node: facts["ssh_back"] for node, facts in there.items() if facts["ssh_back"] is not None}
    failed = {node: detail for node, detail in asked.items() if detail}
    for node, detail in failed.items():
        advice = f"runs can be started here, not on {node}"
        yield Finding("ssh back", "warning", f"from {node} to {first}: {detail}", advice, node)
    if asked and not failed:
        yield Finding("ssh back", "ok", f"every host reaches {first}")
