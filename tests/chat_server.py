"""A small server of OpenAI's chat protocol that generates with a real model, to test the scorers.

``python tests/chat_server.py FOLDER`` prints its base address and serves the model in FOLDER, one
answer at a time, until it is stopped. Greedy at temperature 0, else it samples. What it was asked
is at GET /asked.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "local-model"


class Generator:
    """A model of transformers with its chat template."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.lock = threading.Lock()

    @torch.inference_mode()
    def answer(self, messages: list[dict[str, str]], tokens: int, temperature: float) -> str:
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        how = {"temperature": temperature} if temperature else {}
        with self.lock:
            out = self.model.generate(**prompt, max_new_tokens=tokens, do_sample=bool(how), **how)
        answer = out[0, prompt["input_ids"].shape[1]:]
        return self.tokenizer.decode(answer, skip_special_tokens=True)


class Handler(BaseHTTPRequestHandler):
    generator: Generator
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request | {"authorization": self.headers.get("Authorization", "")})
        if self.path != "/v1/chat/completions" or request["model"] != NAME:
            message = f"The model `{request['model']}` does not exist."
            self.send(404, {"error": {"message": message}})
            return
        text = self.generator.answer(*map(request.get, ("messages", "max_tokens", "temperature")))
        message = {"role": "assistant", "content": text}
        self.send(200, {"object": "chat.completion", "model": NAME,
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def do_GET(self) -> None:
        self.send(200, self.asked)

    def send(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    Handler.generator = Generator(Path(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
