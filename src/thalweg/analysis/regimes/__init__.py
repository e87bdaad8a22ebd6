"""Pictures of regimes."""
