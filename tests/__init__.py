"""A package of its own: torch-fidelity installs another of this name, which processes that are spawned would find."""
