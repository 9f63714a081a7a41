"""`python -m pab_kernels` is `pab`: torchrun starts modules."""

from .cli import main

if __name__ == "__main__":
    main()
