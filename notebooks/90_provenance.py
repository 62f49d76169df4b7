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
# Every number in this book comes from a notebook that was run, and every run leaves a {term}`record`: its settings,
# results, versions, machine and time. This page reads the records of the build that it is part of. A notebook
# whose code, settings and data have not changed is not run again, so different rows can be of different days.

# %% tags=["parameters"]
preset: str = "smoke"  # preset name or YAML file

# %% tags=["hide-input"]
import importlib.metadata

import pandas as pd

from darkmatter import figures, records

run = records.start("90_provenance", preset)
found = [each for each in records.load_all() if each["preset"] == run.preset.name and each["notebook"] != run.notebook]


def distinct(key: str) -> list[str]:
    """The different values of one field over all records, in order of appearance."""
    return list(dict.fromkeys(str(each.get(key)) for each in found))


def merged(key: str) -> dict[str, str]:
    """The entries of a field that is a mapping; where records differ, all values."""
    names = dict.fromkeys(name for each in found for name in each[key])
    return {name: ", ".join(dict.fromkeys(str(each[key][name]) for each in found if name in each[key])) for name in names}


# %% tags=["hide-input"]
words = f"No other notebook of the preset `{run.preset.name}` has been run here yet. `make book` runs all of them."
if found:
    seconds = sum(each.get("wall_seconds", each["seconds"]) for each in found)
    began = [when[:16].replace("T", " ") for when in sorted(distinct("started"))]
    commits = ", ".join(f"`{commit[:12]}`" for commit in distinct("commit") if commit != "None")
    dirty = ", ".join(each["notebook"] for each in found if each["dirty"])
    state = f"Commit: {commits}; {f'not committed were changes at the time of {dirty}' if dirty else 'nothing uncommitted'}."
    words = f"""
    The preset is **`{run.preset.name}`**. Its {len(found)} notebooks took {seconds / 60:.1f} minutes together. The first
    began at {began[0]}, the last at {began[-1]} (UTC). The one that needed most memory used
    {max(each["peak_memory_gib"] for each in found):.1f} GiB. {state if commits else "The commit is not known."}
    """
figures.prose(words)

# %% tags=["hide-input"]
times = pd.DataFrame(
    [(each["notebook"], each["started"][:16].replace("T", " "), float(each.get("wall_seconds", each["seconds"])),
      float(each["peak_memory_gib"]), each["device"], len(each["metrics"])) for each in found],
    columns=["notebook", "began (UTC)", "seconds", "peak memory, GiB", "device", "results recorded"],
)
figures.table(
    times,
    caption="Time and memory of each notebook. Seconds are of the whole notebook with its imports, as the runner saw it, "
    "and include waiting for what it needed first: the first to need an SAE or activations makes them, for all. "
    "Unless asked otherwise, the runner has two notebooks run at a time, each on half of the processor.",
    name="tab-times",
    digits={"seconds": 0, "peak memory, GiB": 1},
)

# %% [markdown]
# ## Machine and versions

# %% tags=["hide-input"]
machine = merged("hardware") if found else records.provenance(run.preset.device)["hardware"]
labels = {"processor": "processor", "cores": "cores", "memory_gib": "memory, GiB", "system": "system"}
figures.table(
    pd.DataFrame([(labels.get(name, name), str(value)) for name, value in machine.items()], columns=["", "value"]),
    caption="The machine." if found else "The machine this page ran on.",
    name="tab-machine",
)


# %% tags=["hide-input"]
def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


lines = (records.HOME / "requirements-text.txt").read_text(encoding="utf-8").splitlines()
carriers = [line.split("==")[0] for line in lines if "==" in line]  # the packages that hold the model and the text
versions = merged("versions") if found else records.provenance(run.preset.device)["versions"]
rows = [(name, version, "code") for name, version in versions.items()]
rows += [(name, installed(name), "model or text") for name in carriers]
figures.table(
    pd.DataFrame(rows, columns=["package", "version", "used as"]),
    caption="Versions that the numbers depend on. All packages are pinned in `requirements.txt` and, with hashes, in "
    "`requirements-text.txt`.",
    name="tab-versions",
)

# %% [markdown]
# ## Settings and data

# %% tags=["hide-input"]
settings = run.preset.fields()
training = settings.pop("training")
flat = settings | {f"training.{name}": value for name, value in training.items()}


def shown(value: object) -> str:
    """A setting as it would stand in a file, in one table cell."""
    if isinstance(value, tuple | list):
        return ", ".join("×".join(map(str, each)) if isinstance(each, tuple | list) else f"`{each}`" for each in value) or "–"
    return "the rule" if value is None else f"`{value}`"


figures.table(
    pd.DataFrame([(f"`{name}`", shown(value)) for name, value in flat.items()], columns=["field", "value"]),
    caption=f"All fields of the preset `{run.preset.name}`. A notebook's own parameters are in its first cell.",
    name="tab-settings",
)

# %% tags=["hide-input"]
hashes = merged("data_hashes") if found else records.inputs(run.preset)
figures.table(
    pd.DataFrame([(f"`{name}`", ", ".join(f"`{each[:16]}`" for each in value.split(", "))) for name, value in hashes.items()],
                 columns=["input", "sha256, first 16 digits"]),
    caption="The files that model, text and SAEs come from. The wheels of model and text are known by the hashes in "
    "`requirements-text.txt`, so by the hash of that file. SAEs that are trained on the spot follow from the settings.",
    name="tab-hashes",
)

# %%
run.add("notebooks", len(found), unit="records read")
record = run.finish()
