"""SAEs: packed and back, opened from everywhere, as sae-lens runs them; words for a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from darkmatter.errors import DarkmatterError
from darkmatter.saes import artifacts, loaded, references, training
from darkmatter.saes.loaded import LoadedSAE
from tests import tiny
from tests.tiny import D

WIDTH, K = 32, 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def x(n: int = 200, seed: int = 1) -> Tensor:
    return tiny.features(n, seed=seed)


def saved(sae: SAE[Any], folder: Path, record: dict[str, Any] | None = None) -> Path:
    sae.save_model(folder)
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    return folder


def opened(ref: object) -> LoadedSAE:
    return references.load_sae(str(ref), tiny.preset())


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packed TopK SAE called 'one' where artifacts lie."""
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path / "artifacts")
    folder = saved(tiny.topk(WIDTH, K), tmp_path / "trained", {"tokens": 7})
    references.ship(folder, tmp_path / "artifacts" / "one.safetensors")
    return folder


# ---- packed ----

def test_packing_is_off_by_at_most_half_a_step_of_each_latents_scale() -> None:
    sae = tiny.topk(WIDTH, K)
    with torch.no_grad():
        sae.W_dec[3] *= 100  # a latent's scale is its own
        sae.W_dec[5] = 0
    packed = artifacts.pack(sae)
    assert packed["encoder"].dtype == packed["decoder"].dtype == torch.int8
    found = artifacts.unpack(packed)
    for name, rows, scale in (("W_enc", sae.W_enc.T, packed["encoder_scale"]),
                              ("W_dec", sae.W_dec, packed["decoder_scale"])):
        back = found[name].T if name == "W_enc" else found[name]
        torch.testing.assert_close(scale, (rows.abs().amax(1) / 127).clamp(min=1e-30))
        assert bool(((back - rows).abs() <= 0.501 * scale[:, None]).all())
    assert torch.equal(found["b_enc"], sae.b_enc) and torch.equal(found["b_dec"], sae.b_dec)
    assert bool((found["W_dec"][5] == 0).all())


def test_packing_what_was_packed_changes_nothing() -> None:
    sae = tiny.topk(WIDTH, K)
    once = artifacts.unpack(artifacts.pack(sae))
    sae.load_state_dict(once)
    for name, values in artifacts.unpack(artifacts.pack(sae)).items():
        torch.testing.assert_close(values, once[name], rtol=1e-6, atol=0)


def test_shipped_opened_and_exported_gives_the_same_outputs(shipped: Path, tmp_path: Path) -> None:
    artifact = opened("artifact:one")
    assert artifact.name == "one" and artifact.record == {"tokens": 7}
    assert (artifact.width, artifact.k) == (WIDTH, K)
    (out,) = references.export(tiny.preset(saes=("artifact:one",)), tmp_path / "out")
    assert out == tmp_path / "out" / "one"
    assert json.loads((out / "record.json").read_text()) == {"tokens": 7}
    exported = SAE.load_from_disk(out)
    with torch.no_grad():
        torch.testing.assert_close(exported(x()), artifact(x())[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(exported(x()), artifact.sae(x()))
    original = opened(shipped)(x())[0]
    noise = (artifact(x())[0] - original).pow(2).sum() / (x() - original).pow(2).sum()
    assert 0 < noise < 0.01  # 8 bits are small beside the error itself
    assert opened(out).digest == artifact.digest != opened(shipped).digest


def test_a_shipped_file_is_about_a_byte_a_weight(shipped: Path, tmp_path: Path) -> None:
    size = (tmp_path / "artifacts/one.safetensors").stat().st_size
    assert size < 2 * WIDTH * D + 4 * (3 * WIDTH + D) + 4000


# ---- evaluated ----

def check(loaded: LoadedSAE, rows: Tensor) -> None:
    """Sae(x), L0 and fired are what sae-lens's own encode and decode say."""
    found, l0, fired = loaded(rows)
    with torch.no_grad():
        latents = loaded.sae.encode(rows)
        expected = loaded.sae.decode(latents)
    assert found.dtype == torch.float32 and found.shape == rows.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(l0, (latents != 0).sum(1))
    assert torch.equal(fired, (latents != 0).any(0))
    assert 0 < l0.float().mean() < loaded.width


@pytest.mark.parametrize("config", [{}, {"apply_b_dec_to_input": False},
                                    {"normalize_activations": "layer_norm"}],
                         ids=lambda config: next(iter(config), "plain"))
def test_topk_agrees_with_sae_lens(config: dict[str, Any]) -> None:
    sae = tiny.topk(WIDTH, K, **config)
    assert loaded.plain_topk(sae) == ("normalize_activations" not in config)
    check(tiny.loaded("toy", sae), x())


def test_decoder_norms_that_rank_latents_are_folded_in(tmp_path: Path) -> None:
    """sae-lens ranks latents by activation times decoder norm; these go the short way too."""
    sae = tiny.topk(WIDTH, K, rescale_acts_by_decoder_norm=True)
    found = opened(saved(sae, tmp_path / "rescaled"))
    assert loaded.plain_topk(found.sae)
    check(found, x())
    with torch.no_grad():
        torch.testing.assert_close(found(x())[0], sae(x()), rtol=1e-5, atol=1e-5)
        ignored = tiny.topk(WIDTH, K)
        assert (ignored(x()) - sae(x())).abs().max() > 0.1  # the norms do matter here


def test_chosen_latents_below_zero_count_as_off() -> None:
    sae = tiny.topk(WIDTH, K)
    with torch.no_grad():
        sae.b_enc.sub_(2)
        sae.b_enc[:5] = -1e6
    loaded = tiny.loaded("toy", sae)
    check(loaded, x())
    _, l0, fired = loaded(x())
    assert l0.min() < K and not fired[:5].any()


def test_codes_are_the_chosen_latents_and_their_values() -> None:
    sae = tiny.topk(WIDTH, K)
    index, value = tiny.loaded("toy", sae).encode(x())
    dense = torch.zeros(200, WIDTH).scatter(1, index, value)
    torch.testing.assert_close(dense, sae.encode(x()).detach())


def generic(kind: str, dtype: str = "float32") -> SAE[Any]:
    g = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = {"d_in": D, "d_sae": WIDTH, "dtype": dtype}
    sae: SAE[Any] = (StandardSAE(StandardSAEConfig(**fields)) if kind == "standard"
                     else JumpReLUSAE(JumpReLUSAEConfig(**fields)))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=g))
        if kind == "jumprelu":
            sae.threshold.abs_()  # type: ignore[operator,union-attr]
    return sae


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_other_architectures_agree_with_sae_lens(kind: str, tmp_path: Path) -> None:
    loaded = opened(saved(generic(kind), tmp_path / kind))
    assert loaded.k is None and loaded.width == WIDTH
    assert loaded.name == kind and loaded.record == {}
    check(loaded, x())


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_weights_kept_in_bfloat16_run_in_float32(kind: str, tmp_path: Path) -> None:
    sae = generic(kind, "bfloat16")
    loaded = opened(saved(sae, tmp_path / kind))
    assert {weight.dtype for weight in loaded.sae.parameters()} == {torch.float32}
    check(loaded, x())
    wide = generic(kind)
    wide.load_state_dict({name: values.float() for name, values in sae.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(loaded(x())[0], wide(x()), rtol=1e-5, atol=1e-5)


def test_activations_may_come_in_bfloat16() -> None:
    loaded = tiny.loaded("toy", tiny.topk(WIDTH, K))
    narrow = x().bfloat16()
    assert torch.equal(loaded(narrow)[0], loaded(narrow.float())[0])


# ---- by reference ----

def test_trained_on_the_spot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny.topk(WIDTH, K), tmp_path / "w-0123", {"tokens": 9})
    asked: list[Any] = []

    def run(preset: object, only: object) -> dict[str, Path]:
        asked.append(only)
        return {"w": folder}

    monkeypatch.setattr(training, "run", run)
    found = opened("train:32x4")
    assert asked == [(32, 4)] and found.name == "w" and found.record == {"tokens": 9}


def test_a_release_is_asked_of_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def pretrained(*words: str) -> SAE[Any]:
        asked.append(words)
        return tiny.topk(WIDTH, K)

    monkeypatch.setattr(SAE, "from_pretrained", pretrained)
    assert opened("gemma-scope:layer_20/width_16k").name == "gemma-scope:layer_20/width_16k"
    assert asked == [("gemma-scope", "layer_20/width_16k")]


def test_the_digest_follows_weights_and_configuration(tmp_path: Path) -> None:
    one, same, other, wider = (tiny.topk(WIDTH, K), tiny.topk(WIDTH, K),
                               tiny.topk(WIDTH, K, seed=1), tiny.topk(WIDTH, K + 1))
    digests = [opened(saved(sae, tmp_path / str(i))).digest
               for i, sae in enumerate((one, same, other, wider))]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def one_sentence(ref: object) -> str:
    with pytest.raises(DarkmatterError) as error:
        opened(ref)
    said = str(error.value)
    assert "\n" not in said and len(said) < 500
    return said


@pytest.mark.parametrize("size", ["", "big", "4096", "4096x", "4096x32x1", "4096 32"])
def test_a_malformed_size_to_train(size: str) -> None:
    assert "write it as 'train:4096x32'" in one_sentence(f"train:{size}")


@pytest.mark.parametrize("size", ["0x4", "32x0", "-32x4", "32x64"])
def test_a_size_that_cannot_be(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "run", lambda *_, **__: pytest.fail("it went on to train"))
    assert f"train:{size}" in one_sentence(f"train:{size}")


def test_an_unknown_artifact_lists_those_there_are(shipped: Path) -> None:
    assert one_sentence("artifact:two") == "No SAE 'two' ships with this book; there are: one."


def test_a_damaged_artifact(shipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "artifacts/one.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "one.safetensors" in one_sentence("artifact:one")


def test_a_directory_that_holds_no_sae(tmp_path: Path) -> None:
    said = one_sentence(tmp_path)
    assert said.startswith(f"{tmp_path} is not an SAE directory that sae-lens reads")


def test_a_release_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretrained(*_: str) -> None:
        raise ValueError("Release none not found\nin a list")

    monkeypatch.setattr(SAE, "from_pretrained", pretrained)
    said = one_sentence("none:at-all")
    assert "'none:at-all' cannot be opened" in said and "Release none not found in a list" in said
    assert "give 'release:sae_id'" in one_sentence("no/such/directory")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["W_enc", "b_dec"])
def test_weights_that_are_not_finite(weight: str, value: float, tmp_path: Path) -> None:
    folder = saved(tiny.topk(WIDTH, K), tmp_path / "bad")
    state = load_file(folder / "sae_weights.safetensors")
    state[weight].view(-1)[7] = value
    save_file(state, folder / "sae_weights.safetensors")
    assert one_sentence(folder).startswith(f"{weight} of the SAE '{folder}' holds NaN or infinite "
                                           "values")


@pytest.mark.parametrize(("ref", "name"), [("artifact:one", "one"),
                                           ("artifact:suite/one", "one"),
                                           ("train:8x2", ""), ("artifacts/one", "")])
def test_the_name_that_an_artifact_was_trained_under(ref: str, name: str) -> None:
    assert artifacts.name_of(ref) == name
