"""Weights are read by ranges, each rank its own, and are bit by bit what transformers loads."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from load_cases import ALWAYS, CASES, PIECES, SEED, VOCABULARY, LoadCase, make_folders
from ranks import run_ranks
from repository import WORKERS
from safetensors.torch import load_file

pytestmark = pytest.mark.ranks
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_folders(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def loaded(request: pytest.FixtureRequest, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    out_dir = tmp_path_factory.mktemp(f"loaded-{request.param}")
    run_ranks(request.param, WORKERS / "load_worker.py", folders, out_dir)
    return out_dir, request.param


def reference(case: LoadCase, folders: Path) -> dict[str, torch.Tensor]:
    """What plain transformers loads in this process, with its own fresh heads, and rows for new tokens by hand."""
    folder = folders / case.source
    labels = {"num_labels": 3} if case.task == "sequence_classification" else {}
    kind = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    torch.manual_seed(SEED)
    model = kind.from_pretrained(folder, dtype=torch.float32, **labels)
    if case.extended:
        old = {name: p.detach().clone() for name, p in model.named_parameters() if p.shape[0] == VOCABULARY}
        model.resize_token_embeddings(VOCABULARY + len(PIECES), mean_resizing=False)
        stored = next(iter(load_file(next(folder.glob("*.safetensors"))).values())).dtype
        parameters = dict(model.named_parameters())
        for name, value in old.items():
            rows = [row.to(stored) for row in value]
            for ids in PIECES:
                rows.append(torch.stack([rows[index].float() for index in ids]).mean(0).to(stored))
            parameters[name].data.copy_(torch.stack(rows).float())
    return {
        **{name: value.detach() for name, value in model.named_parameters()},
        **{f"buffer/{name}": value for name, value in model.named_buffers()},
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_ranks_hold_is_what_transformers_loads(case: LoadCase, loaded: tuple[Path, int], folders: Path) -> None:
    out_dir, world_size = loaded
    if world_size != 2 and case.name not in ALWAYS:
        pytest.skip("runs at two ranks")
    state = load_file(out_dir / f"{case.name}.safetensors")
    expected = reference(case, folders)
    names = {name for name in expected if not name.startswith("buffer/")}
    assert {name.removeprefix("weight/") for name in state if name.startswith("weight/")} == names
    for name in names:
        if name in case.frozen:
            assert f"master/{name}" not in state
        else:
            assert torch.equal(state[f"master/{name}"], expected[name]), name
        computed = torch.bfloat16 if case.bf16 else torch.float32
        assert torch.equal(state[f"weight/{name}"], expected[name].to(computed)), name
    buffers = {name for name in state if name.startswith("buffer/")}
    assert buffers == {name for name in expected if name.startswith("buffer/")}
    assert all(torch.equal(state[name], expected[name]) for name in buffers)
    facts = json.loads((out_dir / f"{case.name}.json").read_text())
    assert facts["padding"] == 0.0
    if not case.extended and case.source != "qwen2-both-copies" and not (case.frozen and case.stage == 2):
        assert sum(facts["bytes"]) == facts["stored_bytes"], "each byte is read once, by one rank"
        uneven = world_size * 4 * len(names)  # shares are rounded up, for each weight
        assert max(facts["bytes"]) * world_size <= facts["stored_bytes"] + world_size * uneven
        assert "weights: read 0.00 GB of 0.00 GB" in facts["printed"]


def test_all_bytes_of_a_file_are_read(loaded: tuple[Path, int], folders: Path) -> None:
    out_dir, world_size = loaded
    if world_size != 2:
        pytest.skip("runs at two ranks")
    for name, source in (("llama", "llama"), ("llama-fp16", "llama-fp16"), ("mixtral", "mixtral"), ("gpt2", "gpt2")):
        size = sum(value.numel() * value.element_size() for value in load_file(folders / source / FILE).values())
        assert json.loads((out_dir / f"{name}.json").read_text())["stored_bytes"] == size
