"""``python -m qgm_ext``: the same as the command ``qgm``."""

from qgm_ext.cli import main

if __name__ == "__main__":
    main()
