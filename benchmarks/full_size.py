"""Gemma 2 at full size with random weights, on one GPU: the survey's time and memory, its floor.

Real weights would change neither: the shapes, the number of active latents and the text's length
are the paper's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

from darkmatter import survey
from darkmatter.models import activations, model
from darkmatter.models.activations import Activations
from darkmatter.presets import preset
from darkmatter.saes import references
from darkmatter.saes.loaded import LoadedSAE
from darkmatter.text import corpus

from . import data, passes, timing

# Published: layers, hidden size, MLP width, query and key-value heads, size of a head; layer read.
SIZES = {"gemma-2-2b": (26, 2304, 9216, 8, 4, 256, 12),
         "gemma-2-9b": (42, 3584, 14336, 16, 8, 256, 20), "toy": (3, 64, 128, 4, 2, 16, 1)}
L0 = 60


def main() -> None:
    """Measure one size with some SAE widths; the result is added to a JSON file."""
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


def measured(size: str, widths: list[int], contexts: int, length: int,
             device: str) -> dict[str, Any]:
    """Seconds and GPU bytes of the forward pass, each encoder product, and the whole survey."""
    layers, d, *_, layer = SIZES[size]
    site = f"blocks.{layer}.hook_resid_post"
    own = preset.Preset(name=size, model=size, device=device,
                        site=site, saes=tuple(map(str, widths)), contexts=contexts,
                        context_length=length, batch_contexts=4 if length > 256 else 16)
    loaded = random_model(size, device)
    text = random_text(loaded, contexts, length)
    result: dict[str, Any] = {
        "size": size, "device": hardware(device), "contexts": contexts, "length": length,
        "layers": layers, "layer": layer, "d": d, "widths": widths,
        "kept": contexts * len(own.kept), "torch": torch.__version__,
        "model_bytes": sum(p.nbytes for p in loaded.bridge.original_model.parameters())}
    with data.instead(corpus, "evaluation", lambda preset, tokenizer: text):
        model.capture(loaded, text.tokens[:4], [site])  # warm
        forward = passes.Setting(own, [], loaded, device).forward
        result["forward_seconds"] = timing.seconds(forward, device)
        written = partial(activations.evaluation, own, loaded)  # captured, and written to disk
        result["capture_seconds"] = timing.seconds(written, device)
        acts = activations.evaluation(own, loaded)
    del loaded
    sample = acts.x[::max(1, len(acts.x) // 1024)].to(device).float()
    opened = [data.loaded(str(width), data.sae("jumprelu", width, L0, d, device, width, sample))
              for width in widths]
    result["sae_bytes"] = [sum(p.nbytes for p in each.sae.parameters()) for each in opened]
    result["l0"] = [float((each.sae.encode(sample) != 0).sum(1).float().mean()) for each in opened]
    result["encoder_seconds"] = [
        timing.seconds(partial(passes.Setting(own, [each], None, device).encoders,
                               acts.x.to(device)), device)
        for each in opened]
    # without the forward
    mib, result["survey_seconds"] = timing.peak_of(partial(surveyed, own, opened, acts), device)
    floor = result["forward_seconds"] + sum(result["encoder_seconds"])
    result["peak_bytes_beside_weights"] = round(mib * timing.MIB)
    result["floor_seconds"] = floor
    result["total_seconds"] = result["capture_seconds"] + result["survey_seconds"]
    result["ratio"] = result["total_seconds"] / floor
    result["held_in_memory_bytes"] = 2 * 4 * acts.x.shape[0] * d  # x and one error in float32
    return result


def random_model(size: str, device: str) -> model.LoadedModel:
    """A Gemma 2 of that size with random weights in bfloat16, opened as ``model.load`` does."""
    from transformer_lens.model_bridge import TransformerBridge

    layers, d, mlp, heads, kv_heads, head, _ = SIZES[size]
    config = Gemma2Config(
        num_hidden_layers=layers, hidden_size=d, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head, sliding_window=4096,
        query_pre_attn_scalar=256 if d < 3000 else 224, vocab_size=256_000 if d > 64 else 300,
        architectures=["Gemma2ForCausalLM"])
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16,
                                                   attn_implementation="eager").eval()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).hidden_size == d
        bridge = TransformerBridge.boot_transformers(folder, hf_model=network,
                                                     device=device, dtype=torch.bfloat16)
    bridge.eval()
    return model.LoadedModel(bridge, SimpleNamespace(all_special_ids=[]), layers, d)


def random_text(loaded: model.LoadedModel, contexts: int, length: int) -> corpus.Corpus:
    """Random tokens; every context is a source of its own, as on the Pile."""
    vocabulary = loaded.bridge.original_model.config.vocab_size
    tokens = np.random.default_rng(0).integers(10, vocabulary, (contexts, length)).astype(np.int32)
    return corpus.Corpus(tokens, np.arange(contexts, dtype=np.int32),
                         tuple(f"random/{i}" for i in range(contexts)))


def surveyed(own: preset.Preset, opened: list[LoadedSAE], acts: Activations) -> None:
    known = {each.ref: each for each in opened}
    with (data.instead(references, "load_sae", lambda ref, preset: known[ref]),
          data.instead(activations, "evaluation", lambda preset, loaded=None: acts)):
        survey.run(own)


def hardware(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else "CPU"


if __name__ == "__main__":
    main()
