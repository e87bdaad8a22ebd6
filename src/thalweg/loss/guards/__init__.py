"""What would make a loss or its derivatives wrong: refused, or kept from happening."""
