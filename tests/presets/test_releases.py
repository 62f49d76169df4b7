"""SAEs that others released, chosen by rule from sae-lens's own directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.presets import releases

SCOPE = "gemma-scope-9b-pt-res"


def ids(*rule: object) -> list[str]:
    return [ref.split(":", 1)[1] for ref in releases.pick(*rule)]  # type: ignore[arg-type]


def test_of_each_width_the_l0_nearest_to_the_goal() -> None:
    found = ids(SCOPE, 20, "", 60)
    widths = ["16k", "32k", "65k", "131k", "262k", "524k", "1m"]
    assert [name.split("/")[1] for name in found] == [f"width_{width}" for width in widths]
    listed = get_pretrained_saes_directory()[SCOPE].saes_map
    for name in found:
        place, own = name.rsplit("_", 1)
        others = [int(each.rsplit("_", 1)[1]) for each in listed if each.rsplit("_", 1)[0] == place]
        assert abs(int(own) - 60) == min(abs(other - 60) for other in others)


def test_every_l0_of_a_width_from_sparse_to_dense() -> None:
    l0s = [int(name.rsplit("_", 1)[1]) for name in ids(SCOPE, 20, "16k")]
    assert l0s == sorted(l0s)
    assert len(l0s) > 4


def test_the_published_ladder_of_gpt2_is_eight_doublings() -> None:
    widths = [int(name.rsplit("_", 1)[1]) for name in ids("gpt2-small-res-jb-feature-splitting", 8)]
    assert widths == [768 * 2**i for i in range(8)]


def test_a_second_seed_is_an_sae_of_its_own() -> None:
    found = ids("gemma-scope-2-270m-pt-res", 12, "", 60)
    assert len([name for name in found if "262k" in name]) == 2
    assert all("medium" in name for name in found)


def test_widths_by_their_letters() -> None:
    sizes = {"768": 768, "16k": 2**14, "1m": 2**20, "8x": 8, "65k": 2**16, "262k-seed_1": 2**18}
    assert {width: releases.size(width) for width in sizes} == sizes


@pytest.mark.parametrize(("rule", "sentence"), [
    (("gemma-scope-9b-pt-rez", 20), "there are gemma-scope-9b-pt-res"),
    ((SCOPE, 99), "it has layers"),
    ((SCOPE, 20, "17k"), "layer 20 has the widths 16k, 32k"),
])
def test_what_is_not_there_gets_one_sentence(rule: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(DarkmatterError) as told:
        releases.pick(*rule)  # type: ignore[arg-type]
    assert sentence in str(told.value)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_valid_and_its_saes_are_known(name: str) -> None:
    """SAEs of a release read the preset's model, and each site's SAE is of that site's layer."""
    preset = presets.load(name)
    known = get_pretrained_saes_directory()
    for site, ref in [*((preset.site, ref) for ref in preset.saes), *preset.elsewhere.items()]:
        release, _, sae_id = ref.partition(":")
        if release in known:
            reads = releases.model_of(release).rsplit("/", 1)[-1].replace("gpt2-small", "gpt2")
            assert reads == preset.model.rsplit("/", 1)[-1]
            assert sae_id in known[release].saes_map
            assert releases.read_id(sae_id, {})[0] == int(site.split(".")[1])


def test_a_rule_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rule = "{release: gemma-scope-2b-pt-res, layer: 12, width: 16k, l0: %s}"
    text = "model: google/gemma-2-2b\nsite: blocks.12.hook_resid_post\nsaes: [" + rule % 60 + "]\n"
    path.write_text(text)
    assert presets.load(path).saes == tuple(releases.pick("gemma-scope-2b-pt-res", 12, "16k", 60))
    path.write_text(text + "default_sae: {release: gemma-scope-2b-pt-res, layer: 12}\n")
    with pytest.raises(DarkmatterError, match="pick one SAE"):
        presets.load(path)
    path.write_text(text.replace("layer: 12, ", ""))
    with pytest.raises(DarkmatterError, match="a rule of release, layer, width and l0"):
        presets.load(path)
