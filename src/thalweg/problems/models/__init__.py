"""Models, and the settings from which a spec builds them."""
