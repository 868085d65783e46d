"""Clusters: the rules of their files, and what every machine of one sets up."""
