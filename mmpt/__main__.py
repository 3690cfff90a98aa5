"""`python -m mmpt`, which is how torchrun starts it: torchrun --nproc-per-node 2 -m mmpt train CONFIG."""

import sys

from mmpt.cli import main

sys.exit(main())
