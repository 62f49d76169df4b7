"""Embeddings against published similarities; a language model behind a real server."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.experiments.detection import detection, scorers, windows
from darkmatter.experiments.detection.detection import DECILES, SILENT, Settings
from darkmatter.experiments.detection.scorers import Embeddings, LanguageModel, Server
from darkmatter.experiments.detection.windows import Task, Windows
from darkmatter.models import model
from tests import chat_server, tiny
from tests.text.test_corpus import tiny_tokenizer

HOW = Settings(latents=100, least=20, negatives=10, per_decile=1, shown=4)


# ---- embeddings ----

def test_similarities_are_those_that_the_models_authors_publish(own_cache: Path) -> None:
    """The example of Sentence Transformers' quickstart."""
    vectors = scorers.embed(["The weather is lovely today.", "It's so sunny outside!",
                             "He drove to the stadium."])
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-3)


def test_an_embedding_does_not_depend_on_the_texts_beside_it(own_cache: Path) -> None:
    texts = ["A short one.", "A much longer one, so that the short one is padded to its length.",
             "", "x = f(y)"]
    together, alone = scorers.embed(texts), [scorers.embed([text]) for text in texts]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert together.shape == (4, 384) and together.dtype == np.float32


def test_texts_are_embedded_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scorers.embed(["one", "two"])
    monkeypatch.setattr(scorers, "_embed", lambda *_: pytest.fail("embedded again"))
    assert np.array_equal(scorers.embed(["one", "two"]), first)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(scorers, "PACKAGE", "gt_no_such_model")
    message = "'gt-no-such-model' with the sentence embeddings is missing; install it"
    with pytest.raises(DarkmatterError, match=message):
        scorers.embed(["one"])


@pytest.fixture(scope="module")
def cut() -> Windows:
    acts = tiny.acts(contexts=120, sources=60, x=tiny.features(120 * 40))
    return windows.cut(tiny.preset(), acts, tiny_tokenizer(), 8)


@pytest.fixture(scope="module")
def activity(cut: Windows) -> sparse.csr_array:
    """Latent 0 fires in every fourth window, on one token."""
    dense, first = np.zeros((120 * 40, 2), np.float32), cut.first_row[::4]
    dense[first + 3, 0] = np.random.default_rng(0).exponential(size=len(first))
    return sparse.csr_array(dense)


@pytest.fixture(scope="module")
def task(cut: Windows, activity: sparse.csr_array) -> Task:
    return detection.task(windows.peaks(activity, cut), 0, cut, HOW)


def vectors(cut: Windows, signal: float) -> np.ndarray:
    """Windows with the latent lie in another direction, as far as ``signal`` says, within noise."""
    rng = np.random.default_rng(1)
    made = rng.normal(size=(len(cut.tokens), 64)) + 5
    made[::4, 0] += signal
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_embeddings_tell_windows_apart_when_they_differ(cut: Windows, activity: sparse.csr_array,
                                                        task: Task) -> None:
    answers = detection.detect(Embeddings(vectors(cut, 12)), [task], cut, activity)
    assert answers["right"].to_numpy(float).mean() > 0.95


def test_embeddings_that_know_nothing_are_chance(cut: Windows, activity: sparse.csr_array,
                                                 task: Task) -> None:
    noise = [np.random.default_rng(seed).normal(size=(len(cut.tokens), 64)) for seed in range(30)]
    answers = [detection.detect(Embeddings(made), [task], cut, activity) for made in noise]
    sides = [np.mean([one.loc[np.isin(one["group"], names), "right"].mean() for one in answers])
             for names in (DECILES, [SILENT])]
    assert np.mean(sides) == pytest.approx(0.5, abs=0.05)


def test_embeddings_do_not_look_at_tested_windows(cut: Windows, activity: sparse.csr_array,
                                                  task: Task) -> None:
    """The margin of one tested window is the same whatever the others are."""
    made = vectors(cut, 3)
    other = made.copy()
    other[task.tested[1:]] = np.random.default_rng(2).normal(size=(len(task.tested) - 1, 64))
    first, second = (Embeddings(rows)(task, cut, activity)[0] for rows in (made, other))
    assert first == pytest.approx(second)


# ---- a language model behind a server ----

def test_marked_text() -> None:
    parts = [("It rained in ", False), (" April", True), (",\n not", False), (" May", True)]
    assert scorers.marked(parts) == "It rained in << April>>, not<< May>>"


@pytest.fixture(scope="module")
def folder() -> Path:
    """The default preset's model as a directory."""
    return Path(model.directory(presets.load("smoke")))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A process of its own, on the loopback address, that generates with that model."""
    command = [sys.executable, chat_server.__file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield Server(url, chat_server.NAME, timeout=600, key="secret-of-the-test")
        process.terminate()


def asked(server: Server) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server.url}/asked") as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_answer_is_the_models_own_greedy_one(server: Server, folder: Path) -> None:
    from transformers import pipeline

    question = "What is the capital of France? Answer in one word."
    answer = server.complete(question, 6)
    assert answer == server.complete(question, 6)
    chat: Any = pipeline("text-generation", model=str(folder), device="cpu", dtype="float32")
    expected = chat([{"role": "user", "content": question}], max_new_tokens=6, do_sample=False)
    assert answer == expected[0]["generated_text"][-1]["content"].strip()
    assert "Paris" in answer
    last = asked(server)[-1]
    assert (last["max_tokens"], last["temperature"], last["model"]) == (6, 0, chat_server.NAME)
    assert last["authorization"] == "Bearer secret-of-the-test"


@pytest.fixture(scope="module")
def english(activity: sparse.csr_array, cut: Windows) -> Windows:
    """The same windows, read as English: with the latent of the sea, without it of anything."""
    sea = ["ship", "sail", "storm", "wave", "harbour", "captain", "anchor", "tide"]
    land = ["bread", "music", "number", "garden", "letter", "winter", "colour", "paper"]

    class Reader:
        def batch_decode(self, tokens: np.ndarray, **_: object) -> list[str]:
            return [self.decode(row) for row in tokens]

        def decode(self, ids: Any) -> str:
            return "".join(f" {words[int(i) % 8]}" for i in ids)

    words = land
    texts = replace(cut, tokenizer=Reader())
    made = texts.texts
    words = sea
    made[::4] = texts.tokenizer.batch_decode(cut.tokens[::4])
    texts.__dict__["texts"] = made
    return texts


@pytest.mark.slow
def test_a_real_model_explains_and_judges(server: Server, english: Windows,
                                          activity: sparse.csr_array) -> None:
    task = detection.task(windows.peaks(activity, english), 0, english, replace(HOW, negatives=2))
    before = len(asked(server))
    scorer = LanguageModel(server, parallel=2)
    answers = detection.detect(scorer, [task], english, activity)
    requests = asked(server)[before:]
    batches = -(-len(task.tested) // 4)
    assert len(requests) == 1 + batches and len(answers) == len(task.tested)
    assert [request["max_tokens"] for request in requests] == [50] + [25] * batches
    assert {request["temperature"] for request in requests} == {0}
    prompt, *questions = [request["messages"][0]["content"] for request in requests]
    marks = re.findall(r"<< \w+>>", prompt.split("4. ")[0])
    assert len(marks) == 3  # one marked token in each of the first three
    explanation = scorer.explanations[0]
    assert explanation and all(explanation in question for question in questions)
    assert {round(value, 1) for value in answers["margin"].dropna()} <= {-1.0, 1.0}
    texts = [english.texts[window] for window in task.tested[:4].tolist()]
    first, second = (scorer.judge(explanation, texts) for _ in range(2))
    np.testing.assert_array_equal(first, second)  # at temperature 0


@pytest.mark.slow
def test_a_model_that_the_server_does_not_have(server: Server) -> None:
    other = Server(server.url, "no-such-model")
    message = "with status 404; check the model's name 'no-such-model' and the key"
    with pytest.raises(DarkmatterError, match=message):
        other.complete("Hello", 5)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        message = f"The scorer at {url} cannot be reached .*; start a server there"
        with pytest.raises(DarkmatterError, match=message):
            Server(url, "any").complete("Hello", 5)


def test_no_answer_in_time() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        server = Server(f"http://127.0.0.1:{mute.getsockname()[1]}/v1", "any", timeout=0.2)
        with pytest.raises(DarkmatterError, match=r"cannot be reached .*timed out"):
            server.complete("Hello", 5)


@pytest.mark.parametrize("url", ["", "localhost:8000", "file:///etc/hostname"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(DarkmatterError, match="should begin with http:// or https://"):
        Server(url, "any").complete("Hello", 5)


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"{}", b'{"choices": []}', b"[1]",
                                  b"\xff"])
def test_something_else_answers(body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as page:
        Thread(target=page.serve_forever, daemon=True).start()
        with pytest.raises(DarkmatterError, match="does not speak OpenAI's chat protocol"):
            Server(f"http://127.0.0.1:{page.server_port}/v1", "any").complete("Hello", 5)
        page.shutdown()


@pytest.mark.parametrize(("answer", "expected"), [
    ("1, 0, 1", [1, -1, 1]), ("[0,0,1]", [-1, -1, 1]), ("1\n1\n0", [1, 1, -1]), ("1, 0", None),
    ("yes, no, yes", None), ("1, 0, 1, 1", None), ("", None), ("10 texts", None),
])
def test_only_a_list_of_as_many_digits_is_an_answer(monkeypatch: pytest.MonkeyPatch, answer: str,
                                                    expected: list[int] | None) -> None:
    monkeypatch.setattr(Server, "complete", lambda *_: answer)
    scorer = LanguageModel(Server("http://127.0.0.1:1/v1", "any"))
    margins = scorer.judge("the sea", ["a", "b", "c"])
    np.testing.assert_array_equal(margins, expected or [np.nan] * 3)


def test_a_key_is_not_shown() -> None:
    assert "hidden" not in repr(Server("http://127.0.0.1:1/v1", "any", key="hidden"))
