"""`python -m hf_prune`, `accelerate launch -m hf_prune`, `torchrun -m hf_prune`."""

from hf_prune.cli.main import main


if __name__ == "__main__":
    main()
