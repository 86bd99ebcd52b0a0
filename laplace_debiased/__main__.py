"""``python -m laplace_debiased``."""

import sys

from laplace_debiased.cli import main

if __name__ == "__main__":
    sys.exit(main())
