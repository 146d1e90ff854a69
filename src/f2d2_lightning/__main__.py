"""``python -m f2d2_lightning``, which is ``f2d2``."""

from f2d2_lightning.cli import main

if __name__ == "__main__":
    main()
