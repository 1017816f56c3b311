"""The one loop over images that every command shares, and what each result was made from."""

from dataclasses import asdict, dataclass
from pathlib import Path

import images


@dataclass(frozen=True)
class Stamp:
    """What a file was made from, by content: written into the file, in whatever format.

    Attributes:
        source: digest of the image file.
        grid: how it was cut into tiles.
        weights: digest of the weight files, and the precision.
        edges: digest of the file of edges that were given instead of predicted ones.
    """

    source: str
    grid: str = ""
    weights: str = ""
    edges: str = ""

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in asdict(self).items() if value)

    @classmethod
    def read(cls, path: Path) -> "Stamp | None":
        """Returns the stamp in a file; None without one, or without a readable file."""
        values = dict(
            part.split("=", 1) for part in images.read_stamp(path).split(" ") if "=" in part
        )
        try:
            return cls(**values)
        except TypeError:  # none, or of another version
            return None
