"""Weight files: how they are written, and how those of other programs, too, are recognised."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

import files
from console import UserError, one_line
from models import EdgeGenerator, Generator, SRResNet

# Keys under which other programs, and our own states, keep a state dict; the best one first.
WRAPPERS = ("generator", "params_ema", "ema", "params", "state_dict", "model_state_dict")
WRAPPERS += ("model", "net", "parts")
PREFIXES = r"^((module|_orig_mod|model|generator|net_g)\.)+"  # DataParallel, torch.compile, ...
NUMBERED = r"^residual_block(_edges)?(\d+)\."  # as Edge.SRGAN does, from 1
ANOTHER = "use another file"


def save_network(network: nn.Module, path: Path) -> None:
    """Writes a network's weights, those with more than one dimension in half precision.

    They are contiguous and on the CPU, so that any program can read them.
    """
    state = {}
    for key, value in network.state_dict().items():
        half = value.half() if value.ndim > 1 else value
        kept = half if half.isfinite().all() else value  # some are too large for half precision
        state[key] = kept.cpu().clone(memory_format=torch.contiguous_format)
    save_file({"network": type(network).__name__, "state_dict": state}, path)


def load_network(path: Path, *kinds: type[nn.Module]) -> nn.Module:
    """Returns the network in a weight file, in float32 and evaluation mode.

    Recognises, by keys and shapes, files from `save_network`, Edge-Informed SISR and Edge.SRGAN,
    and bare state dicts.

    Args:
        kinds: the accepted classes; any generator by default.
    """
    return build_network(load_state(path), path, *kinds)


def interpolate(shares: dict[Path, float]) -> SRResNet:
    """Returns an HR generator whose weights are a weighted mean of several files'.

    Args:
        shares: of each file, summing to 1 (network interpolation: Wang et al., ESRGAN, arXiv
            1809.00219, section 3.4).
    """
    states = {path: load_state(path) for path in shares}
    first = next(iter(shares))
    shapes = {path: {k: v.shape for k, v in state.items()} for path, state in states.items()}
    for path in shares:
        if shapes[path] != shapes[first]:
            raise UserError(f"{path}: not the same architecture as {first}; {ANOTHER}")
    mixed = {
        key: sum(share * states[path][key].float() for path, share in shares.items())
        for key in states[first]
    }
    return build_network(mixed, first, Generator, SRResNet)


def load_state(path: Path) -> dict[str, Tensor]:
    """Returns the state dict in a weight file, with keys renamed to the current ones."""
    content = load_file(path, "train it first, or " + ANOTHER)
    while inner := [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]:
        content = inner[0]
    state = {}
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise UserError(f"{path}: holds no state dict; {ANOTHER}")
        name = re.sub(PREFIXES, "", key)
        name = re.sub(NUMBERED, lambda m: f"residual_blocks{m[1] or ''}.{int(m[2]) - 1}.", name)
        state[name] = value
    return state


def build_network(state: dict[str, Tensor], path: Path, *kinds: type[nn.Module]) -> nn.Module:
    """Returns the network that a state dict of `load_state` belongs to; see `load_network`."""
    if "encoder.1.weight_orig" in state:
        kind, first, blocks = EdgeGenerator, "encoder.1.weight_orig", "middle."
    elif "residual_blocks.0.conv1.weight" in state:
        kind = Generator if "conv3.weight" in state else SRResNet
        first, blocks = "conv1.weight", "residual_blocks."
    else:
        raise UserError(f"{path}: holds none of this repository's generators; {ANOTHER}")
    if kinds and kind not in kinds:
        wanted = " or ".join(each.__name__ for each in kinds)
        raise UserError(f"{path}: holds {kind.__name__}, not {wanted}; {ANOTHER}")
    try:
        numbers = {key.split(".")[1] for key in state if key.startswith(blocks)}
        network = kind(len(state[first]), len(numbers))
        network.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"{path}: does not fit {kind.__name__} ({reason}); {ANOTHER}") from error
    return network.eval()


def save_file(content: dict, path: Path) -> None:
    """Writes a file of tensors and plain values, atomically and flushed to disk."""
    # Given a path instead of a file, torch.save hides the kind of disk error.
    with files.replacing(path, durable=True) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_file(path: Path, if_missing: str = ANOTHER) -> dict:
    """Returns the contents of a file of finite tensors and plain values, on the CPU; runs no code.

    Args:
        if_missing: what to tell the user to do if there is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {if_missing}") from error
    except OSError as error:
        raise UserError(f"{one_line(error)}; make it readable, or {ANOTHER}") from error
    except Exception as error:  # torch.load may raise anything on a damaged file
        reason = "damaged, or not a tensors-only file written by torch.save"
        raise UserError(f"{path}: {reason}; {ANOTHER}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state dict; {ANOTHER}")
    if not is_finite(content):
        raise UserError(f"{path}: holds values that are not finite; {ANOTHER}")
    return content


def is_finite(content: object) -> bool:
    """Returns whether all tensors are finite, at any depth of dicts and lists."""
    if isinstance(content, Tensor):
        return bool(content.isfinite().all())
    values = content.values() if isinstance(content, dict) else content
    return not isinstance(content, dict | list) or all(map(is_finite, values))
