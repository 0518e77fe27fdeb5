"""``python -m colm_scale COMMAND``: the console command, for what starts modules, ``torchrun -m colm_scale train``."""

from colm_scale.cli.main import main

if __name__ == "__main__":
    main()
