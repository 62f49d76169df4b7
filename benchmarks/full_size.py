"""Gemma 2 at full size with random weights: the survey's time and memory beside its floor, on one GPU.

Real weights would change neither: the shapes, the number of active latents and the text's length are the paper's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

from darkmatter import activations, corpus, model, preset, saes, survey
from darkmatter.activations import Activations
from darkmatter.regression import _exact
from darkmatter.saes import LoadedSAE

# Published sizes: layers, hidden size, MLP width, query and key-value heads, size of a head, and the layer read here
SIZES = {"gemma-2-2b": (26, 2304, 9216, 8, 4, 256, 12), "gemma-2-9b": (42, 3584, 14336, 16, 8, 256, 20),
         "toy": (3, 64, 128, 4, 2, 16, 1)}
L0 = 60


def main() -> None:
    """Measure one size with some SAE widths; the result is added to a JSON file, one entry a size and width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--widths", type=int, nargs="+", default=[16384])
    parser.add_argument("--contexts", type=int, default=300)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        os.environ["DARKMATTER_CACHE"] = folder
        found = measured(given.size, given.widths, given.contexts, given.length, given.device)
    known = json.loads(given.out.read_text()) if given.out.exists() else []
    given.out.write_text(json.dumps([*known, found], indent=1) + "\n")
    print(json.dumps(found, indent=1), file=sys.stderr)


def measured(size: str, widths: list[int], contexts: int, length: int, device: str) -> dict[str, Any]:
    """Seconds and GPU bytes of the forward pass, of each encoder product, and of the survey of all widths."""
    layers, d, *_, layer = SIZES[size]
    site = f"blocks.{layer}.hook_resid_post"
    own = preset.Preset(name=size, model=size, device=device, site=site, saes=tuple(map(str, widths)),
                        contexts=contexts, context_length=length, batch_contexts=4 if length > 256 else 16)
    loaded = random_model(size, device)
    text = random_text(loaded, contexts, length)
    warm = model.capture(loaded, text.tokens[:4], [site])[site]
    scale = float(warm[:, own.first_kept:].float().std())
    result: dict[str, Any] = {
        "size": size, "device": hardware(device), "contexts": contexts, "length": length, "layers": layers,
        "layer": layer, "d": d, "widths": widths, "kept": contexts * len(own.kept), "torch": torch.__version__,
        "model_bytes": allocated(device)}
    result["forward_seconds"], _ = timed(device, partial(forward, own, loaded, text))
    result["capture_seconds"], acts = timed(device, partial(capture, own, loaded, text))  # with the cache written
    del loaded
    opened = [random_sae(acts, width, scale, own, device) for width in widths]
    result["sae_bytes"] = [sum(p.nbytes for p in each.sae.parameters()) for each in opened]
    x = acts.x[::len(acts.x) // 4096].to(device).float()
    result["l0"] = [float((each.sae.encode(x) != 0).sum(1).float().mean()) for each in opened]
    result["encoder_seconds"] = [encoder_seconds(each, acts, own, device) for each in opened]
    before = allocated(device)
    reset(device)
    seconds, rows = timed(device, lambda: surveyed(own, opened, acts))
    result["survey_seconds"] = seconds  # codes and the three passes, without the forward pass
    result["peak_bytes_beside_weights"] = peak(device) - before
    floor = result["forward_seconds"] + sum(result["encoder_seconds"])
    result["floor_seconds"], result["total_seconds"] = floor, result["capture_seconds"] + seconds
    result["ratio"] = result["total_seconds"] / floor
    result["held_in_memory_bytes"] = 2 * 4 * acts.x.shape[0] * d  # x and one error in float32
    result["fvu"] = rows[rows.metric == "fvu"].value.tolist()
    return result


def random_model(size: str, device: str) -> model.LoadedModel:
    """A Gemma 2 of that size with random weights, bfloat16, on the device, opened as ``model.load`` does."""
    from transformer_lens.model_bridge import TransformerBridge

    layers, d, mlp, heads, kv_heads, head, _ = SIZES[size]
    config = Gemma2Config(num_hidden_layers=layers, hidden_size=d, intermediate_size=mlp, num_attention_heads=heads,
                          num_key_value_heads=kv_heads, head_dim=head, query_pre_attn_scalar=256 if d < 3000 else 224,
                          vocab_size=256_000 if d > 64 else 300, sliding_window=4096,
                          architectures=["Gemma2ForCausalLM"])
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).hidden_size == d
        bridge = TransformerBridge.boot_transformers(folder, hf_model=network, device=device, dtype=torch.bfloat16)
    bridge.eval()
    return model.LoadedModel(bridge, SimpleNamespace(all_special_ids=[]), layers, d)


def random_text(loaded: model.LoadedModel, contexts: int, length: int) -> corpus.Corpus:
    """Random tokens; every context is a source of its own, as on the Pile."""
    vocabulary = loaded.bridge.original_model.config.vocab_size
    tokens = np.random.default_rng(0).integers(10, vocabulary, (contexts, length)).astype(np.int32)
    return corpus.Corpus(tokens, np.arange(contexts, dtype=np.int32), tuple(f"random/{i}" for i in range(contexts)))


def random_sae(acts: Activations, width: int, scale: float, own: preset.Preset, device: str) -> LoadedSAE:
    """A JumpReLU SAE as Gemma Scope's, random, with a threshold that lets about L0 latents fire."""
    d = acts.x.shape[1]
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=width, device=device))
    generator = torch.Generator(device).manual_seed(width)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(width, d, generator=generator, device=device), dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        x = acts.x[::len(acts.x) // 1024].to(device).float()
        sae.b_dec.copy_(x.mean(0))
        sae.b_enc.copy_(-(x.mean(0) @ sae.W_enc))
        before = (x @ sae.W_enc + sae.b_enc).flatten()
        sae.threshold.fill_(float(before.topk(L0 * len(x), sorted=True).values[-1]))
    return LoadedSAE(str(width), f"random-{width}", sae.eval(), {}, digest=f"random-{width}")


def forward(own: preset.Preset, loaded: model.LoadedModel, text: corpus.Corpus) -> None:
    for begin in range(0, len(text.tokens), own.batch_contexts):
        model.capture(loaded, text.tokens[begin:begin + own.batch_contexts], [own.site])


def capture(own: preset.Preset, loaded: model.LoadedModel, text: corpus.Corpus) -> Activations:
    return activations._open(own, [own.site], loaded, loaded.tokenizer, text, own.first_kept)[own.site]


@torch.no_grad()
def encoder_seconds(each: LoadedSAE, acts: Activations, own: preset.Preset, device: str) -> float:
    """One encoder product for every kept token, float32, on activations that lie on the device."""
    rows = 4096
    x = acts.x[:rows].to(device).float()

    def product() -> None:
        with _exact(x.device):
            for _ in range(-(-len(acts.x) // rows)):
                torch.addmm(each.sae.b_enc, x, each.sae.W_enc)

    return timed(device, product)[0]


def surveyed(own: preset.Preset, opened: list[LoadedSAE], acts: Activations) -> Any:
    known = {each.ref: each for each in opened}
    saes.load = lambda ref, preset: known[ref]  # type: ignore[assignment]
    activations.evaluation = lambda preset, loaded=None: acts  # type: ignore[assignment]
    return survey.run(own).rows


def timed(device: str, call: Any) -> tuple[float, Any]:
    sync(device)
    begun = time.perf_counter()
    result = call()
    sync(device)
    return time.perf_counter() - begun, result


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def reset(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device != "cpu" else 0


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else 0


def hardware(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else "CPU"


if __name__ == "__main__":
    main()
