"""`python -m contrastive`, which `accelerate launch` and `torchrun` use too."""

import sys

from contrastive.cli import main

if __name__ == "__main__":  # the loader's worker processes import this file again
    sys.exit(main())
