"""What an experiment is made of: a validated dataclass, YAML files that ship, published SAEs."""

from .preset import DEFAULT, FOLDER, Preset, Training, is_file, load, names

__all__ = ["DEFAULT", "FOLDER", "Preset", "Training", "is_file", "load", "names"]
