"""A survey in shards: the same numbers as a single run, by any number of processes, whoever dies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from darkmatter import products, shards, survey
from darkmatter.activations import Activations
from darkmatter.errors import DarkmatterError
from darkmatter.products import CodedError
from darkmatter.regression import PROTOCOLS, Moments
from darkmatter.shards import Shard, Sharded
from tests import tiny, torture
from tests.test_torture_short import SURVEY, toy  # noqa: F401

pytestmark = pytest.mark.usefixtures("own_cache")
LENGTHS = [30 + (7 * i) % 23 for i in range(60)]


def part_of(acts: Activations, shard: Shard) -> Activations:
    text = acts.text
    own = replace(text, tokens=text.tokens[shard.contexts], source=text.source[shard.contexts])
    return Activations(acts.x[shard.rows], acts.context[shard.rows] - shard.contexts.start, acts.position[shard.rows],
                       own, f"{acts.key}-{shard.contexts}")


@pytest.fixture
def refs(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Two SAEs on activations of contexts of unequal length; blocks of a few hundred rows."""
    acts = tiny.acts(lengths=LENGTHS)
    monkeypatch.setattr(survey, "ROWS", 300)
    monkeypatch.setattr(shards, "cheaper", lambda *sizes: False)  # else shards of a group at least: this text is one
    monkeypatch.setattr(shards, "_places", lambda *_: replace(acts, x=acts.x[:0]))
    monkeypatch.setattr(Sharded, "_read", lambda self, shard: part_of(acts, shard))
    return tiny.surveyed(monkeypatch, acts, tiny.loaded("top", tiny.topk()),
                         tiny.formula("half", lambda x: 0.5 * x + x.sin()))


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("through_codes", [False, True])
def test_shards_add_up_to_a_single_run(protocol: str, count: int, through_codes: bool, refs: tuple[str, ...],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for room in (survey, shards):
        monkeypatch.setattr(room, "cheaper", lambda *sizes: through_codes)
    for room in (products, shards):
        monkeypatch.setattr(room, "GROUP", 2)
    monkeypatch.setattr(CodedError, "columns", lambda *given, own=CodedError.columns: used.append("") or own(*given))
    preset = tiny.preset()
    single = survey.run(preset, refs, [protocol]).rows
    alone = len(used)
    merged = shards.run(preset, count, refs, protocol)
    assert bool(alone) == bool(len(used) - alone) == through_codes, "both, or neither"
    assert list(merged.columns) == list(single.columns)
    words: list[str] = ["sae", "metric", "protocol", "n_fit", "n_eval", "sources", "note"]
    for column in words:
        assert list(merged[column]) == list(single[column])
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(merged[column].astype(float), single[column].astype(float), rtol=0, atol=1e-9)


def test_other_blocks_give_other_roundings(refs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Why shards are cut where blocks begin, and moments are shifted alike: without, 1e-9 is not reached."""
    preset = tiny.preset()
    single = survey.run(preset, refs).rows
    monkeypatch.setattr(shards._Part, "_moments", lambda self: Moments())
    merged = shards.run(preset, 7, refs)
    apart = (merged.value.astype(float) - single.value.astype(float)).abs().max()
    assert 1e-9 < apart < 1e-4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shards_are_cut_between_blocks_and_hold_every_context(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "ROWS", 100 // survey.MORE.get(device, 1))
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts = np.concatenate([[0], rng.integers(0, 160, rng.integers(1, 30)).cumsum()])
        edges, count = shards.blocks(starts, device), int(rng.integers(1, 9))
        found = shards.cut(starts, count, device=device)
        assert len(found) <= count
        assert [each.contexts.start for each in found] == [0, *(each.contexts.stop for each in found[:-1])]
        assert found[-1].contexts.stop == len(starts) - 1
        assert {each.contexts.stop for each in found} <= set(edges)
        assert all((each.rows.start, each.rows.stop) == (starts[each.contexts.start], starts[each.contexts.stop])
                   for each in found)


def test_a_shard_that_is_done_is_not_done_again(refs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill: the files of some shards are there, and one of them is damaged."""
    preset, made = tiny.preset(), []
    first = shards.run(preset, 3, refs)
    folder = next((shards.cache.root() / "shards").iterdir())
    one, two = sorted(folder.glob("one-*.safetensors"))[:2]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-1])
    measure = Sharded._one
    monkeypatch.setattr(Sharded, "_one", lambda self, shard: made.append(shard) or measure(self, shard))
    monkeypatch.setattr(Sharded, "_two", lambda *_: pytest.fail("it was done"))
    with pytest.warns(UserWarning, match="damaged"):
        again = shards.run(preset, 3, refs)
    assert len(made) == 2
    pd.testing.assert_frame_equal(first, again)


@pytest.mark.parametrize(("asked", "sentence"), [({"shards": 0}, "at least 1"), ({"protocol": "x"}, "no protocol 'x'")])
def test_a_mistake_is_told(asked: dict[str, object], sentence: str, refs: tuple[str, ...]) -> None:
    with pytest.raises(DarkmatterError, match=sentence):
        shards.run(**{"preset": tiny.preset(), "shards": 2, "refs": refs} | asked)  # type: ignore[arg-type]


CALL = SURVEY.rsplit("\n", 1)[0] + """
from pathlib import Path
from darkmatter import preset, shards, survey
survey.ROWS = 400
chosen = preset.load(sys.argv[1])
rows = survey.run(chosen).rows if sys.argv[2] == "0" else shards.run(chosen, int(sys.argv[2]))
rows.to_json(sys.argv[3])"""


@pytest.mark.slow
def test_two_processes_share_the_shards_of_a_real_model(toy: Path, tmp_path: Path) -> None:  # noqa: F811
    place = torture.Place(tmp_path / "both")
    place.clear()
    outs = [tmp_path / f"{i}.json" for i in range(3)]
    both = [place.start(["-c", CALL, str(toy), "4", str(out)]) for out in outs[:2]]
    assert [each.wait(600) for each in both] == [0, 0], (place.folder / "log.txt").read_text()[-2000:]
    place.finish(["-c", CALL, str(toy), "0", str(outs[2])])
    one, other, single = (pd.read_json(out) for out in outs)
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(one[column].astype(float), single[column].astype(float), rtol=0, atol=1e-9)
    said = (place.folder / "log.txt").read_text()
    assert said.count("activations: ") >= 6  # of the training text, of four shards and of the whole
