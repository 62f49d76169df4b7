"""The command line: ``python -m darkmatter COMMAND``; each command hands over to its room."""

from __future__ import annotations

import argparse
import errno
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from . import __version__, outputs
from . import preset as presets
from .errors import DarkmatterError

Arguments = argparse.Namespace
PARTS = ("ladder", "elsewhere", "on_error")  # of the SAEs that a preset has trained
VECTORS = ("x", "sae", "error", "linear", "nonlinear")


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a mistake in what was asked, 130 interrupted."""
    arguments, rest = _parser().parse_known_args(words)
    if rest and arguments.command != "lab":  # jupyter's own options
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_warn, warnings.showwarning)
            arguments.do(arguments)
    except DarkmatterError as error:
        print(f"darkmatter: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print("darkmatter: The disk is full. Free some space, or set DARKMATTER_CACHE to another disk, and "
              "run the same command again to go on.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndarkmatter: Interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def _warn(others: Callable[..., None], message: Warning | str, category: type[Warning], file: str, *rest: Any) -> None:
    """This project's own warnings are for the reader of the terminal, without the line of code that gave them."""
    if category is UserWarning and Path(file).is_relative_to(Path(__file__).parent):
        print(f"darkmatter: {message}", file=sys.stderr)
    else:
        others(message, category, file, *rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m darkmatter", description="What an SAE's error is made of.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(do: Callable[[Arguments], None], default_preset: str = "") -> argparse.ArgumentParser:
        name, text = do.__name__.strip("_"), (do.__doc__ or "").splitlines()[0]
        new = commands.add_parser(name, help=text, description=text)
        new.set_defaults(do=do)
        if default_preset:
            new.add_argument("--preset", default=default_preset, help="a preset's name, or a YAML file")
        return new

    command(_presets)
    command(_plan, "smollm2").add_argument("--gpu", default="", help="a GPU to plan for, such as h100 (default: here)")
    for each in (_train, _ship):
        new = command(each, "smollm2")
        new.add_argument("--part", choices=PARTS, action="append",
                         help="only this part; give it again for more (default: all)")
        new.add_argument("--jobs", type=int, default=1, help="SAEs trained at a time, one process each (default: 1)")
    survey = command(_survey, "smollm2")
    survey.add_argument("--json", type=Path, help="also write the rows to this file")
    command(_converge, "smollm2")
    command(_vary, "smollm2")
    _decompose_options(command(_decompose))
    export = command(_export, "smollm2")
    export.add_argument("--out", type=Path, required=True, help="directory for one directory an SAE")
    book = command(_book, "smollm2")
    book.add_argument("--only", nargs="+", default=[], metavar="NAME",
                      help="run just these notebooks, build no pages")
    book.add_argument("-p", nargs=2, action="append", default=[], dest="parameters",
                      metavar=("NAME", "VALUE"), help="a parameter of the notebooks, as papermill takes it")
    book.add_argument("--jobs", type=int, help="notebooks at a time (default: 2, or 1 on a GPU)")
    book.add_argument("--record", action="store_true", help="also keep the outputs in artifacts/, for `read`")
    command(_read, "smollm2")
    run = command(_run)
    run.add_argument("grid", type=Path, help="a YAML file: presets, notebooks, layer, sae, parameters, slurm")
    run.add_argument("--backend", choices=("local", "slurm"), default="local", help="this machine, or a cluster")
    run.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or one; on Slurm: no limit)")
    check = command(_check, "smollm2")
    check.add_argument("--keep", action="store_true", help="make the last run the reference instead")
    command(_lab)
    command(_sync)
    return parser


def _decompose_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="a preset's name, a hub id or a model directory")
    parser.add_argument("--site", required=True, help="hook name, such as blocks.15.hook_resid_post")
    parser.add_argument("--sae", required=True,
                        help="release:sae_id, artifact:NAME, or a directory (sae-lens, dictionary_learning, sparsify)")
    parser.add_argument("--corpus", default="smollm2", help="a preset's name, 'pile', or a file")
    parser.add_argument("--contexts", type=int, help="number of contexts (default: the preset's)")
    parser.add_argument("--context-length", type=int, help="tokens in a context (default: the preset's)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--report", type=Path, help="also write a page about the SAE to this .html file")


def _presets(arguments: Arguments) -> None:
    """List the presets that come with the package."""
    for name in presets.names():
        preset = presets.load(name)
        print(f"{name:<12}{preset.model}, {preset.site}, {len(preset.saes)} SAEs, "
              f"{preset.contexts} contexts of {preset.context_length} tokens")


def _plan(arguments: Arguments) -> None:
    """Say what a run will need before it starts."""
    from . import plan

    for line in plan.lines(presets.load(arguments.preset), arguments.gpu):
        print(line)


def _train(arguments: Arguments) -> None:
    """Train the preset's SAEs, going on from checkpoints."""
    _trained(arguments)


def _trained(arguments: Arguments, ship: bool = False) -> dict[str, Path]:
    """Directories of the SAEs of the parts asked for; of those on the error, only two ship."""
    from . import onerror, training

    preset = presets.load(arguments.preset)
    jobs = arguments.jobs
    shipped: dict[str, Any] = {"seeds": (0,), "targets": tuple(preset.on_error)} if ship else {"longer": True}
    parts = {"ladder": lambda: training.run(preset, jobs=jobs), "elsewhere": lambda: training.elsewhere(preset, jobs),
             "on_error": lambda: onerror.run(preset, **shipped, jobs=jobs)}
    found = {name: folder for part in arguments.part or PARTS for name, folder in parts[part]().items()}
    if not ship and "on_error" in (arguments.part or PARTS) and preset.name == presets.DEFAULT:
        onerror.collect(preset)
    return found


def _survey(arguments: Arguments) -> None:
    """Decompose the error of every SAE of a preset."""
    from . import records, survey

    if arguments.json:
        outputs.check(arguments.json, [arguments.preset])
    rows = survey.run(presets.load(arguments.preset)).rows
    if arguments.json:
        _write(arguments.json, {"rows": rows.to_dict("records"), "provenance": records.provenance("auto")})
    print(rows.to_string(index=False))


def _converge(arguments: Arguments) -> None:
    """Survey the checkpoints of the preset's SAEs: how their error changed with training."""
    from . import convergence

    print(convergence.collect(presets.load(arguments.preset)))


def _vary(arguments: Arguments) -> None:
    """Survey the default SAE again with other choices: what moves the results."""
    from . import sensitivity

    print(sensitivity.collect(presets.load(arguments.preset)))


def _decompose(arguments: Arguments) -> None:
    """Decompose the error of one SAE and print a table."""
    from . import decomposition, records

    names = ("model", "site", "sae", "corpus", "contexts", "context_length")
    asked = {name: getattr(arguments, name) for name in names}
    for path in filter(None, (arguments.json, arguments.report)):
        outputs.check(path, [arguments.model, arguments.sae.partition(":")[2], arguments.sae, arguments.corpus])
    result = decomposition.decompose(**asked)
    if arguments.json:
        _write(arguments.json, result | {"provenance": records.provenance("auto")})
    if arguments.report:
        from . import report

        report.write(arguments.report, decomposition.settings(**asked), result)
    print(table(result))


def _ship(arguments: Arguments) -> None:
    """Train what is missing and pack the preset's SAEs, 8 bits a weight: into artifacts/, or artifacts/PRESET/."""
    from . import saes

    preset = presets.load(arguments.preset)
    suite = saes.ARTIFACTS / ("" if preset.name == presets.DEFAULT else preset.name)
    suite.mkdir(exist_ok=True)
    refs = [*preset.saes, *preset.elsewhere.values(), *preset.on_error.values()]
    named = {saes.artifact_name(ref) for ref in refs} - {""}
    for name, folder in _trained(arguments, ship=True).items():
        if name in named or not named:  # a preset that names none ships all that it trains
            saes.ship(folder, suite / f"{name}.safetensors")


def _export(arguments: Arguments) -> None:
    """Write the preset's SAEs as directories that sae_lens.SAE.load_from_disk reads."""
    from . import saes

    saes.export(presets.load(arguments.preset), arguments.out)


def _book(arguments: Arguments) -> None:
    """Run the notebooks and build the book."""
    from . import book

    given = {name: yaml.safe_load(value) for name, value in arguments.parameters}
    book.build(arguments.preset, arguments.only, given, jobs=arguments.jobs, record=arguments.record)


def _read(arguments: Arguments) -> None:
    """Build the book as it was last recorded; nothing is run."""
    from . import recorded, records

    recorded.build(arguments.preset, records.HOME)


def _run(arguments: Arguments) -> None:
    """Run every combination of a grid file that is not finished yet."""
    from . import grid

    grid.run(arguments.grid, arguments.backend, arguments.jobs)


def _check(arguments: Arguments) -> None:
    """Compare the numbers of the last run with the reference's; exit code 1 where any differs."""
    from . import records, reference

    if arguments.keep:
        found = [each for each in records.load_all() if each["preset"] == arguments.preset]
        print(f"{len(reference.keep(found))} records kept as the reference of {arguments.preset}")
        return
    rows = reference.check(arguments.preset)
    for row in rows.to_dict("records"):
        print(f"{row['verdict']:<7}{row['notebook']:<15}{row['value']:>12.4g}{row['reference']:>12.4g} "
              f"±{row['tolerance']:<10.2g}{row['name']} {row['sae']}")
    print(f"{(rows.verdict == 'agree').sum()} of {len(rows)} agree. Columns: verdict, chapter, this run, reference, "
          f"tolerance ({reference.INTERVAL}; {reference.NO_INTERVAL}), metric, SAE.")
    if (rows.verdict == "differ").any():
        sys.exit(1)


def _lab(arguments: Arguments) -> None:
    """Open JupyterLab on the notebooks; further options go to it."""
    from . import pairs, records

    pairs.lab(records.HOME, arguments.rest)


def _sync(arguments: Arguments) -> None:
    """Bring both halves of each notebook together and strip outputs."""
    from . import pairs, records

    print(f"{len(pairs.sync(records.HOME / 'notebooks'))} pairs in sync")


def table(result: dict[str, Any]) -> str:
    """The result of ``decompose`` as text: each metric with its 95% interval, '–' for no number."""
    names = {"l0": "L0", "dead_share": "share of dead latents", "fvu": "FVU",
             "fvu_nonlinear": "FVU_nonlinear", "r2_vector": "R² of the error vector",
             "r2_vector_weighted": "  weighted by variance", "r2_norm": "R² of the squared error norm"}
    ends = result["intervals"]
    tests = ends.get("norm_test", {})
    rows = [(text, result[name], ends.get(name)) for name, text in names.items()]
    rows += [(f"norm test of {name}", result["norm_test"][name], tests.get(name)) for name in VECTORS]
    lines = [f"{text:<32}{_number(value):>10}   {_interval(interval)}" for text, value, interval in rows]
    said: dict[str, list[str]] = {}
    for name, note in result.get("notes", {}).items():
        said.setdefault(note, []).append(name)
    notes = [f"{', '.join(names)}: {note}" for note, names in said.items()]
    return "\n".join([f"{'':<32}{'value':>10}   95% interval", *lines,
                      f"fitted on {result['n_fit']:,} tokens, scored on {result['n_eval']:,}", *notes])


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _interval(ends: list[float] | None) -> str:
    return f"[{_number(ends[0])}, {_number(ends[1])}]" if ends else "–"


def _write(path: Path, value: Any) -> None:
    from . import records

    outputs.write_json(path, records.plain(value))


if __name__ == "__main__":
    sys.exit(main())
