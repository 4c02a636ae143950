"""`python -m msmdiff`: what `torchrun -m` and `accelerate launch -m` start."""

from msmdiff.cli import main

main()
