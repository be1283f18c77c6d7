"""`python -m hf_specreg`, as launchers start it: the command hf-specreg."""

from hf_specreg.cli import main

if __name__ == "__main__":
    main()
