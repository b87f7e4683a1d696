"""`python -m mamba_probe` is `mamba-probe`."""

from mamba_probe.cli import main

if __name__ == "__main__":
    main()
