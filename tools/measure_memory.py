"""Measures whether memory grows with the number of image sizes; takes some minutes.

    python tools/measure_memory.py

Prints the peak memory over 200 images of random sizes relative to that of the largest one alone;
exits with 1 above 1.2.
"""

import multiprocessing
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LARGEST, IMAGES, ALLOWED = 264, 200, 1.2  # at 264, windows have their largest size


def peak(count: int) -> int:
    """Returns this process's peak memory after enlarging `count` images, in the system's unit."""
    import numpy as np  # noqa: PLC0415

    from device import open_device  # noqa: PLC0415
    from inference import Enlarger  # noqa: PLC0415
    from models import EdgeGenerator, Generator  # noqa: PLC0415

    rng = np.random.default_rng(0)
    sizes = [(LARGEST, LARGEST)] if count == 1 else rng.integers(20, LARGEST + 1, (count, 2))
    device = open_device("cpu", "fp32")
    enlarger = Enlarger(Generator(16, 4), EdgeGenerator(16, 1), device)
    for height, width in sizes:
        enlarger(rng.integers(0, 256, (height, width, 3), np.uint8))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    peaks = []
    for count in (1, IMAGES):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(peak, (count,)))
    print(f"{peaks[1] / peaks[0]:.2f}")
    sys.exit(peaks[1] > ALLOWED * peaks[0])
