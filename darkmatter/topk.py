"""TopK training for sae-lens that touches only active latents: the same loss and gradients, several times as fast.

``SparseTopKTrainingSAE`` is registered with sae-lens as the training architecture 'sparse_topk' and saves stock 'topk'
SAEs. The dense encoder product runs in bfloat16 to choose the latents; their values, the decoder and all gradients are
float32 sums over the k chosen latents of each token (Gao et al. 2024, section 2.3 and appendix A.2). On a GPU the sums
are dense products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig, register_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

GROUP = 8  # columns whose maxima are looked at first
SPARE = 24  # rows compared in float32 beside those asked for, at least
HALF_ULP = 2.0**-8  # bfloat16 rounds by less than this share
MOST_UNSURE, ENOUGH = 0.25, 256  # share of the x, of at least so many: above, float32 alone is as fast
PART = 2048  # rows whose bounds are made at once
SLACK = 1.05  # for the float32 sums of bfloat16 products


def sampled_dot(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """x[i] · rows[index[i, j]] for x [n, d], rows [m, d], index [n, k]: [n, k].

    This is the derivative of x[i] · ``weighted_rows`` by its weights; torch computes it without copying the rows.
    """
    with torch.enable_grad():
        weight = torch.zeros(index.shape, dtype=x.dtype, device=x.device, requires_grad=True)
        return torch.autograd.grad(weighted_rows(index, rows.detach(), weight), weight, x.detach())[0]


def weighted_rows(index: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Σ_j weight[i, j] · rows[index[i, j]]: [n, d]."""
    return F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")


def weighted_sums(index: Tensor, rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """``weighted_rows`` for bags of any size: bag i is index[starts[i]:starts[i + 1]], all flat."""
    return F.embedding_bag(index, rows, starts, per_sample_weights=weight, mode="sum")


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of values [n, m], in falling order, and their columns, as ``topk`` gives them.

    It takes half of the time of ``topk`` for a few of many columns, and no longer than that for more.

    A value among the k largest lies in one of the k groups of columns with the largest maxima.
    """
    n, m = values.shape
    if values.is_cuda or m % GROUP or m // GROUP < 4 * k:
        value, index = values.topk(k)
        return value, index
    grouped = values.view(n, GROUP, m // GROUP)  # a group's columns lie m / GROUP apart
    group = grouped.amax(1).topk(k, sorted=False).indices
    value, at = grouped.gather(2, group[:, None].expand(n, GROUP, k)).flatten(1).topk(k)
    return value, group.gather(1, at % k) + at.div(k, rounding_mode="floor") * (m // GROUP)


@contextmanager
def products(**settings: Any) -> Iterator[None]:
    """CUDA's matrix products with these settings of ``torch.backends.cuda.matmul``; a CPU's are as they were."""
    backend = torch.backends.cuda.matmul
    before = {name: getattr(backend, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(backend, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(backend, name, value)


class Products:
    """The largest of x · row + bias over many rows, exactly, though most products are taken in bfloat16.

    Four columns beside a row hold its bias and a bound on the rounding of the rest (Cauchy and Schwarz), so that each
    bfloat16 product is at least the exact one. The k + some largest of these are multiplied again in float32. Where the
    last of them could still be among the k largest, all rows are; and if that happens often, so is all that follows.
    """

    def __init__(self, rows: Tensor, bias: Tensor) -> None:
        """Rows [m, d] and bias [m], float32; rows that lie together in memory are not copied."""
        self.rows, self.bias = rows.contiguous(), bias
        self.seen = self.unsure = 0  # x so far, and those for which all rows were multiplied again
        self.low = rows.new_empty(len(rows), rows.shape[1] + 4, dtype=torch.bfloat16)
        for low, *part in zip(*(each.split(PART) for each in (self.low, self.rows, bias)), strict=True):
            low.copy_(_bounded(*part))

    def largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Index [n, k] and value float32 [n, k], in falling order, for x [n, d] float32."""
        some = k + max(SPARE, k // 4)
        if some >= len(self.rows) or self.unsure > MOST_UNSURE * max(self.seen, ENOUGH):
            value, index = torch.addmm(self.bias, x, self.rows.T).topk(k)
            return index, value
        bound, index = largest(self._bounds(x), some)
        value, at = (sampled_dot(x, self.rows, index) + self.bias[index]).topk(k)
        last = bound[:, -1].float()
        index, unsure = index.gather(1, at), last + HALF_ULP * last.abs() >= value[:, -1]
        self.seen, self.unsure = self.seen + len(x), self.unsure + int(unsure.sum())
        if unsure.any():
            value[unsure], index[unsure] = torch.addmm(self.bias, x[unsure], self.rows.T).topk(k)
        return index, value

    def _bounds(self, x: Tensor) -> Tensor:
        """At least x · row + bias, but for the last rounding: bfloat16 [n, m]."""
        low = x.bfloat16()
        sizes = [_above(x.norm(dim=1)), _above((x - low.float()).norm(dim=1)), *low.new_ones(2, len(x))]
        with products(allow_bf16_reduced_precision_reduction=False):  # rounded partial sums would break the bound
            return torch.cat([low, torch.stack(sizes, 1)], 1) @ self.low.T


def _bounded(rows: Tensor, bias: Tensor) -> Tensor:
    """Rows in bfloat16 with the four columns that bound their products: [m, d + 4]."""
    low, first = rows.bfloat16(), bias.bfloat16()
    rounding = (rows - low.float()).norm(dim=1) * SLACK
    beside = [_above(rounding), _above(rows.norm(dim=1)), first, _above(bias - first.float())]
    return torch.cat([low, torch.stack(beside, 1)], 1)


def _above(values: Tensor) -> Tensor:
    """The values in bfloat16, none of them less than it was."""
    return (values + HALF_ULP * values.abs()).bfloat16()


class _Gather:
    """Sums over the tokens that chose each latent: the transpose of ``weighted_rows``, sorted once, used twice."""

    def __init__(self, index: Tensor, latents: int) -> None:
        flat = index.flatten()
        ordered, self.order = flat.sort(stable=True)
        self.token = self.order // index.shape[1]
        self.offsets = torch.searchsorted(ordered, torch.arange(latents, device=index.device))

    def __call__(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Σ over (i, j) with index[i, j] = m of weight[i, j] · rows[i]: [latents, d]."""
        return weighted_sums(self.token, rows, weight.flatten()[self.order], self.offsets)


class _SparseAutoencoder(torch.autograd.Function):
    """reconstruction − b_dec = Σ_j relu(w_j · c + b_j) d_j over the chosen latents j, with c = x − b_dec."""

    @staticmethod
    def forward(ctx: Any, centred: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, index: Tensor) -> Any:
        value = (sampled_dot(centred, encoder, index) + bias[index]).relu()
        ctx.save_for_backward(centred, encoder, decoder, index, value)
        ctx.mark_non_differentiable(value)
        return weighted_rows(index, decoder, value), value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad = gradients[0].contiguous()
        centred, encoder, decoder, index, value = ctx.saved_tensors
        gather = _Gather(index, len(encoder))
        grad_value = sampled_dot(grad, decoder, index) * (value > 0)
        grad_bias = torch.zeros(len(encoder), device=grad.device)
        grad_bias.index_put_((index.flatten(),), grad_value.flatten(), accumulate=True)
        # c depends on b_dec, hence the first gradient
        return (weighted_rows(index, encoder, grad_value), gather(grad_value, centred), grad_bias,
                gather(value, grad), None)


class _DenseAutoencoder(torch.autograd.Function):
    """The same on a GPU, which multiplies by zeros sooner than it gathers rows; the sums are float32, of TF32 factors.

    Nothing here waits for the GPU. The gradient by b_dec, on which c depends, is taken here: Σ_m w_m times that by b_m.
    """

    @staticmethod
    def forward(ctx: Any, centred: Tensor, b_dec: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor,
                index: Tensor) -> Any:
        with products(fp32_precision="tf32"):
            value = ((centred @ encoder.T).gather(1, index) + bias[index]).relu()
            acts = _dense(index, value, len(encoder))
            ctx.save_for_backward(centred, encoder, decoder, index, acts)
            ctx.mark_non_differentiable(value)
            return acts @ decoder, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad = gradients[0].contiguous()
        centred, encoder, decoder, index, acts = ctx.saved_tensors
        with products(fp32_precision="tf32"):
            grad_value = (grad @ decoder.T).gather(1, index) * (acts.gather(1, index) > 0)
            grad_acts = _dense(index, grad_value, len(encoder))
            grad_bias = grad_acts.sum(0)
            return None, -(grad_bias @ encoder), grad_acts.T @ centred, grad_bias, acts.T @ grad, None


def _dense(index: Tensor, value: Tensor, latents: int) -> Tensor:
    return value.new_zeros(len(value), latents).scatter_(1, index, value)


@dataclass
class SparseTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """sae-lens's TopK training configuration, under its own name; saved for inference as a stock 'topk' SAE."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk"

    def get_inference_config_class(self) -> type[TopKSAEConfig]:
        return TopKSAEConfig


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """sae-lens's ``TopKTrainingSAE`` (latents ranked by activation times decoder norm, AuxK loss) with sparse sums."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc = nn.Parameter(self.W_enc.data.T.contiguous().T)  # a latent's weights lie together in memory

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses; ``feature_acts`` is a sparse [n, d_sae] tensor, ``hidden_pre`` its chosen values only."""
        dead = step_input.dead_neuron_mask
        output, index = self.losses(step_input.sae_in, dead, 0 if dead is None else int(dead.sum()))
        return replace(output, feature_acts=_as_sparse(index, output.hidden_pre, self.cfg.d_sae))

    def losses(self, x: Tensor, dead: Tensor | None, room: int) -> tuple[TrainStepOutput, Tensor]:
        """One step's losses, with the chosen values only as ``feature_acts``, and the chosen latents [n, k].

        Shapes depend on ``room``, how many of the dead latents may take part, and not on what is in a tensor.
        """
        centred = x - self.b_dec
        encoder = self.W_enc.T
        with torch.no_grad():
            norm = self.W_dec.norm(dim=-1)
            scores = F.linear(centred.bfloat16(), (encoder * norm[:, None]).bfloat16(), (self.b_enc * norm).bfloat16())
            index = scores.topk(self.cfg.k, dim=-1, sorted=False).indices
        weights = encoder, self.b_enc, self.W_dec
        out, value = (_DenseAutoencoder.apply(centred.detach(), self.b_dec, *weights, index) if x.is_cuda  # type: ignore[misc]
                      else _SparseAutoencoder.apply(centred, *weights, index))
        reconstruction = out + self.b_dec
        mse = (reconstruction - x).pow(2).sum(-1).mean()
        aux = self._aux_loss(x, centred, reconstruction, dead, room)
        return TrainStepOutput(sae_in=x, sae_out=reconstruction, feature_acts=value, hidden_pre=value, loss=mse + aux,
                               losses={"mse_loss": mse, "auxiliary_reconstruction_loss": aux}), index

    def _aux_loss(self, x: Tensor, centred: Tensor, reconstruction: Tensor, dead: Tensor | None, room: int) -> Tensor:
        """sae-lens's AuxK loss: the d_in / 2 strongest of the first ``room`` dead latents reconstruct a token's error.

        Where there is room for more than there are, others fill it and count as off.
        """
        if dead is None or not room:
            return x.new_zeros(())
        half = x.shape[-1] // 2
        first = (dead * torch.arange(len(dead), 0, -1.0, device=x.device)).topk(room, sorted=False).indices
        decoder, encoder, bias = (of.index_select(0, first) for of in (self.W_dec, self.W_enc.T, self.b_enc))
        norm = decoder.norm(dim=-1)
        strength = (centred @ encoder.T + bias) * norm
        with torch.no_grad():
            real = dead.index_select(0, first)
            strongest = strength.masked_fill(~real, -torch.inf).topk(min(half, room), dim=-1, sorted=False).indices
            on = torch.zeros_like(strength).scatter_(-1, strongest, 1.0) * real
        missing = (x - reconstruction).detach()
        scale = (dead.sum() / half).clamp(max=1.0)
        error = (strength * on / norm) @ decoder - missing
        return self.cfg.aux_loss_coefficient * scale * error.pow(2).sum(-1).mean()


def _as_sparse(index: Tensor, value: Tensor, latents: int) -> Tensor:
    token = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
    fired = value.flatten() > 0
    where = torch.stack([token, index.flatten()])[:, fired]
    return torch.sparse_coo_tensor(where, value.flatten()[fired], (len(index), latents), check_invariants=False)


register_sae_training_class("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)
