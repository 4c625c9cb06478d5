"""What goes through a device's rings: told as it happens, kept in a file, and done again without a guest."""
