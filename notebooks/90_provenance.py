# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,mystnb,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What this build ran on
#
# The numbers in this book come from notebooks that were run, and every run leaves a
# {term}`record`: its settings, results, versions, machine and time. This page reads the records of
# the build that it is part of. A notebook whose code, settings and data have not changed is not
# run again, so different rows can be of different days.
#
# Not everything was measured in this build. Some results take hours, or a GPU, and were measured
# before: the SAEs on the error and their seeds ({doc}`08_on_error`), checkpoints
# ({doc}`15_training`), other choices ({doc}`16_sensitivity`) and speed ({doc}`17_speed`). Those
# chapters read records in `artifacts/`, and say so.

# %% tags=["parameters"]
preset: str = "smoke"  # preset name or YAML file

# %%
import importlib.metadata

import pandas as pd

from darkmatter.book import figures, records

run = records.start("90_provenance", preset)
runs = [record for record in records.load_all()
        if record["preset"] == run.preset.name and record["notebook"] != run.notebook]


def distinct(key: str) -> list[str]:
    """The different values of one field over all records, in order of appearance."""
    return list(dict.fromkeys(str(record.get(key)) for record in runs))


def merged(key: str) -> dict[str, str]:
    """The entries of a field that is a mapping; where records differ, all values."""
    values: dict[str, dict[str, None]] = {}
    for record in runs:
        for name, value in record[key].items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(different) for name, different in values.items()}


# %%
times = pd.DataFrame(
    [(record["notebook"], record["started"][:16].replace("T", " "),
      float(record.get("wall_seconds", record["seconds"])), float(record["peak_memory_gib"]),
      record["device"], len(record["metrics"])) for record in runs],
    columns=["notebook", "began (UTC)", "seconds", "peak memory, GiB", "device",
             "results recorded"])
words = (f"No other notebook of the preset `{run.preset.name}` has been run here yet. `make book` "
         "runs all of them.")
if runs:
    commits = ", ".join(f"`{commit[:12]}`" for commit in distinct("commit") if commit != "None")
    dirty = ", ".join(record["notebook"] for record in runs if record["dirty"])
    changes = "nothing uncommitted"
    if dirty:
        changes = f"not committed were changes at the time of {dirty}"
    commit = f"Commit: {commits}; {changes}." if commits else "The commit is not known."
    words = f"""
    The preset is **`{run.preset.name}`**. Its {len(runs)} notebooks took
    {times['seconds'].sum() / 60:.1f} minutes together. The first began at
    {times['began (UTC)'].min()}, the last at {times['began (UTC)'].max()} (UTC). The one that
    needed most memory used {times['peak memory, GiB'].max():.1f} GiB. {commit}
    """
figures.prose(words)

# %% tags=["hide-input"]
figures.table(
    times, "Time and memory of each notebook. Seconds are of the whole notebook with its imports, "
    "as the runner saw it, and include waiting for what it needed first: the first to need an SAE "
    "or activations makes them, for all. Unless asked otherwise, the runner has two notebooks run "
    "at a time, each on half of the processor.", "tab-times",
    digits={"seconds": 0, "peak memory, GiB": 1})

# %% [markdown]
# ## Machine and versions

# %% tags=["hide-input"]
here = records.provenance(run.preset.device)
machine = merged("hardware") if runs else here["hardware"]
names = {"memory_gib": "memory, GiB"}
figures.table(
    pd.DataFrame([(names.get(name, name), str(value)) for name, value in machine.items()],
                 columns=["", "value"]),
    "The machine." if runs else "The machine this page ran on.", "tab-machine")


# %%
def installed(package: str) -> str:
    """The version of a package here."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


lines = (records.HOME / "requirements-text.txt").read_text(encoding="utf-8").splitlines()
carriers = [line.split("==")[0] for line in lines if "==" in line]  # they hold model and text
versions = merged("versions") if runs else here["versions"]
rows = [(name, version, "code") for name, version in versions.items()]
rows += [(name, installed(name), "model or text") for name in carriers]
figures.table(
    pd.DataFrame(rows, columns=["package", "version", "used as"]),
    "Versions that the numbers depend on. All packages are pinned in `requirements.txt` and, with "
    "hashes, in `requirements-text.txt`.", "tab-versions")

# %% [markdown]
# ## Settings and data

# %%
settings = run.preset.fields()
training = settings.pop("training")
settings |= {f"training.{name}": value for name, value in training.items()}


def shown(value: object) -> str:
    """A setting as it would stand in a file, in one table cell."""
    if isinstance(value, tuple | list):
        return ", ".join("×".join(map(str, entry)) if isinstance(entry, tuple | list)
                         else f"`{entry}`" for entry in value) or "–"
    return "the rule" if value is None else f"`{value}`"


figures.table(
    pd.DataFrame([(f"`{name}`", shown(value)) for name, value in settings.items()],
                 columns=["field", "value"]),
    f"All fields of the preset `{run.preset.name}`. A notebook's own parameters are in its first "
    "cell.", "tab-settings")

# %% tags=["hide-input"]
hashes = merged("data_hashes") if runs else records.inputs(run.preset)
figures.table(
    pd.DataFrame([(f"`{name}`", ", ".join(f"`{digest[:16]}`" for digest in value.split(", ")))
                  for name, value in hashes.items()],
                 columns=["input", "sha256, first 16 digits"]),
    "The files that model, text and SAEs come from. The wheels of model and text are known by the "
    "hashes in `requirements-text.txt`, so by the hash of that file. SAEs that are trained on the "
    "spot follow from the settings.", "tab-hashes")

# %%
run.add("notebooks", len(runs), unit="records read")
record = run.finish()
