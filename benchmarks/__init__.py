"""One question a file; each is run by hand and says how."""
