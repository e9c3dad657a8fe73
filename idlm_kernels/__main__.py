"""`python -m idlm_kernels`, the same as `idlm`."""

from idlm_kernels.cli import main

main()
