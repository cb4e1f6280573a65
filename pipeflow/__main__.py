"""`python -m pipeflow`, which is also how `torchrun -m pipeflow` starts a rank."""

from pipeflow.cli import main

if __name__ == "__main__":
    main()
