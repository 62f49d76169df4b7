"""An experiment as one frozen, validated dataclass, read by name or from a YAML file's path."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ..errors import DarkmatterError

DEFAULT = "smollm2"  # the preset of the book as it ships
FOLDER = Path(__file__).parent
CONFIG = ConfigDict(extra="forbid")

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _expanded(place: Any) -> Any:
    """A path that begins with ~ as the path it stands for."""
    return str(Path(place).expanduser()) if str(place).startswith("~") else place


Place = Annotated[Text, BeforeValidator(_expanded)]


def _named(entries: Any) -> Any:
    """SAEs as 'release:sae_id'; a rule, {release: …, layer: 12, l0: 60}, becomes those it picks."""
    refs: list[Any] = []
    for entry in entries if isinstance(entries, list | tuple) else [entries]:
        refs += _picked(entry) if isinstance(entry, dict) else [entry]
    return list(dict.fromkeys(refs))


def _picked(rule: dict[str, Any]) -> tuple[str, ...]:
    from . import releases

    required, known = {"release", "layer"}, {"release", "layer", "width", "l0"}
    if wrong := rule.keys() - known or required - rule.keys():
        raise ValueError("be a rule of release, layer, width and l0, the first two always (not: "
                         f"{', '.join(wrong)})")
    return releases.pick(str(rule["release"]), rule["layer"],
                         str(rule.get("width", "")), rule.get("l0", 0))


def _one(entry: Any) -> Any:
    """The SAE that a rule picks, when it is one."""
    refs = _named(entry)
    if len(refs) != 1:
        raise ValueError(f"pick one SAE, and picks {len(refs)}; give a width or an l0 too")
    return refs[0]


Names = Annotated[tuple[Text, ...], BeforeValidator(_named)]
Name = Annotated[str, BeforeValidator(_one)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Training:
    """How the ladder's SAEs are trained: one recipe for all, on one shared activation stream."""

    grid: tuple[tuple[Positive, Positive], ...] = ()
    """(width, L0) of each SAE that ``train`` makes at the preset's site."""
    repeats: tuple[tuple[Positive, Positive], ...] = ()
    """(width, L0) of those trained with the next two seeds as well, for the spread over seeds."""
    elsewhere: tuple[Positive, Positive] = (4096, 32)
    """(width, L0) of the SAEs at other sites."""
    on_error: tuple[Positive, Positive] = (2048, 32)
    """(width, L0) of the SAEs trained on parts of the error."""
    tokens: Positive = 4_000_000
    """Training tokens each SAE sees, repeats included."""
    distinct_tokens: Positive = 2_000_000
    """Different tokens among them; tokens / distinct_tokens is the number of epochs."""
    distinct_elsewhere: Positive | None = None
    """Different tokens that SAEs at other sites and on the error see; none: as the ladder's."""
    clear: bool = True
    """Whether the text is kept clear of runs of 32 tokens that the evaluation text has, and may be
    filled up from further domains; SAEs that were trained before this rule have false."""
    batch: Positive = 4096
    """Tokens in a training step."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-4
    """Peak learning rate of Adam."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    decay: Share = 0.2
    """Share of the steps, the last ones, over which the learning rate falls to 0."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the activations."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Preset:
    """Everything that one experiment depends on."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """What the results are filed under: letters, digits, '-', '_' and '.'."""
    model: Place
    """'smollm2' or 'gemma-3-270m-q4' (Python packages, offline), a hub id, or a directory."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the model runs in; auto: bfloat16 where the device is faster in it, else float32."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto (the first there is of cuda, mps, cpu), cpu, cuda, cuda:N or mps."""
    prepend_bos: bool = False
    """Whether each context begins with the tokenizer's beginning-of-text token."""
    corpus: Place = "mix"
    """'mix' (built in, offline), 'pile', or a file or folder of text, .jsonl, .csv, .parquet."""
    contexts: Annotated[int, Field(ge=2)] = 300
    """Number of contexts of the evaluation text."""
    context_length: Annotated[int, Field(ge=18)] = 1024
    """Tokens in a context."""
    first_position: Annotated[int, Field(ge=0)] | None = None
    """First position kept in each context; none: the rule in ``first_kept``."""
    site: Annotated[str, Field(pattern=r"^[a-z]\w*(\.\w+)*$")]
    """TransformerLens hook that activations are read at, such as 'blocks.15.hook_resid_post'."""
    centre: bool = False
    """Whether activations are taken less their mean over dimensions: for SAEs trained on a model
    whose weights were centred, as TransformerLens does by default for models with LayerNorm
    (GPT-2), where it changes nothing else."""
    saes: Annotated[Names, Field(min_length=1)]
    """SAEs surveyed: 'release:sae_id', a directory, 'artifact:NAME' (shipped), 'train:WIDTHxL0'.

    In a YAML file also a rule, {release: …, layer: 12, width: 16k, l0: 60}: all SAEs of the release
    that fit, of each width the one whose L0 is nearest to ``l0``.
    """
    default_sae: Name = ""
    """The one of ``saes`` used where a chapter needs one; left out: the first."""
    elsewhere: dict[Text, Name] = field(default_factory=dict)
    """SAEs at other sites of the model, {site: SAE}, for the chapters on components and depth."""
    on_error: dict[Literal["linear", "nonlinear"], Name] = field(default_factory=dict)
    """SAEs trained on LinearError and on NonlinearError of ``default_sae``, {part: SAE}."""
    fit_share: Share = 0.61
    """Share of the tokens that regressions are fitted on; the rest scores (paper: 150k of 247k)."""
    bootstrap: Annotated[int, Field(ge=20)] = 1000
    """Resamples of the held-out sources behind each 95% interval."""
    seed: Seed = 0
    """Seed of the text's order, the split and the bootstrap."""
    batch_contexts: Positive = 4
    """Contexts in one forward pass."""
    training: Training = Training()
    """How ``train`` and 'train:WIDTHxL0' make SAEs."""

    @model_validator(mode="after")
    def _fits_together(self) -> Preset:
        if not self.default_sae:
            object.__setattr__(self, "default_sae", self.saes[0])
        if self.default_sae not in self.saes:
            raise ValueError(f"default_sae '{self.default_sae}' should be one of "
                             f"{', '.join(self.saes)}")
        if not self.kept:
            raise ValueError(f"first_position {self.first_position} leaves no position to keep in "
                             f"a context of {self.context_length} tokens")
        return self

    @property
    def first_kept(self) -> int:
        """First kept position: 200 of 1024 as in the paper; of fewer a quarter, at least 16."""
        if self.first_position is not None:
            return self.first_position
        return max(16, min(200, self.context_length // 4))

    @property
    def kept(self) -> range:
        """Kept positions: ``first_kept`` to the last but one (the last has no loss)."""
        return range(self.first_kept, self.context_length - 1)

    @property
    def beside(self) -> Preset:
        """The same with the number of different tokens that the SAEs beside the ladder see."""
        distinct = self.training.distinct_elsewhere or self.training.distinct_tokens
        recipe = dataclasses.replace(self.training, distinct_tokens=distinct,
                                     distinct_elsewhere=None)
        return dataclasses.replace(self, training=recipe)

    def at(self, site: str) -> Preset:
        """The same at one of the sites of ``elsewhere``, or its own, with the SAE there alone."""
        sae = self.elsewhere[site] if site != self.site else self.default_sae
        return dataclasses.replace(self.beside, site=site, saes=(sae,), default_sae="",
                                   elsewhere={}, on_error={})

    def fields(self) -> dict[str, Any]:
        """Every field as plain values, nested ones too: what a run is keyed by."""
        return dataclasses.asdict(self)


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_path: str | Path, **overrides: Any) -> Preset:
    """The preset of that name or YAML file, with ``overrides`` for its fields.

    None, '' and -1 keep a field. Two overrides are shorthand: ``layer=7`` moves the site to that
    block, ``sae='a'`` or 'a,b' sets ``saes``.
    Raises DarkmatterError when there is no such preset or a field is unknown or does not fit.
    """
    values = _with_overrides(_read(name_or_path), overrides)
    try:
        return Preset(**values)
    except ValidationError as invalid:
        raise DarkmatterError(f"Preset '{name_or_path}': {_sentence(invalid)}.") from None


def is_file(name_or_path: str | Path) -> bool:
    """Whether a preset is given as a YAML file; a name may have dots too, as llama-3.1-8b has."""
    return Path(name_or_path).suffix in (".yaml", ".yml")


def _read(name_or_path: str | Path) -> dict[str, Any]:
    path = Path(name_or_path).expanduser()
    if not is_file(path):
        if str(name_or_path) not in names():
            hint = _nearest(str(name_or_path), names())
            raise DarkmatterError(f"There is no preset '{name_or_path}'{hint}; there are "
                                  f"{', '.join(names())}, or give the path of a .yaml file.")
        path = FOLDER / f"{name_or_path}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DarkmatterError(f"The preset file {path} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise DarkmatterError(f"The preset file {path} must consist of 'field: value' lines.")
    name = re.sub(r"[^\w.-]+", "-", path.stem).strip("-")  # what results are filed under
    return {"name": name} | {str(name): value for name, value in values.items()}


def _with_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in overrides.items() if value not in (None, "", -1)}
    if "layer" in given:
        layer = given.pop("layer")
        if not str(layer).isdigit():
            raise DarkmatterError(
                f"The layer is {layer!r}, but should be the number of a block, from 0.")
        site = given.get("site", values.get("site", ""))
        given["site"] = re.sub(r"^blocks\.\d+", f"blocks.{layer}", site)
    if "sae" in given:
        given["saes"] = [name.strip() for name in str(given.pop("sae")).split(",")]
    return values | ({"default_sae": ""} if "saes" in given else {}) | given


def _sentence(invalid: ValidationError) -> str:
    """The first thing wrong, as words: the field, what it is, and what it should be."""
    first = invalid.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(Training if "." in name else Preset)]
        hint = _nearest(name.split(".")[-1], known)
        return f"unknown field '{name}'{hint}; the fields are {', '.join(known)}"
    if first["type"] == "missing":
        return f"the field '{name}' is missing"
    if not name:  # _fits_together
        return first["msg"].removeprefix("Value error, ")
    what = re.sub("^(Input|String|Value|Tuple)", "it", first["msg"])
    return f"{name} is {first['input']!r}, but {what}"


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
