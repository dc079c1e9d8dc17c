"""The encoder adapter over timm's vision transformers, and the ways to load one."""
