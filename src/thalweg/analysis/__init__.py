"""What measurements say: claims, figures, report."""
