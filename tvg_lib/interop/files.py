"""Reading released files: YAML configurations and weights, without running pickled code."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tvg_lib.errors import DataError


def read_configuration(path: Path) -> dict:
    """A released YAML configuration.

    Raises:
        DataError: the file cannot be read or is not a mapping.
    """
    path = Path(path)
    try:
        published = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable configuration: {error}") from error
    if not isinstance(published, dict):
        raise DataError(f"{path}: a mapping expected, found {type(published).__name__}")
    return published


def read_weights(path: Path, ema: bool = True) -> dict[str, Tensor]:
    """Parameters of a released checkpoint (`.pth`) or of a safetensors file.

    Args:
        path: the file.
        ema: of a `.pth` with both, take the averaged weights that the papers evaluate.

    Raises:
        DataError: the file cannot be read safely, or holds no weights.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path} is not a readable checkpoint: {error}") from error
    for key in ("model_ema", "model") if ema else ("model",):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise DataError(f"{path} holds no state dict under 'model_ema' or 'model'")
    return {name.removeprefix("module."): value for name, value in content.items()}
