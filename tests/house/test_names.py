"""10 000 hostile names through every script and command that is made of names: refused by name, or they come back.

What is accepted is really run, with a shell whose programs only write down their arguments.
"""

import argparse
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repository import ROOT
from slurm_scripts import FIELDS, OPTIONS, arguments_of, header, options

from engine.errors import ConfigError, MissingInputError
from engine.ranks.rendezvous import Place
from launcher.batch import batch_script, slurm_job
from launcher.commands import submit
from launcher.commands.tensorboard import name_runs
from launcher.job.hostfile import parse_hostfile
from launcher.job.hosts import Node, filter_nodes
from launcher.job.job import refuse_unsafe

COUNT = 10_000
RECORD = r"""
record() { printf '%s\0' "$@" "end of $1" >>"$RECORDED"; }
fulltune() { record fulltune "$@"; }
srun() { cat >/dev/null; record srun "$@"; }
python() { cat >/dev/null; }
scontrol() { :; }
deepspeed() { record deepspeed "$@"; }
exec() { "$@"; }
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Names as users and attackers write them; many are fine. In the end nothing may have been executed."""
    canary = tmp_path_factory.mktemp("names") / "canary"
    chance = random.Random(5)
    payloads = [
        f"$(touch {canary})", f"`touch {canary}`", f";touch {canary};", f"\ntouch {canary}\n", f"' ; touch {canary} #",
        f'" ; touch {canary} #', f"\n#SBATCH --wrap=touch\t{canary}", "--wrap=x", "-x", "\x00", "a" * 4096, "..", "../x",
        "%j", "~", "*", "\u0430", "\u202e", "\r", "\t", " ", "", "$HOME", "${IFS}", "!!", "&&", "|", ">", "<(x)", "\\", "é",
        "gpu", "a-b", "x_1", "A.b", "12", "1:00:00", "64G", "node,gpu", "a&b", "run+1", "x=1", "@home", "-oProxyCommand=x",
        f"a;touch${{IFS}}{canary}", "\uff1b", "\u0661", "host:0,1", "a@b", "x\n", "-", "--", "2-12",
    ]  # fmt: skip
    letters = "abcXYZ019._-" * 4 + "$`'\"\\;&|<>(){}[]*?!#~%^ \t\r\n\x00\x1b,:=+@/é\u2028"
    made = dict.fromkeys(payloads)
    while len(made) < COUNT:
        shape = chance.random()
        if shape < 0.4:
            made["".join(chance.choice(letters) for _ in range(chance.randint(0, 12)))] = None
        elif shape < 0.6:
            made["".join(chance.choice("abcxyz019._-") for _ in range(chance.randint(1, 12)))] = None
        else:
            made["".join(chance.choice([*payloads, "gpu", "a", "-"]) for _ in range(chance.randint(1, 3)))] = None
    yield list(made)
    assert not canary.exists(), "a name was executed"


def taken(words: list[str], take: Callable[[str], object], *says: str) -> list[str]:
    """The words that `take` accepts; of the others it says which thing is wrong."""
    accepted = []
    for word in words:
        try:
            take(word)
        except (ConfigError, MissingInputError) as error:
            assert any(what in str(error) for what in says), (word, error)
        else:
            accepted.append(word)
    assert len(accepted) < len(words)
    return accepted


def run_shell(program: str, folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Run a program whose commands only write down their arguments; those, in order."""
    recorded = folder / "recorded"
    recorded.write_bytes(b"")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "SLURM_JOB_ID": "1", "RECORDED": str(recorded)}
    (folder / "program.sh").write_text(program)
    done = subprocess.run(
        ["bash", str(folder / "program.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment | variables,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return recorded.read_bytes().decode().split("\0")[:-1]


def test_generated_scripts(words: list[str], tmp_path: Path) -> None:
    """Every name in every place of `fulltune submit`; of each place all that are accepted stand in a script and run."""
    given = options()
    (tmp_path / "site").mkdir()

    def request(place: str, word: str) -> tuple[submit.Request, Path]:
        chosen = argparse.Namespace(**vars(given))
        run_dir = Path(f"/runs/{word}" if place == "run_dir" else "/runs/one")
        if place == "site":
            chosen.site = Path(f"{tmp_path}/site/{word}")
        elif place != "run_dir":
            setattr(chosen, place, word)
        if place == "run_dir":
            batch_script.checked_path(run_dir, "run_dir")
        return batch_script.check_request(chosen, run_dir), run_dir

    fine: dict[str, list[str]] = {}
    for place, told in FIELDS.items():
        if place == "site":  # one that is not there is refused after its name was looked at
            fine[place] = taken(
                words, lambda word: batch_script.checked_path(Path(f"{tmp_path}/site/{word}"), "--site"), told
            )
        else:
            fine[place] = taken(words, lambda word, place=place: request(place, word), told)
        assert len(fine[place]) > 20, place
    scripts: list[str] = []
    for number in range(max(map(len, fine.values()))):
        at = {place: found[number % len(found)] for place, found in fine.items()}
        chosen = argparse.Namespace(**vars(given) | {key: at[key] for key in at if key not in ("run_dir", "site")})
        chosen.time = chosen.time if batch_script.seconds_of(chosen.time) > 180 else "9:00:00"
        site = tmp_path / "site" / at["site"]
        if at["site"] and site.parent == tmp_path / "site" and len(at["site"]) < 255 and not site.is_dir():
            site.write_text(f"SITE={number}\n")  # read by the script, which the name must not keep from it
            chosen.site = site
        run_dir = Path(f"/runs/{at['run_dir']}")
        asked = batch_script.check_request(chosen, run_dir)
        made = [batch_script.training_script(asked, run_dir), batch_script.preparation_script(asked, run_dir)]
        training, preparation = map(header, made)
        assert {key: training[option] for key, option in OPTIONS.items() if key != "name"} == {
            key: getattr(chosen, key) for key in OPTIONS if key != "name"
        }
        assert training["job-name"] == (chosen.name or batch_script._name_of(run_dir))
        assert (preparation["partition"], preparation["time"]) == (chosen.prepare_partition, chosen.prepare_time)
        plain = (str(run_dir), str(chosen.site or "/"))
        assert not any(re.search(r"[^\w./+=@,:-]", path, re.ASCII) for path in plain), "#SBATCH lines know no quoting"
        assert arguments_of(made[0])[0] == f"{run_dir}/submitted.yaml"
        assert chosen.site is None or all(f"source {shlex.quote(str(site))}\n" in script for script in made)
        assert training["output"] == f"{run_dir}/slurm-%j.log"
        scripts += made
    assert len(scripts) > 2000
    # Each in a shell of its own, in one process; PATH would find the real `fulltune`.
    path_line = f"export PATH={Path(sys.executable).parent}:"
    bodies = [script.replace(path_line, "export PATH=") for script in random.Random(1).sample(scripts, 300)]
    program = RECORD + "".join(f"(\n{body}\n)\n" for body in bodies)
    recorded = run_shell(program, tmp_path)
    ended = [number for number, word in enumerate(recorded) if word == "end of fulltune"]
    assert len(ended) == len(bodies)
    wanted = [["fulltune", "train" if "ntasks-per-node" in body else "prepare", *arguments_of(body)] for body in bodies]
    assert recorded == [word for words_of_one in wanted for word in (*words_of_one, "end of fulltune")]


@pytest.mark.parametrize("script", ["train", "prepare", "export", "check_nodes"])
def test_scripts_by_hand(words: list[str], script: str, tmp_path: Path) -> None:
    """Whatever is given to `sbatch slurm/NAME.sbatch` arrives as it was given."""
    possible = [word for word in words if "\0" not in word]
    possible = [word.encode(errors="surrogateescape").decode(errors="replace") for word in possible]
    text = (ROOT / "slurm" / f"{script}.sbatch").read_text()
    for start in range(0, len(possible), 2500):
        some = ["run.yaml", *possible[start : start + 2500]]
        recorded = run_shell(RECORD + text, tmp_path, *some, SLURM_JOB_NUM_NODES="2")
        (place,) = (number for number, word in enumerate(recorded) if word == "run.yaml")
        assert recorded[place : place + len(some)] == some
        assert recorded[place + len(some)].startswith("end of ")


def test_one_deepspeed_a_node_by_hand(words: list[str], tmp_path: Path) -> None:
    """The script that puts its arguments together twice: what it would start, read back by a shell."""
    possible = [word for word in words if "\0" not in word and word != "--dry-run"]
    text = (ROOT / "slurm" / "train_deepspeed.sbatch").read_text()
    for start in range(0, len(possible), 2500):
        some = ["run.yaml", *possible[start : start + 2500]]
        (tmp_path / "script.sh").write_text(RECORD + text)
        environment = {"PATH": "/usr/bin:/bin", "NODES": "a b", "RANKS_PER_NODE": "2"}
        shown = subprocess.run(
            ["bash", str(tmp_path / "script.sh"), *some, "--dry-run"], capture_output=True, text=True, env=environment
        )
        assert shown.returncode == 0, shown.stderr[-2000:]
        command = shown.stdout.partition("ranks 0-1: ")[2].rpartition("\nb: ranks 2-3: ")[0]
        recorded = run_shell(f"{RECORD}\n{command}\n", tmp_path)
        assert recorded[recorded.index("run.yaml") : -1] == some


def test_hosts(words: list[str], tmp_path: Path) -> None:
    """Host names of a hostfile, --include and --exclude, and what Slurm says: nothing that ssh or a shell could obey."""
    host = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
    hostfile = tmp_path / "hosts"

    def in_hostfile(word: str) -> None:
        (node,) = parse_hostfile(f"{word} slots=2\n", hostfile)
        assert host.fullmatch(node.name)
        assert "\n" in word or node == Node(word.strip(), (0, 1))

    assert len(taken(words, in_hostfile, f"{hostfile}:", "names no host")) > 1000
    nodes = [Node("a", (0, 1)), Node("gpu", (0, 1, 2))]
    for option in ("include", "exclude"):
        chosen: dict[str, str | None] = {"include": None, "exclude": None}

        def choose(word: str, option: str = option, chosen: dict[str, str | None] = chosen) -> None:
            filter_nodes(nodes, **chosen | {option: word})

        fine = taken(words, choose, f"--{option}")
        assert all(re.fullmatch(r"[A-Za-z0-9._@:,-]*", word) and not word.startswith("-") for word in fine)

    def as_nodelist(word: str) -> None:
        environment = {
            "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": word, "SLURM_JOB_CPUS_PER_NODE": "2",
        }  # fmt: skip
        found = slurm_job.read_allocation(environment)
        assert all(host.fullmatch(name) for name in found.nodes)

    with pytest.MonkeyPatch.context() as patch:

        def answer(*asked: str) -> str:
            assert asked[:3] != ("scontrol", "show", "hostnames") or asked[3] == "--", "no name can be an option"
            return asked[4] if asked[2] == "hostnames" else "NodeName=x NodeAddr=10.0.0.1"

        patch.setattr(slurm_job, "_output_of", answer)
        taken(words, as_nodelist, "SLURM_JOB_NODELIST")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm_job, "_output_of", lambda *asked: f"NodeName=x NodeAddr={asked[-1]}")
        fine = taken(words, slurm_job._address, "no usable address")
        assert not [address for address in fine if address.startswith("-")]
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    fine = taken(
        [word for word in words if word], lambda word: Place.read(place | {"MASTER_ADDR": word}), "MASTER_ADDR"
    )
    assert all(re.fullmatch(r"[A-Za-z0-9.:_%-]+", word) and not word.startswith("-") for word in fine)


def test_words_for_remote_shells(words: list[str], tmp_path: Path) -> None:
    """Run file and run folder of a job on several hosts: DeepSpeed quotes nothing, so nothing may need it."""
    paths = [f"/runs/{word}" for word in words]
    fine = taken(paths, lambda path: refuse_unsafe([path]), "would reach remote shells unquoted")
    assert len(fine) > 2000
    assert run_shell(f"{RECORD}\nrecord {' '.join(fine)}\n", tmp_path)[:-1] == fine


def test_tensorboard_names(words: list[str], tmp_path: Path) -> None:
    """A run's name becomes the name of a link in a folder of its own: one a run, and never elsewhere."""
    folders = []
    for number, word in enumerate(words[:2000]):  # a folder each
        folder = tmp_path / str(number % 7) / word
        if "\0" in word or word.startswith("/") or len(os.fsencode(word)) > 200 or ".." in word.split("/"):
            continue
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        folders.append(folder)
    names = name_runs(folders)
    links = tmp_path / "links"
    links.mkdir()
    assert len(names) == len({folder.resolve() for folder in folders})
    for name, run_dir in names.items():
        (links / name).symlink_to(run_dir / "tensorboard", target_is_directory=True)
    assert {link.resolve() for link in links.iterdir()} == {(folder / "tensorboard").resolve() for folder in folders}
