"""The stages ``eval`` and ``ttt``: bits per byte of the validation documents."""
