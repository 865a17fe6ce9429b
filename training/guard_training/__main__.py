"""``python -m guard_training``: what ``guard-train`` runs, for ``accelerate launch -m`` and ``torchrun -m``."""

from guard_training.cli import main

raise SystemExit(main())
