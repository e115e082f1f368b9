"""Shortens the time that a waiting thread spins on its core; import it before torch.

On Linux PyTorch shares its work out with GNU's OpenMP, whose threads meet after every operation and
spin for milliseconds, 300,000 turns, before they sleep. Beside another program a spinning thread
starves the thread that it waits for, and training takes 3 to 18 times as long. After 2,000 turns
it takes twice as long, and 1 to 3 % longer where nothing else runs, see benchmarks/README.md.
"""

import os

# Read once, when the library is loaded. Whoever sets one of them has chosen.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
