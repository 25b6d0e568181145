"""Run a script of the repository with made-up values, for torchrun on the null GPU: script.py train.py ..."""

import runpy
import sys

from null_gpu.values import KEPT, make_up_values

if __name__ == "__main__":
    make_up_values(KEPT)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
