"""SAE files as others publish them, with what each format says the SAE does, computed here by
itself in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Array = np.ndarray


@dataclass(frozen=True)
class Weights:
    """A toy SAE: W_enc [d, m], W_dec [m, d], b_enc [m], b_dec [d], threshold [m], float32."""

    W_enc: Array
    W_dec: Array
    b_enc: Array
    b_dec: Array
    threshold: Array

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(values))
                for name, values in vars(self).items()}

    def wide(self) -> dict[str, Array]:
        return {name: values.astype(np.float64) for name, values in vars(self).items()}


def random(d: int, width: int, scale: float = 1.0, seed: int = 0, l0: float = 0.05) -> Weights:
    """Tied rows of unit norm; about a share ``l0`` of the latents passes its threshold on inputs of
    norm ``scale``."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((width, d), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    level = scale / d**0.5 * float(-np.quantile(rng.standard_normal(10_000), l0))
    return Weights(np.ascontiguousarray(rows.T), 0.8 * rows, np.zeros(width, np.float32),
                   (0.1 * level * rng.standard_normal(d)).astype(np.float32),
                   np.full(width, level, np.float32))


def scaled(d: int, width: int, share: float) -> Weights:
    """Latents x and −x, the rest dead: Sae(x) = share · x, so that the error is wholly linear in
    x."""
    eye, rest = np.eye(d, dtype=np.float32), np.zeros((width - 2 * d, d), np.float32)
    rows = np.concatenate([eye, -eye, rest])
    return Weights(np.ascontiguousarray(rows.T), share * rows,
                   np.zeros(width, np.float32), np.zeros(d, np.float32),
                   np.zeros(width, np.float32))


# ---- Gemma Scope: params.npz ----

def gemma_scope(folder: Path, made: Weights) -> None:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **vars(made))


def gemma_scope_sae(made: Weights, x: Array) -> Array:
    """JumpReLU, nothing taken off x."""
    w = made.wide()
    before = x @ w["W_enc"] + w["b_enc"]
    return np.where(before > w["threshold"], np.maximum(before, 0), 0) @ w["W_dec"] + w["b_dec"]


# ---- Gemma Scope 2: config.json, params.safetensors ----

def gemma_scope_2(folder: Path, made: Weights, layer: int) -> None:
    folder.mkdir(parents=True)
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "l0": 60,
              "hf_hook_point_in": f"model.layers.{layer}.output",
              "hf_hook_point_out": f"model.layers.{layer}.output"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name.lower(): values for name, values in made.tensors().items()},
              folder / "params.safetensors")


# ---- Llama Scope: hyperparams.json, checkpoints/final.safetensors ----

def llama_scope(folder: Path, made: Weights, norm: float, site: str) -> None:
    """The SAE reads x times √d / ``norm``, and its threshold is one number."""
    d, width = made.W_enc.shape
    (folder / "checkpoints").mkdir(parents=True)
    how = {"d_model": d, "d_sae": width, "jump_relu_threshold": float(made.threshold[0]),
           "act_fn": "jumprelu", "dataset_average_activation_norm": {"in": norm, "out": norm},
           "hook_point_in": site, "hook_point_out": site, "norm_activation": "dataset-wise",
           "expansion_factor": width / d}
    (folder / "hyperparams.json").write_text(json.dumps(how))
    t = made.tensors()
    state = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"],
             "decoder.weight": t["W_dec"].T, "decoder.bias": t["b_dec"]}
    save_file({name: values.to(torch.bfloat16).contiguous() for name, values in state.items()},
              folder / "checkpoints" / "final.safetensors")


# ---- sae-lens before version 6: cfg.json, sae_weights.safetensors, sparsity.safetensors ----

def sae_lens_5(folder: Path, made: Weights, site: str, **config: Any) -> None:
    d, width = made.W_enc.shape
    folder.mkdir(parents=True)
    how = {"model_name": "gpt2-small", "hook_point": site, "hook_point_layer": 8,
           "hook_point_head_index": None, "d_in": d, "d_sae": width,
           "dtype": "torch.float32", "activation_fn_str": "relu", "prepend_bos": True,
           "normalize_activations": False, "context_size": 128,
           "expansion_factor": width // d} | config
    (folder / "cfg.json").write_text(json.dumps(how | {"dtype": "float32"}))
    t = made.tensors()
    state = {name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    save_file(state | {"scaling_factor": torch.ones(width)}, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.full((width,), -3.0)}, folder / "sparsity.safetensors")


def relu_sae(made: Weights, x: Array) -> Array:
    """ReLU of what is left when b_dec is taken off x."""
    w = made.wide()
    return np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0) @ w["W_dec"] + w["b_dec"]


# ---- sparsify: cfg.json, sae.safetensors ----

def sparsify(folder: Path, made: Weights, k: int) -> None:
    folder.mkdir(parents=True)
    d, width = made.W_enc.shape
    how = {"activation": "topk", "expansion_factor": width // d,
           "normalize_decoder": True, "num_latents": 0, "k": k,
           "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d}
    (folder / "cfg.json").write_text(json.dumps(how))
    t = made.tensors()
    save_file({"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"],
               "W_dec": t["W_dec"], "b_dec": t["b_dec"]}, folder / "sae.safetensors")


def topk_sae(made: Weights, x: Array, k: int) -> Array:
    """The k largest of what is left when b_dec is taken off x, those above zero."""
    w = made.wide()
    before = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    least = np.sort(before, axis=1)[:, -k][:, None]
    return np.where(before >= least, before, 0) @ w["W_dec"] + w["b_dec"]


# ---- dictionary_learning: config.json, ae.pt ----

def dictionary_learning(folder: Path, made: Weights, kind: str, k: int) -> None:
    """``kind``: AutoEncoderTopK, BatchTopKSAE, AutoEncoder or JumpReluAutoEncoder."""
    folder.mkdir(parents=True)
    d, width = made.W_enc.shape
    trainer = {"dict_class": kind, "activation_dim": d, "dict_size": width,
               "layer": 1, "lm_name": "toy/model", "k": k, "trainer_class": "Trainer",
               "submodule_name": "resid_post_layer_1"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer,
                                                    "buffer": {"ctx_len": 128, "d_submodule": d}}))
    t = made.tensors()
    linear = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"],
              "decoder.weight": t["W_dec"].T.contiguous()}
    state = {"AutoEncoderTopK": linear | {"b_dec": t["b_dec"],
                                          "k": torch.tensor(k), "threshold": torch.tensor(-1.0)},
             "BatchTopKSAE": linear | {"b_dec": t["b_dec"], "k": torch.tensor(k),
                                       "threshold": t["threshold"][0]},
             "AutoEncoder": linear | {"bias": t["b_dec"]},
             "JumpReluAutoEncoder": {name: t[name] for name in ("W_enc", "b_enc",
                                                                "W_dec", "b_dec", "threshold")}}
    torch.save(state[kind], folder / "ae.pt")


def batch_topk_sae(made: Weights, x: Array) -> Array:
    """One threshold for all latents, on what is left when b_dec is taken off x."""
    w = made.wide()
    return gemma_scope_sae(made, x - w["b_dec"])


DICTIONARIES: dict[str, Callable[[Weights, Array, int], Array]] = {
    "AutoEncoderTopK": topk_sae,
    "BatchTopKSAE": lambda made, x, k: batch_topk_sae(made, x),
    "AutoEncoder": lambda made, x, k: relu_sae(made, x),
    "JumpReluAutoEncoder": lambda made, x, k: gemma_scope_sae(made, x)}
