"""Several notebooks at a time: order, failures, and what each kernel is told."""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from darkmatter.book import execution, keys, remaining, runner
from darkmatter.errors import DarkmatterError
from darkmatter.presets import preset
from tests.conftest import write_notebook


def test_results_come_in_order_and_so_many_run_at_a_time() -> None:
    now, most, lock = [0], [0], threading.Lock()

    def one(number: int) -> int:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05 if number % 2 else 0.1)
        with lock:
            now[0] -= 1
        return number

    assert execution.side_by_side([partial(one, i) for i in range(7)], 3) == list(range(7))
    assert most[0] == 3
    assert execution.side_by_side([], 3) == []


def test_after_a_failure_none_is_begun_and_what_had_begun_ends() -> None:
    begun, ended = [], []

    def one(number: int) -> None:
        begun.append(number)
        if number == 0:
            time.sleep(0.1)
            raise DarkmatterError("the first failed")
        time.sleep(0.3)
        ended.append(number)

    with pytest.raises(DarkmatterError, match="the first failed"):
        execution.side_by_side([partial(one, i) for i in range(6)], 2)
    assert sorted(begun) == [0, 1]
    assert ended == [1]


def test_each_kernel_has_variables_of_its_own_and_is_this_very_python() -> None:
    one, other = (execution.kernel_manager({"COLOUR": name})() for name in ("red", "blue"))
    assert one.kernel_spec and other.kernel_spec
    assert (one.kernel_spec.env, other.kernel_spec.env) == ({"COLOUR": "red"}, {"COLOUR": "blue"})
    assert one.kernel_spec.argv[0] == sys.executable


@pytest.mark.slow
def test_notebooks_run_side_by_side_after_the_first(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two wait for one another, which only works at the same time."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = """\
import os, pathlib, time
me, other = {me!r}, {other!r}
here = pathlib.Path({home!r})
(here / me).write_text(os.environ.get("OMP_NUM_THREADS", "all"))
end = time.monotonic() + 120
while other and not (here / other).exists():
    assert time.monotonic() < end, "the other never came"
    time.sleep(0.05)
pathlib.Path(os.environ["DARKMATTER_RECORD"]).write_text('{{"notebook": "' + me + '"}}')"""
    for me, other in (("01_one", ""), ("02_two", "03_three"), ("03_three", "02_two")):
        write_notebook(home / "notebooks", me, meet.format(me=me, other=other, home=str(home)))
    count = "import os  # load_all\nprint(len(os.listdir(os.environ['DARKMATTER_RECORDS'])))"
    write_notebook(home / "notebooks", "00_last", count)
    runner.build("smoke", ["01_one", "02_two", "03_three", "00_last"], home=home, jobs=2)
    half = str(max(1, (os.cpu_count() or 1) // 2))
    threads = [(home / name).read_text() for name in ("01_one", "02_two", "03_three")]
    assert threads == ["all", half, half]
    executed = next(home.glob("_build/runs/smoke/00_last/*/executed.ipynb")).read_text()
    assert '"3\\n"' in executed
    for name in ("02_two", "03_three"):  # each wrote its own record
        record = home / "_build" / "records" / "smoke" / f"{name}.json"
        assert f'"notebook": "{name}"' in record.read_text()


@pytest.mark.slow
def test_keys_are_made_while_others_are(home: Path) -> None:
    """CPython's parser fails in threads ('AST constructor recursion depth mismatch') at once."""
    code = "\n".join("from darkmatter import survey, progress\n"
                     f"x{i} = [{i}, ({i}, {{'a': {i}}})]" for i in range(400))
    sources = [write_notebook(home / "notebooks", f"{i:02d}_one", code) for i in range(8)]
    chosen = preset.load("smoke")

    def one(source: Path) -> str:
        return keys.run_key(source, chosen, {})

    found = execution.side_by_side([partial(one, source) for source in sources * 3], 6)
    assert found[:8] == found[8:16] == found[16:]


@pytest.mark.slow
def test_cells_are_counted_with_the_parameters(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(remaining.Part, "at", lambda part, *cells: told.append(cells))
    write_notebook(home / "notebooks", "01_one", "1")
    runner.build("smoke", ["01_one"], home=home)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # prose, parameters, those given, the code


@pytest.mark.slow
def test_a_notebook_says_how_far_its_loops_are(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the line while the loop runs; none of it is in the notebook."""
    code = """\
import time
from darkmatter import progress
for _ in progress.bar(range(4), "waiting", "naps"):
    time.sleep(1.2)"""
    write_notebook(home / "notebooks", "01_one", code)
    said, told = [], remaining.Line.told
    monkeypatch.setattr(remaining.Line, "_in_a_log", lambda line, stop, _: [
        said.append(told(line)) for _ in iter(lambda: stop.wait(0.3), True)])
    runner.build("smoke", ["01_one"], home=home)
    assert any("01_one 1 of 1 · cell 4 of 4 · waiting 2 of 4 naps · " in line for line in said)
    executed = next(home.glob("_build/runs/smoke/01_one/*/executed.ipynb"))
    assert "output_type" not in executed.read_text()


def test_a_healthy_run_is_not_interrupted(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even a kernel that is still busy with an answer that it sent as it is asked to end."""
    code = """\
import time
kernel = get_ipython().kernel
answer = kernel.shell_handlers["kernel_info_request"]
async def slowly(*words):
    await answer(*words)
    time.sleep(1)
kernel.shell_handlers["kernel_info_request"] = slowly"""
    write_notebook(home / "notebooks", "01_one", code)
    runner.build("smoke", ["01_one"], home=home)
    assert "KeyboardInterrupt" not in capfd.readouterr().err
