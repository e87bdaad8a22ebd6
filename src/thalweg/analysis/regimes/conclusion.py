"""What is made of a sweep."""
