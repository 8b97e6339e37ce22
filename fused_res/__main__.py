"""`python -m fused_res`: the same as the command `fused-res`."""

import sys

from fused_res.cli import main

if __name__ == "__main__":
    sys.exit(main())
