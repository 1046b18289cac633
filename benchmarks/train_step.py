"""How fast is a whole training step beside PyTorch's?

    python benchmarks/train_step.py --against torch --data path/to/cifar-10-batches-py

is `python -m experiments bench` with the same options. The answer is in the README, "On a CPU".
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastcifar_jax.cli.app import main  # noqa: E402

main(["bench", *sys.argv[1:]], ROOT / "experiments")
