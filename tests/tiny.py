"""main.py with tiny networks and frequent checkpoints, for tests that need processes of their own.

With the environment variable GRADIENTS, the gradients of the first update go to that file.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import main
import models
import training

DEFAULTS = {
    models.EdgeGenerator: (4, 1),
    models.EdgeDiscriminator: (4,),
    models.SRResNet: (8, 4),
    models.Generator: (8, 4),
    models.Discriminator: (4,),
}
for network, arguments in DEFAULTS.items():
    network.__init__.__defaults__ = arguments
training.CHECKPOINT_EVERY = 4


def note_gradients(path: str) -> None:
    """Makes the optimisers' first steps write the gradients they were given."""
    step, seen = torch.optim.Adam.step, []

    def noting_step(self: torch.optim.Adam) -> None:
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        torch.save(seen[:2], f"{path}.{os.environ.get('RANK', '0')}")
        step(self)

    torch.optim.Adam.step = noting_step


if __name__ == "__main__":
    if "GRADIENTS" in os.environ:
        note_gradients(os.environ["GRADIENTS"])
    command = main.configure(sys.argv[1:])
    with main.plain_errors():
        command()
