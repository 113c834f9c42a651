"""Write scikit-learn's 1,797 handwritten digits as the small file that the package carries (needs scikit-learn)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[1] / "src/mllm_fl/data/embedded/digits.npz"


def main() -> None:
    """Images are uint8 (1797, 8, 8) with values 0..16, labels uint8 (1797,), both in scikit-learn's order."""
    digits = load_digits()
    np.savez_compressed(TARGET, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))


if __name__ == "__main__":
    main()
