"""The active-learning loop and its parts; import what you need from the modules."""
